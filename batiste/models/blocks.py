# SPDX-License-Identifier: Apache-2.0
"""The block of a transformer with norms first, as ViT, CLIP, Whisper and DiT have it.

Dims, in the suffixes of names:  B batch   T positions   S positions looked at   D features   H heads   C depth of head
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from batiste import nn
from batiste.graph import Module, Rngs

RULES = (
    ("{attn,cross}/{query,key,value}/{kernel,bias}", (..., "heads", None)),
    ("{attn,cross}/out/kernel", (..., "heads", None, None)),
    ("mlp/up/kernel", (..., "mlp")),
    ("mlp/up/bias", (..., "mlp")),
    ("mlp/down/kernel", (..., "mlp", None)),
)
"""Which dim of each parameter a `tensor` axis divides."""


def exact_gelu(x: Array) -> Array:
    """x Φ(x)

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", eq. 1.
    """
    return nn.gelu(x, approximate=False)


class Attention(Module):
    """out(softmax(query(x) · key(y) / √C) value(y)), over the positions of y that are seen; y is x if left out

    Args:
        key_bias: whether keys have one; on its own it changes no result.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """

    def __init__(self, features: int, heads: int, *, key_bias: bool = True, rngs: Rngs):
        shape = (heads, features // heads)
        self.query = nn.LinearGeneral(features, shape, rngs=rngs)
        self.key = nn.LinearGeneral(features, shape, use_bias=key_bias, rngs=rngs)
        self.value = nn.LinearGeneral(features, shape, rngs=rngs)
        self.out = nn.LinearGeneral(shape, features, axis=(-2, -1), rngs=rngs)

    def __call__(self, x_BTD: Array, seen_BHTS: Array | None = None, kv: tuple[Array, Array] | None = None) -> Array:
        k_BSHC, v_BSHC = self.keys_values(x_BTD) if kv is None else kv
        return self.out(nn.dot_product_attention(self.query(x_BTD), k_BSHC, v_BSHC, mask=seen_BHTS))

    def keys_values(self, y_BSD: Array) -> tuple[Array, Array]:
        """What is looked at: k[B, S, H, C] and v[B, S, H, C]"""
        return self.key(y_BSD), self.value(y_BSD)


class Mlp(Module):
    """down(activation(up(x)))"""

    def __init__(self, features: int, hidden: int, activation: Callable[[Array], Array] = exact_gelu, *, rngs: Rngs):
        self.up = nn.Linear(features, hidden, rngs=rngs)
        self.down = nn.Linear(hidden, features, rngs=rngs)
        self.activation = activation

    def __call__(self, x_BTD: Array) -> Array:
        return self.down(self.activation(self.up(x_BTD)))


class Block(Module):
    """y = x + attn(norm(x));  y + mlp(norm(y))

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", figure 1 (b).
    """

    def __init__(self, features: int, heads: int, hidden: int, *, epsilon: float = 1e-5, dropout: float = 0.0,
                 activation: Callable[[Array], Array] = exact_gelu, key_bias: bool = True, rngs: Rngs):  # fmt: skip
        self.attn_norm = nn.LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.attn = Attention(features, heads, key_bias=key_bias, rngs=rngs)
        self.mlp_norm = nn.LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.mlp = Mlp(features, hidden, activation, rngs=rngs)
        self.dropout = nn.Dropout(dropout, rngs=rngs)

    def __call__(self, x_BTD: Array, seen_BHTS: Array | None = None) -> Array:
        x_BTD = x_BTD + self.dropout(self.attn(self.attn_norm(x_BTD), seen_BHTS))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


def with_first(first_11D: Array, x_BTD: Array) -> Array:
    """[first, x], along the positions"""
    first_B1D = jnp.broadcast_to(first_11D.astype(x_BTD.dtype), (x_BTD.shape[0], 1, x_BTD.shape[-1]))
    return jnp.concatenate([first_B1D, x_BTD], axis=1)
