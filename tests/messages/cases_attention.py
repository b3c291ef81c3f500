# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of attention and dropout: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from batiste import nnx


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **options):
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, **{"decode": False, **options})

    def __call__(self, x, *args, **options):
        return x + self.attention(x, *args, **options)


class Model(nnx.Module):
    def __init__(self, **options):
        self.blocks = nnx.List([Block(rngs(), **options)])

    def __call__(self, *args, **options):
        return self.blocks[0](*args, **options)


class Regularized(nnx.Module):
    def __init__(self, *args, **options):
        self.dropout = nnx.Dropout(*args, **options)

    def __call__(self, x, **options):
        return self.dropout(x, **options)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def decode(cached, given):
    model = Model(decode=True)
    model.blocks[0].attention.init_cache(cached)
    return model(jnp.ones(given))


def one_option():
    return nnx.view(Model(), decode=True, batch_size=2)


X, HEADS = jnp.ones((2, 5, 8)), jnp.ones((2, 5, 4, 3))
attend = nnx.dot_product_attention

CASES: list[tuple[str, Callable[[], object]]] = [
    ("attention-heads-do-not-divide", lambda: Model()(nnx.MultiHeadAttention(3, 8, rngs=rngs()))),
    ("attention-no-heads", lambda: nnx.MultiHeadAttention(0, 8, rngs=rngs())),
    ("attention-shared-heads-do-not-divide", lambda: nnx.MultiHeadAttention(4, 8, num_kv_heads=3, rngs=rngs())),
    ("attention-wrong-queries", lambda: Model()(jnp.ones((2, 5, 7)))),
    ("attention-queries-without-positions", lambda: Model()(jnp.ones(8))),
    ("attention-wrong-keys", lambda: Model()(X, jnp.ones((2, 5, 7)))),
    ("attention-values-without-keys", lambda: Model()(X, None, X)),
    ("attention-keys-of-another-batch", lambda: Model()(X, jnp.ones((3, 5, 8)))),
    ("attention-decode-undecided", lambda: Model(decode=None)(X)),
    ("attention-dropout-undecided", lambda: Model(dropout_rate=0.1)(X)),
    ("attention-dropout-without-stream", lambda: Model(dropout_rate=0.1, keep_rngs=False)(X, deterministic=False)),
    ("attention-dropout-with-a-seed", lambda: Model(dropout_rate=0.1)(X, deterministic=False, rngs=0)),
    ("attention-decode-without-cache", lambda: Model(decode=True)(X[:, :1])),
    ("attention-decode-several-positions", lambda: decode((2, 9, 8), (2, 3, 8))),
    ("attention-decode-another-batch", lambda: decode((2, 9, 8), (3, 1, 8))),
    ("attention-cache-of-one-dim", lambda: decode((8,), (1, 8))),
    ("attention-view-with-half-a-cache", one_option),
    ("attend-ranks", lambda: attend(HEADS[0], HEADS, HEADS)),
    ("attend-batches", lambda: attend(HEADS[:1], HEADS, HEADS)),
    ("attend-lengths", lambda: attend(HEADS, HEADS, HEADS[:, :4])),
    ("attend-heads", lambda: attend(HEADS, HEADS[:, :, :3], HEADS[:, :, :3])),
    ("attend-heads-of-values", lambda: attend(HEADS, HEADS, HEADS[:, :, :2])),
    ("attend-depths", lambda: attend(HEADS, HEADS[..., :2], HEADS)),
    ("attend-dropout-without-key", lambda: attend(HEADS, HEADS, HEADS, dropout_rate=0.1)),
    ("masks-of-two-ranks", lambda: nnx.combine_masks(jnp.ones((5, 5)), jnp.ones((2, 1, 5, 5)))),
    ("dropout-keeps-a-share", lambda: nnx.Dropout(20, rngs=rngs())),
    ("dropout-undecided", lambda: Regularized(0.5, deterministic=None, rngs=rngs())(X)),
    ("dropout-without-stream", lambda: Regularized(0.5)(X)),
    ("dropout-with-a-seed", lambda: Regularized(0.5)(X, rngs=0)),
    ("dropout-built-with-a-key", lambda: Regularized(0.5, rngs=jax.random.key(0))),
    ("dropout-another-stream", lambda: Regularized(0.5, rngs=nnx.Rngs(params=0))),
    ("dropout-no-such-dim", lambda: Regularized(0.5, broadcast_dims=(3,), rngs=rngs())(X)),
    ("dropout-whole-numbers", lambda: Regularized(0.5, rngs=rngs())(jnp.ones(3, jnp.int32))),
]
