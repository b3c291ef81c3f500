# SPDX-License-Identifier: Apache-2.0
"""A small decoder as one would write it for one device, and its loss: what the plans are tried on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from batiste import nn
from batiste.graph import List, Module, Rngs
from batiste.transforms.autodiff import value_and_grad
from batiste.transforms.compile import jit

WIDTH, VOCABULARY, LENGTH, BATCH = 16, 32, 8, 16


class Block(Module):
    def __init__(self, rngs, attention_fn=nn.dot_product_attention):
        self.before_attn, self.before_mlp = nn.RMSNorm(WIDTH, rngs=rngs), nn.RMSNorm(WIDTH, rngs=rngs)
        self.attn = nn.MultiHeadAttention(4, WIDTH, decode=False, attention_fn=attention_fn, use_bias=False, rngs=rngs)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nn.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.before_attn(x), is_causal=True)
        return x + self.down(nn.gelu(self.up(self.before_mlp(x))))


class Decoder(Module):
    def __init__(self, rngs, layers=1, attention_fn=nn.dot_product_attention):
        self.embed = nn.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = List([Block(rngs, attention_fn) for _ in range(layers)])
        self.head = nn.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Stacked(Decoder):
    def __init__(self, rngs, layers=4, **options):
        super().__init__(rngs, layers=0)
        self.blocks = nn.Stack(Block, layers, rngs=rngs, **options)

    def __call__(self, tokens):
        return self.head(self.blocks(self.embed(tokens)))


def decoder(**options):
    return Decoder(Rngs(0), **options)


def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCABULARY)


def loss_of(model, tokens):
    logits = jax.nn.log_softmax(model(tokens))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[..., None], axis=-1))


def train_step(model, optimizer, tokens):
    loss, grads = value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    return loss


loss_and_grads = jit(value_and_grad(loss_of))


def assert_near(a, b, tolerance=1e-5):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
