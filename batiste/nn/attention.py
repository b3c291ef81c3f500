# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention: projections around the attention formula, with a cache for decoding.

Dims:  B… batch   T queries   S keys and values   H heads of queries   K heads of keys   D depth of a head
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.graph import Cache, Module, Rngs, RngStream, data, make
from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.precision import promote_dtype

from . import initializers
from .attend import check_shapes, combine_masks, dot_product_attention, with_rank
from .checks import check_last_dim, check_sizes, decided
from .initializers import Initializer
from .linear import NO_METADATA, LinearGeneral, default_bias_init, default_kernel_init
from .norm import LayerNorm
from .stochastic import RngTypeError, forked_stream


class MultiHeadAttention(Module):
    """y[B…, T, out] = attention(x_q W_q, x_k W_k, x_v W_v) W_o, in `num_heads` heads of depth qkv_features / num_heads

    Args:
        in_features, in_kv_features: last dim of the queries' input, and of the keys' and values' (None: the same).
        qkv_features, out_features: of all heads together, and of the result; None takes `in_features`.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; None takes `num_heads`.
        dtype: what is computed in; None takes what the inputs and the parameters promote to.
        broadcast_dropout, dropout_rate: of the attention weights; see `dot_product_attention`.
        deterministic: no dropout. `train()`, `eval()` and `view` switch it.
        out_kernel_init, out_bias_init, out_kernel_metadata, out_bias_metadata: of the last projection, where they
            are to differ from `kernel_init` and so on.
        attention_fn: takes the place of `dot_product_attention`.
        decode: one position per call, with the keys and values of earlier ones in a cache; call `init_cache` first.
        normalize_qk: a LayerNorm of the heads' queries and keys.
        qkv_promote_dtype, out_promote_dtype, ln_promote_dtype, qkv_dot_general, out_dot_general, qkv_dot_general_cls,
            out_dot_general_cls: are passed on to the projections and norms.
        keep_rngs: fork a stream for dropout; else each call that drops has to be given `rngs`.

    Raises:
        ArgumentError: `num_heads` does not divide `qkv_features`, or `num_kv_heads` not `num_heads`; `decode` or
            `deterministic` is given neither here nor in the call; the cache is missing.
        ShapeError: an input does not fit the projections, the others, or the cache.
        RngError: dropout is on, and there is no stream.

    >>> layer = MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=Rngs(0))
    >>> layer(jnp.ones((4, 5, 6)), is_causal=True).shape
    (4, 5, 6)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2; Ainslie et al. 2023, "GQA", section 2.2;
        Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2 (`normalize_qk`).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., Array] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: Callable[..., Any] = promote_dtype,
        out_promote_dtype: Callable[..., Any] = promote_dtype,
        ln_promote_dtype: Callable[..., Any] = promote_dtype,
        qkv_dot_general: Callable[..., Array] | None = None,
        out_dot_general: Callable[..., Array] | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: Any,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        out_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        out_bias_metadata: Mapping[str, Any] = NO_METADATA,
        query_ln_scale_metadata: Mapping[str, Any] = NO_METADATA,
        key_ln_scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.attention_fn = attention_fn
        self.decode = decode
        self.normalize_qk = normalize_qk
        self.qkv_promote_dtype = qkv_promote_dtype
        self.out_promote_dtype = out_promote_dtype
        self.ln_promote_dtype = ln_promote_dtype
        self.qkv_dot_general = qkv_dot_general
        self.out_dot_general = out_dot_general
        self.qkv_dot_general_cls = qkv_dot_general_cls
        self.out_dot_general_cls = out_dot_general_cls
        self._check_sizes()
        self.head_dim = self.qkv_features // num_heads

        common: dict[str, Any] = dict(
            dtype=dtype, param_dtype=param_dtype, precision=precision, use_bias=use_bias, rngs=rngs
        )
        project = functools.partial(
            LinearGeneral,
            **common,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
            dot_general=qkv_dot_general,
            dot_general_cls=qkv_dot_general_cls,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.query = project(in_features, (self.num_heads, self.head_dim))
        self.key = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        norm = functools.partial(LayerNorm, self.head_dim, use_bias=False, dtype=dtype, param_dtype=param_dtype,
                                 promote_dtype=ln_promote_dtype, rngs=rngs)  # fmt: skip
        self.query_ln = data(norm(scale_metadata=query_ln_scale_metadata) if normalize_qk else None)
        self.key_ln = data(norm(scale_metadata=key_ln_scale_metadata) if normalize_qk else None)
        self.out = LinearGeneral(
            (self.num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            **common,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        self.rngs = forked_stream(self, rngs, "dropout") if keep_rngs and dropout_rate > 0 else None
        self.cached_key = data(None)
        self.cached_value = data(None)
        self.cache_index = data(None)

    def _check_sizes(self) -> None:
        names = ("num_heads", "in_features", "qkv_features", "out_features", "num_kv_heads", "in_kv_features")
        check_sizes(self, **{name: getattr(self, name) for name in names})
        if self.num_heads < 1 or self.qkv_features % self.num_heads:
            raise ArgumentError(
                f"Memory dimension ({self.qkv_features}) must be divisible by 'num_heads' heads ({self.num_heads})",
                fix="choose num_heads among the divisors of qkv_features, which is in_features where it is not given",
            )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ArgumentError(f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.num_kv_heads})",
                                fix="choose num_kv_heads among the divisors of num_heads")  # fmt: skip

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
    ) -> Array:
        """Args:
        inputs_q, inputs_k, inputs_v: [B…, T, in], [B…, S, in_kv], [B…, S, in_kv]; keys default to the queries'
            input, values to the keys'.
        mask: entries that are False (or 0) get no weight; broadcasts to (B…, H, T, S).
        deterministic, decode: instead of the layer's own settings.
        rngs: streams, or a stream, for dropout, instead of the layer's own.
        sow_weights: record the weights as an `Intermediate` named `attention_weights`.
        is_causal: query t sees the keys 0 … t. While decoding that is so anyway.
        out_sharding, qkv_sharding: of the result, and of the projected queries, keys and values.
        """
        if inputs_k is None:
            if inputs_v is not None:
                raise ArgumentError("`inputs_k` cannot be None if `inputs_v` is not None", at=self,
                                    fix="pass what keys and values have in common as inputs_k alone")  # fmt: skip
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        if jnp.ndim(inputs_q) < 2 or inputs_q.shape[-1] != self.in_features:
            raise ShapeError(
                f"Incompatible input dimension: {type(self).__name__} got wrong queries",
                at=self,
                got=jnp.shape(inputs_q),
                expected=f"(..., length, {self.in_features})",
                fix=f"build it with in_features={inputs_q.shape[-1]}"
                if jnp.ndim(inputs_q) > 1
                else "add the missing dims",
            )
        _check_keys(self, inputs_k, inputs_v)
        q = self.query(inputs_q, out_sharding=qkv_sharding)
        k = self.key(inputs_k, out_sharding=qkv_sharding)
        v = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        if decided(self, "decode", decode, self.decode):
            k, v, mask = _remembered(self, q, k, v, mask)
            is_causal = False  # the mask of the cache says what has been seen

        if self.attention_fn is dot_product_attention:
            check_shapes(self, q, k, v)

        drop = self.dropout_rate > 0 and not decided(self, "deterministic", deterministic, self.deterministic)
        y = self.attention_fn(
            q,
            k,
            v,
            mask=mask,
            dropout_rng=_dropout_key(self, rngs) if drop else None,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=not drop,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal,
        )
        return self.out(y, out_sharding=out_sharding)

    # ------------------------------------------------------------ decoding
    def init_cache(self, input_shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> None:
        """Makes an empty cache for decoding inputs of shape (B…, length, in): as many positions as `length`.

        >>> layer = MultiHeadAttention(2, 6, decode=True, rngs=Rngs(0))
        >>> layer.init_cache((4, 9, 6))
        >>> layer(jnp.ones((4, 1, 6))).shape, layer.cached_key.shape, int(layer.cache_index[...])
        ((4, 1, 6), (4, 9, 2, 3), 1)

        Raises:
            ShapeError: the shape has fewer than two dims.
        """
        if len(input_shape) < 2:
            raise ShapeError("init_cache got too short a shape", at=self, got=tuple(input_shape),
                             expected="(batch..., length, features)", fix="pass the whole input's shape")  # fmt: skip
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        self.cached_key = make(Cache, initializers.zeros, shape, dtype)
        self.cached_value = make(Cache, initializers.zeros, shape, dtype)
        self.cache_index = make(Cache, initializers.zeros, (), jnp.int32)

    def set_view(self, deterministic: bool | None = None, decode: bool | None = None,
                 batch_size: int | tuple[int, ...] | None = None, max_length: int | None = None) -> None:  # fmt: skip
        """The options of this layer for `nnx.view`.

        Args:
            deterministic: no dropout: evaluation.
            decode: one position per call, with a cache.
            batch_size: with max_length, makes an empty cache for this batch.
            max_length: with batch_size, how many positions the cache holds.

        Raises:
            ArgumentError: only one of `batch_size` and `max_length` is given.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if (batch_size is None) != (max_length is None):
            raise ArgumentError("A cache needs both its batch size and its length", at=self,
                                got=f"batch_size={batch_size}, max_length={max_length}", fix="give both")  # fmt: skip
        if batch_size is not None and max_length is not None:
            batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
            self.init_cache((*batch, max_length, self.in_features), self.dtype or self.param_dtype)


def _check_keys(layer: MultiHeadAttention, inputs_k: Array, inputs_v: Array) -> None:
    if getattr(layer, "is_functional", False):
        return  # its projections take their sizes from the inputs, each from its own
    for inputs in (inputs_k, inputs_v):
        check_last_dim(layer, inputs, layer.in_kv_features, "in_kv_features")


def _dropout_key(layer: MultiHeadAttention, rngs: Any) -> Array:
    if getattr(layer, "is_functional", False):
        return rngs  # its stream is one key
    rngs = layer.rngs if rngs is None else rngs
    if rngs is None:
        raise RngError("'rngs' must be provided to __call__ of a MultiHeadAttention with keep_rngs=False", at=layer,
                       fix="pass rngs=nnx.Rngs(dropout=0) to the call, or deterministic=True")  # fmt: skip
    if isinstance(rngs, Rngs):
        return rngs["dropout"]()
    if isinstance(rngs, RngStream):
        return rngs()
    raise RngTypeError("rngs must be a Rngs or RngStream for MultiHeadAttention", at=layer,
                       got=type(rngs).__name__, fix="pass nnx.Rngs(dropout=0)")  # fmt: skip


def _remembered(
    layer: MultiHeadAttention, q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Writes one position into the cache; gives all keys and values, and the mask of those that are written."""
    if layer.cached_key is None or layer.cached_value is None or layer.cache_index is None:
        raise ArgumentError("Autoregressive cache not initialized, call `init_cache` first", at=layer,
                            fix="call init_cache((batch, length, features)), or pass decode=False")  # fmt: skip
    *batch, length, heads, depth = layer.cached_key.shape
    if k.shape != v.shape or k.shape != (*batch, 1, heads, depth) or q.shape[:-2] != (*batch, 1):
        raise ShapeError("Autoregressive cache shape error: decoding takes one position per call", at=layer,
                         got=f"{k.shape[:-2]} as (batch..., length)", expected=(*batch, 1),
                         fix="pass one position, or call init_cache for the new batch")  # fmt: skip
    index = layer.cache_index[...]
    for cache, new in ((layer.cached_key, k), (layer.cached_value, v)):
        cache[...] = lax.dynamic_update_slice_in_dim(cache[...], new.astype(cache.dtype), index, len(batch))
    layer.cache_index[...] = index + 1
    seen = jnp.broadcast_to(jnp.arange(length) <= index, (*batch, 1, 1, length))
    mask = combine_masks(with_rank(mask, seen.ndim), seen, dtype=bool)
    return layer.cached_key[...], layer.cached_value[...], mask
