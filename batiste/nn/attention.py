# SPDX-License-Identifier: Apache-2.0
"""Attention: each query takes a weighted mean of the values, the weights from its products with the keys.

Dims:  B… batch   T queries   S keys and values   H heads of queries   K heads of keys   D depth of a head

How the formula is spelled, and why (against `jax.nn.dot_product_attention`, forward and backward on a CPU: a quarter to
0.4 of the time, half the memory):
  - The heads come before the positions, so that both products are plain batched matrix products.
  - The queries are scaled, not their products with the keys, which then go into the exponential as they are.
  - The softmax is never formed. The exponentials are multiplied with the values, and the result, T × D instead of
    T × S, is divided by their sums.
  - A causal mask is not laid over all S keys: the queries are cut into a few blocks of rows, and each block meets only
    the keys that come before its end.
All of it is differentiated by JAX: there is no rule of its own, so forward mode and higher derivatives work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.graph import Cache, Intermediate, Module, Rngs, RngStream, data, make
from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.precision import promote_dtype

from . import initializers
from .checks import check_last_dim, check_sizes, decided
from .initializers import Initializer
from .linear import NO_METADATA, LinearGeneral, default_bias_init, default_kernel_init
from .norm import LayerNorm
from .stochastic import RngTypeError, forked_stream

ROWS_OF_A_BLOCK = 128  # the fewest queries for which a block of its own pays
BLOCKS = 4  # 5/8 of all products; more blocks save little and are compiled one by one


# ---------------------------------------------------------------- the formula
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
) -> Array:
    """y[B…, T, H, D'] = softmax_S(query[B…, T, H, D] · key[B…, S, K, D] / √D + bias, where mask) · value[B…, S, K, D']

    Each of the K heads of keys serves H / K heads of queries. No T × S array that is not needed is formed; see the top
    of the file.

    Args:
        bias: is added before the softmax; broadcasts to (B…, H, T, S).
        mask: entries that are False (or 0) get no weight; broadcasts to (B…, H, T, S).
        broadcast_dropout: one draw of dropout for all of the batch and all heads.
        dropout_rng: the key that dropout of the weights is drawn from.
        dtype: what the inputs are cast to; None takes what they promote to. Sums are at least float32.
        module: a module that records the weights, before dropout, as an `Intermediate` named `attention_weights`.
        is_causal: query t sees the keys 0 … t.

    Raises:
        ShapeError: the inputs do not fit together.
        RngError: dropout is on, and there is no key.

    >>> x = jnp.ones((2, 5, 4, 3))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (2, 5, 4, 3)

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1; Ainslie et al. 2023, "GQA", section 2.2;
        Dao et al. 2022, "FlashAttention", section 3.1 (for the division after the product).
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    _check_shapes(module, query, key, value)
    keep = _kept(module, query, key, broadcast_dropout, dropout_rng, 0.0 if deterministic else dropout_rate)
    q, k, v = (jnp.swapaxes(x, -2, -3) for x in (query, key, value))
    bias, mask = _of_rank(bias, q.ndim), _of_rank(mask, q.ndim)
    attend = functools.partial(_attend, precision=precision, module=module)
    blocks = _blocks(query, key) if is_causal and mask is None and module is None else 1
    if blocks == 1:
        y = attend(q, k, v, bias, _with_causal(mask, is_causal, q, k), keep)
    else:
        y = jnp.concatenate([_attend_block(attend, q, k, v, bias, keep, i, blocks) for i in range(blocks)], axis=-2)
    return jnp.swapaxes(y, -2, -3)


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
) -> Array:
    """w[B…, H, T, S] = softmax_S(query[B…, T, H, D] · key[B…, S, K, D] / √D + bias, where mask)

    The arguments are those of `dot_product_attention`.

    Raises:
        ShapeError: the inputs do not fit together.
        RngError: dropout is on, and there is no key.

    >>> x = jnp.ones((2, 5, 4, 3))
    >>> dot_product_attention_weights(x, x).shape
    (2, 4, 5, 5)

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    query, key = promote_dtype((query, key), dtype=dtype)
    _check_shapes(module, query, key, key)
    keep = _kept(module, query, key, broadcast_dropout, dropout_rng, 0.0 if deterministic else dropout_rate)
    q, k = jnp.swapaxes(query, -2, -3), jnp.swapaxes(key, -2, -3)
    mask = _with_causal(_of_rank(mask, q.ndim), is_causal, q, k)
    e, total = _exponentials(q, k, _of_rank(bias, q.ndim), mask, precision)
    weights = _recorded(module, e / total, query.dtype)
    return weights if keep is None else weights * keep.astype(weights.dtype)


def _attend(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, keep: Array | None, *,
            precision: lax.PrecisionLike, module: Module | None) -> Array:  # fmt: skip
    """The formula, heads before positions: q[B…, H, T, D], k[B…, K, S, D], v[B…, K, S, D'] -> [B…, H, T, D']."""
    e, total = _exponentials(q, k, bias, mask, precision)
    if module is not None:
        _recorded(module, e / total, q.dtype)
    if keep is not None:
        e = e * keep
    y = _product(_grouped(e.astype(v.dtype), k), v, v.ndim - 2, e.dtype, precision)
    return (y.reshape(*e.shape[:-1], v.shape[-1]) / total).astype(q.dtype)


def _exponentials(q: Array, k: Array, bias: Array | None, mask: Array | None,
                  precision: lax.PrecisionLike) -> tuple[Array, Array]:  # fmt: skip
    """exp(logits - their maximum)[B…, H, T, S] and its sums over S; where all keys are masked the weights are equal."""
    wide = jnp.promote_types(jnp.float32, q.dtype)
    q = (q.astype(wide) * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    logits = _product(_grouped(q, k), k, k.ndim - 1, wide, precision).reshape(*q.shape[:-1], k.shape[-2])
    if bias is not None:
        logits = logits + bias.astype(wide)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(-0.7 * jnp.finfo(wide).max, wide))
    e = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return e, jnp.sum(e, axis=-1, keepdims=True)


def _product(x: Array, y: Array, contracted: int, dtype: DTypeLike, precision: lax.PrecisionLike) -> Array:
    """The batched matrix product of the last dim of `x` with a dim of `y`, summed in `dtype`."""
    batch = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (contracted,)), (batch, batch))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=dtype)


def _grouped(x: Array, k: Array) -> Array:
    """[B…, H, T, ·] -> [B…, K, H/K T, ·]: the heads that share one head of keys become rows of one product."""
    heads = k.shape[-3]
    return x if x.shape[-3] == heads else x.reshape(*x.shape[:-3], heads, -1, x.shape[-1])


# ---------------------------------------------------------------- masks, blocks, dropout
def _of_rank(x: Any, ndim: int) -> Array | None:
    return None if x is None else jnp.reshape(x, (1,) * (ndim - jnp.ndim(x)) + jnp.shape(x))


def _with_causal(mask: Array | None, is_causal: bool, q: Array, k: Array, start: int = 0) -> Array | None:
    """The mask as booleans, with the causal one for queries from position `start` on."""
    if mask is not None:
        mask = mask if mask.dtype == bool else mask != 0
    if not is_causal:
        return mask
    causal = jnp.arange(start, start + q.shape[-2])[:, None] >= jnp.arange(k.shape[-2])[None, :]
    causal = _of_rank(causal, q.ndim)
    return causal if mask is None else mask & causal


def _blocks(query: Array, key: Array) -> int:
    """How many blocks of rows causal attention is cut into: one where cutting does not pay, or where positions are sharded."""
    if any(_is_sharded(x, -3) for x in (query, key)):
        return 1
    return max(1, min(BLOCKS, query.shape[-3] // ROWS_OF_A_BLOCK))


def _is_sharded(x: Array, dim: int) -> bool:
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)
    return bool(spec) and len(spec) == x.ndim and spec[dim] is not None


def _attend_block(attend: Callable[..., Array], q: Array, k: Array, v: Array, bias: Array | None, keep: Array | None,
                  i: int, blocks: int) -> Array:  # fmt: skip
    """Block `i` of the rows of causal attention, over the keys before its end."""
    length = q.shape[-2]
    start, stop = length * i // blocks, length * (i + 1) // blocks
    end = min(stop, k.shape[-2])

    def cut(x: Array | None) -> Array | None:
        """The part of a bias or dropout mask that this block meets; dims of size 1 stay."""
        if x is None:
            return None
        return x[..., start:stop if x.shape[-2] > 1 else None, : end if x.shape[-1] > 1 else None]

    q, k, v = q[..., start:stop, :], k[..., :end, :], v[..., :end, :]
    return attend(q, k, v, cut(bias), _with_causal(None, True, q, k, start), cut(keep))


def _kept(module: Any, query: Array, key: Array, broadcast: bool, rng: Array | None, rate: float) -> Array | None:
    """m / (1 - rate), m drawn from Bernoulli(1 - rate), which broadcasts to (B…, H, T, S); None without dropout."""
    if rate == 0:
        return None
    if rng is None:
        raise RngError("Attention has to drop weights, but there is no key to draw them from", at=module,
                       got=f"dropout_rate={rate} and dropout_rng=None",
                       fix="pass dropout_rng=jax.random.key(0), or deterministic=True")  # fmt: skip
    *batch, length, heads, _ = query.shape
    outer = (1,) * (len(batch) + 1) if broadcast else (*batch, heads)
    kept = jax.random.bernoulli(rng, 1 - rate, (*outer, length, key.shape[-3]))
    return kept.astype(jnp.promote_types(jnp.float32, query.dtype)) / (1 - rate)


def _recorded(module: Module | None, weights: Array, dtype: DTypeLike) -> Array:
    weights = weights.astype(dtype)
    if module is not None:
        module.sow(Intermediate, "attention_weights", weights)
    return weights


def _check_shapes(module: Any, query: Array, key: Array, value: Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"

    def check(fits: bool, problem: str, expected: str, fix: str) -> None:
        if not fits:
            raise ShapeError(f"Attention: {problem}", at=module, got=shapes, expected=expected, fix=fix)

    check(query.ndim == key.ndim == value.ndim >= 3, "q, k, v must have same rank",
          "(batch..., length, heads, depth) of each", "add the missing dims")  # fmt: skip
    check(query.shape[:-3] == key.shape[:-3] == value.shape[:-3], "q, k, v batch dims must match",
          f"batch dims {query.shape[:-3]}", "broadcast the inputs to one batch shape")  # fmt: skip
    check(key.shape[-3] == value.shape[-3], "k, v lengths must match", "as many values as keys",
          "take key and value from the same positions")  # fmt: skip
    check(key.shape[-2] == value.shape[-2], "k, v must have the same number of heads", f"{key.shape[-2]} heads of values",
          "project key and value to the same number of heads")  # fmt: skip
    check(key.shape[-2] > 0 and query.shape[-2] % key.shape[-2] == 0,
          "the number of query heads must be a multiple of the number of key heads", "heads of keys that divide those of queries",
          "choose num_kv_heads among the divisors of num_heads")  # fmt: skip
    check(query.shape[-1] == key.shape[-1], "q, k depths must match", f"keys of depth {query.shape[-1]}",
          "project query and key to the same depth")  # fmt: skip


def make_attention_mask(query_input: Array, key_input: Array, pairwise_fn: Callable[..., Any] = jnp.multiply,
                        extra_batch_dims: int = 0, dtype: DTypeLike = jnp.float32) -> Array:  # fmt: skip
    """mask[1…, B…, 1, T, S] = pairwise_fn(query_input[B…, T], key_input[B…, S])

    Args:
        pairwise_fn: of two broadcast arrays; the product of two padding masks is the mask of both.
        extra_batch_dims: how many dims of size 1 are put in front.

    >>> make_attention_mask(jnp.array([1, 1, 0]), jnp.array([1, 0])).tolist()
    [[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]
    """
    mask = pairwise_fn(jnp.expand_dims(query_input, -1), jnp.expand_dims(key_input, -2))
    mask = jnp.expand_dims(mask, (*range(extra_batch_dims), mask.ndim - 2 + extra_batch_dims))
    return mask.astype(dtype)


def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: DTypeLike = jnp.float32) -> Array:
    """mask[1…, B…, 1, T, T] = t ≥ s for x[B…, T]

    `is_causal=True` gives the same attention in less time.

    >>> make_causal_mask(jnp.ones(3)).tolist()
    [[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]]
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: Array | None, dtype: DTypeLike = jnp.float32) -> Array | None:
    """The logical and of the masks that are not None; None where all are.

    Raises:
        ShapeError: their ranks differ.

    >>> combine_masks(jnp.array([1, 1, 0]), None, jnp.array([0, 1, 1])).tolist()
    [0.0, 1.0, 0.0]
    """
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    if len({mask.ndim for mask in given}) > 1:
        raise ShapeError("masks must have same rank", got=", ".join(str(mask.shape) for mask in given),
                         fix="add dims of size 1")  # fmt: skip
    return functools.reduce(jnp.logical_and, given).astype(dtype)


# ---------------------------------------------------------------- the layer
class MultiHeadAttention(Module):
    """y[B…, T, out] = attention(x_q W_q, x_k W_k, x_v W_v) W_o, in `num_heads` heads of depth qkv_features / num_heads

    Args:
        in_features, in_kv_features: last dim of the queries' input, and of the keys' and values' (None: the same).
        qkv_features, out_features: of all heads together, and of the result; None takes `in_features`.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; None takes `num_heads`.
        dtype: what is computed in; None takes what the inputs and the parameters promote to.
        broadcast_dropout, dropout_rate: of the attention weights; see `dot_product_attention`.
        deterministic: no dropout. `train()`, `eval()` and `view` switch it.
        out_kernel_init, out_bias_init, out_kernel_metadata, out_bias_metadata: of the last projection, where they are to
            differ from `kernel_init` and so on.
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

        common = dict(dtype=dtype, param_dtype=param_dtype, precision=precision, use_bias=use_bias, rngs=rngs)
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
        self.rngs = data(forked_stream(self, rngs, "dropout") if keep_rngs and dropout_rate > 0 else None)
        self.cached_key = data(None)
        self.cached_value = data(None)
        self.cache_index = data(None)

    def _check_sizes(self) -> None:
        check_sizes(self, num_heads=self.num_heads, in_features=self.in_features, qkv_features=self.qkv_features,
                    out_features=self.out_features, num_kv_heads=self.num_kv_heads, in_kv_features=self.in_kv_features)  # fmt: skip
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
        inputs_q, inputs_k, inputs_v: [B…, T, in], [B…, S, in_kv] and [B…, S, in_kv]; keys default to the queries' input,
            values to the keys'.
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
            raise ShapeError(f"Incompatible input dimension: {type(self).__name__} got wrong queries", at=self,
                             got=jnp.shape(inputs_q), expected=f"(..., length, {self.in_features})",
                             fix="build it with in_features equal to the last dim of the input")  # fmt: skip
        for inputs in (inputs_k, inputs_v):
            check_last_dim(self, inputs, self.in_kv_features, "in_kv_features")

        q = self.query(inputs_q, out_sharding=qkv_sharding)
        k = self.key(inputs_k, out_sharding=qkv_sharding)
        v = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        if decided(self, "decode", decode, self.decode):
            k, v, mask = self._remembered(q, k, v, mask)
            is_causal = False  # the mask of the cache says what has been seen

        drop = self.dropout_rate > 0 and not decided(self, "deterministic", deterministic, self.deterministic)
        y = self.attention_fn(
            q,
            k,
            v,
            mask=mask,
            dropout_rng=self._dropout_key(rngs) if drop else None,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=not drop,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal,
        )
        return self.out(y, out_sharding=out_sharding)

    def _dropout_key(self, rngs: Any) -> Array:
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise RngError("'rngs' must be provided to __call__ of a MultiHeadAttention that was built with keep_rngs=False",
                           at=self, fix="pass rngs=nnx.Rngs(dropout=0) to the call, or deterministic=True")  # fmt: skip
        if isinstance(rngs, Rngs):
            return rngs["dropout"]()
        if isinstance(rngs, RngStream):
            return rngs()
        raise RngTypeError("rngs must be a Rngs or RngStream for MultiHeadAttention", at=self, got=repr(type(rngs).__name__),
                           fix="pass nnx.Rngs(dropout=0)")  # fmt: skip

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
                             expected="(batch..., length, features)", fix="pass the shape of the whole input")  # fmt: skip
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        self.cached_key = make(Cache, initializers.zeros, shape, dtype)
        self.cached_value = make(Cache, initializers.zeros, shape, dtype)
        self.cache_index = make(Cache, initializers.zeros, (), jnp.int32)

    def _remembered(self, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
        """Writes one position into the cache; gives all keys and values, and the mask of those that have been written."""
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ArgumentError("Autoregressive cache not initialized, call `init_cache` first", at=self,
                                fix="call init_cache((batch, longest length, features)), or pass decode=False")  # fmt: skip
        *batch, length, heads, depth = self.cached_key.shape
        if k.shape != v.shape or k.shape != (*batch, 1, heads, depth) or q.shape[:-2] != (*batch, 1):
            raise ShapeError("Autoregressive cache shape error: decoding takes one position of the batch per call", at=self,
                             got=f"{k.shape[:-2]} as (batch..., length)", expected=(*batch, 1),
                             fix="pass one position, or call init_cache for the new batch shape")  # fmt: skip
        index = self.cache_index[...]
        for cache, new in ((self.cached_key, k), (self.cached_value, v)):
            cache[...] = lax.dynamic_update_slice_in_dim(cache[...], new.astype(cache.dtype), index, len(batch))
        self.cache_index[...] = index + 1
        seen = jnp.broadcast_to(jnp.arange(length) <= index, (*batch, 1, 1, length))
        mask = combine_masks(_of_rank(mask, seen.ndim), seen, dtype=bool)
        return self.cached_key[...], self.cached_value[...], mask

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
