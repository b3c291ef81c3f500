# SPDX-License-Identifier: Apache-2.0
"""Attention over any dims as functions of a scope: the attended dims become one, and `batiste.linen` does the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batiste import linen
from batiste.graph.errors import ArgumentError
from batiste.linen.linear import default_kernel_init
from batiste.linen.scope import Scope
from batiste.nn.attend import make_causal_mask
from batiste.nn.initializers import Initializer, zeros

from .linear import dense_general

__all__ = ["dot_product_attention", "multi_head_dot_product_attention"]


def _attended(axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    axes = range(1, ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(a % ndim for a in axes)


def _joined(x: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """`x` [*dims, ...] with the dims `axes` as one, behind the other dims."""
    rest = [a for a in range(ndim) if a not in axes]
    moved = x.transpose(*rest, *axes, *range(ndim, x.ndim))
    return moved.reshape(*(x.shape[a] for a in rest), math.prod(x.shape[a] for a in axes), *x.shape[ndim:])


def dot_product_attention(scope: Scope, query: Array, key: Array, value: Array, dtype: Any = jnp.float32,
                          bias: Array | None = None, axis: int | Sequence[int] | None = None,
                          broadcast_dropout: bool = True, dropout_rng: Array | None = None, dropout_rate: float = 0.0,
                          deterministic: bool = False, precision: Any = None) -> Array:  # fmt: skip
    """y[b, *q, h] = softmax(query[b, *q, h] · key[b, *k, h] / √d + bias) value[b, *k, h]

    Args:
        bias: of the scores, `[..., heads, queries, keys]` where the attended dims are one.
        axis: the dims that are attended over; by default all but batch, heads and channels.
        dropout_rng: a key, by default from the stream `dropout`.
    """
    ndim = query.ndim - 2
    axes = _attended(axis, ndim)
    if dropout_rate > 0.0 and not deterministic and dropout_rng is None:
        dropout_rng = scope.make_rng("dropout")
    q, k, v = (_joined(x, axes, ndim) for x in (query, key, value))
    y = linen.dot_product_attention(
        q, k, v, bias=bias, broadcast_dropout=broadcast_dropout, dropout_rng=dropout_rng, dropout_rate=dropout_rate,
        deterministic=deterministic, dtype=dtype, precision=precision,
    )  # fmt: skip
    rest = [a for a in range(ndim) if a not in axes]
    shape = [query.shape[a] for a in (*rest, *axes)]
    back = [(*rest, *axes).index(a) for a in range(ndim)]
    y = y.reshape(*shape, *y.shape[-2:])
    return y.transpose(*back, ndim, ndim + 1)


def multi_head_dot_product_attention(
    scope: Scope, inputs_q: Array, inputs_kv: Array | None, num_heads: int, dtype: Any = jnp.float32,
    qkv_features: int | None = None, out_features: int | None = None, attention_axis: int | Sequence[int] | None = None,
    causal_mask: bool = False, padding_mask: Array | None = None, key_padding_mask: Array | None = None,
    segmentation: Array | None = None, key_segmentation: Array | None = None, cache: bool = False,
    broadcast_dropout: bool = True, dropout_rng: Array | None = None, dropout_rate: float = 0.0,
    deterministic: bool = False, precision: Any = None, kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = zeros, bias: bool = True, attention_fn: Callable[..., Array] = dot_product_attention,
) -> Array:  # fmt: skip
    """y = attention of several heads, projected in and out, over any dims of `inputs_q` [batch, *dims, features].

    Args:
        inputs_kv: what is attended to; None: `inputs_q`.
        attention_axis: the dims that are attended over; by default all but batch and features.
        causal_mask: a position sees none behind it.
        padding_mask, key_padding_mask: which positions of queries and of keys count.
        segmentation, key_segmentation: numbers of segments; a position sees its own.

    Raises:
        ArgumentError: `cache` is set: step-wise decoding is `batiste.linen.MultiHeadDotProductAttention(decode=True)`.
    """
    if cache:
        raise ArgumentError("multi_head_dot_product_attention keeps no cache", got="cache=True",
                            fix="use linen.MultiHeadDotProductAttention(decode=True)")  # fmt: skip
    itself = inputs_kv is None or inputs_kv is inputs_q
    inputs_kv = inputs_q if inputs_kv is None else inputs_kv
    width = (qkv_features or inputs_q.shape[-1]) // num_heads
    options = dict(bias=bias, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, precision=precision)

    def projected(name: str, x: Array) -> Array:
        return scope.child(dense_general, name)(x, (num_heads, width), **options)

    q, k, v = projected("query", inputs_q), projected("key", inputs_kv), projected("value", inputs_kv)
    ndim = inputs_q.ndim - 1
    axes = _attended(attention_axis, ndim)
    masks = []
    if causal_mask:
        masks.append(make_causal_mask(_joined(jnp.ones(inputs_q.shape[:-1]), axes, ndim), dtype=jnp.bool))
    for queries, keys, fits in (
        (padding_mask, key_padding_mask, jnp.logical_and),
        (segmentation, key_segmentation, jnp.equal),
    ):
        if queries is not None:
            keys = queries if keys is None and itself else keys
            rows, columns = (_joined(_per_position(x, ndim), axes, ndim) for x in (queries, keys))
            masks.append(fits(rows[..., None, :, None], columns[..., None, None, :]))
    scores = None
    for mask in masks:
        each = jax.lax.select(mask, jnp.zeros(mask.shape, dtype), jnp.full(mask.shape, -1e10, dtype))
        scores = each if scores is None else scores + each
    y = attention_fn(scope, q, k, v, dtype=dtype, axis=attention_axis, bias=scores, precision=precision,
                     dropout_rng=dropout_rng, dropout_rate=dropout_rate, broadcast_dropout=broadcast_dropout,
                     deterministic=deterministic)  # fmt: skip
    features = out_features or inputs_q.shape[-1]
    return scope.child(dense_general, "out")(y, features, axis=(-2, -1), **options)


def _per_position(x: Any, ndim: int) -> Array:
    """A mask [batch, *dims], which may have come with a last dim of one."""
    return x[..., 0] if x.ndim > ndim else x
