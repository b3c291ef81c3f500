# SPDX-License-Identifier: Apache-2.0
"""The attention formula and its masks: each query takes a mean of the values, weighted by its products with the keys.

Dims:  B… batch   T queries   S keys and values   H heads of queries   K heads of keys   D depth of a head

How the formula is spelled, and why (against `jax.nn.dot_product_attention`, forward and backward on a CPU: a quarter to
0.4 of the time, half the memory):
  - The heads come before the positions, so that both products are plain batched matrix products.
  - The queries are scaled, not their products with the keys, which then go into the exponential as they are.
  - The softmax is never formed. The exponentials are multiplied with the values, and the result, T × D instead of
    T × S, is divided by their sums.
  - A causal mask is not laid over all S keys: the queries are cut into a few blocks of rows, and each block meets only
    the keys that come before its end.
All of it is differentiated by JAX, in forward mode and to any order; a rule says only that the derivatives of products
of narrow numbers are such products too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from batiste.graph import Intermediate, Module
from batiste.graph.errors import RngError, ShapeError
from batiste.precision import promote_dtype

ROWS_OF_A_BLOCK = 128  # the fewest queries for which a block of its own pays
BLOCKS = 4  # 5/8 of all products; more blocks save little and are compiled one by one


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
    check_shapes(module, query, key, value)
    keep = _kept(module, query, key, broadcast_dropout, dropout_rng, 0.0 if deterministic else dropout_rate)
    q, k, v = (jnp.swapaxes(x, -2, -3) for x in (query, key, value))
    bias, mask = with_rank(bias, q.ndim), with_rank(mask, q.ndim)
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
    rate = 0.0 if deterministic else dropout_rate
    multiply = functools.partial(_multiplied, precision=precision)
    return weights_by(multiply, query, key, bias, mask, broadcast_dropout, dropout_rng, rate, module, is_causal)


Multiply = Callable[[Array, Array], Array]


def weights_by(
    multiply: Multiply,
    query: Array,
    key: Array,
    bias: Array | None,
    mask: Array | None,
    broadcast_dropout: bool,
    dropout_rng: Array | None,
    dropout_rate: float,
    module: Any = None,
    is_causal: bool = False,
    dtype: DTypeLike | None = None,
) -> Array:
    """`dot_product_attention_weights` with products of queries and keys by `multiply`: [B…, H, T, D], [B…, K, S, D] ->
    [B…, H, T, S]

    Args:
        dtype: of the weights; None takes that of the queries.
    """
    check_shapes(module, query, key, key)
    keep = _kept(module, query, key, broadcast_dropout, dropout_rng, dropout_rate)
    q, k = jnp.swapaxes(query, -2, -3), jnp.swapaxes(key, -2, -3)
    mask = _with_causal(with_rank(mask, q.ndim), is_causal, q, k)
    e, total = _exponentials(q, k, with_rank(bias, q.ndim), mask, multiply)
    weights = _recorded(module, e / total, query.dtype if dtype is None else dtype)
    return weights if keep is None else weights * keep.astype(weights.dtype)


def _attend(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, keep: Array | None, *,
            precision: lax.PrecisionLike, module: Module | None) -> Array:  # fmt: skip
    """The formula, heads before positions: q[B…, H, T, D], k[B…, K, S, D], v[B…, K, S, D'] -> [B…, H, T, D']."""
    if _is_sharded(q, -3):  # a sharded dim of heads cannot be cut into groups
        k, v = _repeated(k, q), _repeated(v, q)
    e, total = _exponentials(q, k, bias, mask, functools.partial(_multiplied, precision=precision))
    if module is not None:
        _recorded(module, e / total, q.dtype)
    if keep is not None:
        e = e * keep
    y = _product(_grouped(e.astype(v.dtype), k), v, v.ndim - 2, e.dtype, precision)
    return (y.reshape(*e.shape[:-1], v.shape[-1]) / total).astype(q.dtype)


def _exponentials(q: Array, k: Array, bias: Array | None, mask: Array | None,
                  multiply: Multiply) -> tuple[Array, Array]:  # fmt: skip
    """exp(logits - their maximum)[B…, H, T, S] and its sums over S; where all keys are masked the weights are equal."""
    wide = jnp.promote_types(jnp.float32, q.dtype)
    q = (q.astype(wide) * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    logits = multiply(q, k).astype(wide)
    if bias is not None:
        logits = logits + bias.astype(wide)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(-0.7 * jnp.finfo(wide).max, wide))
    e = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return e, jnp.sum(e, axis=-1, keepdims=True)


def _multiplied(q: Array, k: Array, precision: lax.PrecisionLike) -> Array:
    """[B…, H, T, D], [B…, K, S, D] -> [B…, H, T, S], at least in float32"""
    wide = jnp.promote_types(jnp.float32, q.dtype)
    return _product(_grouped(q, k), k, k.ndim - 1, wide, precision).reshape(*q.shape[:-1], k.shape[-2])


def _product(x: Array, y: Array, contracted: int, dtype: DTypeLike, precision: lax.PrecisionLike) -> Array:
    """The batched matrix product of the last dim of `x` with a dim of `y`, summed in `dtype`."""
    product = _plain_product if x.dtype == dtype else _widened_product
    return product(x, y, contracted, dtype, precision)


def _plain_product(x: Array, y: Array, contracted: int, dtype: DTypeLike, precision: lax.PrecisionLike) -> Array:
    batch = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (contracted,)), (batch, batch))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=dtype)


_widened_product = jax.custom_jvp(_plain_product, nondiff_argnums=(2, 3, 4))


@_widened_product.defjvp
def _(contracted: int, dtype: DTypeLike, precision: lax.PrecisionLike, primals: tuple[Array, Array],
      tangents: tuple[Array, Array]) -> tuple[Array, Array]:  # fmt: skip
    """Its derivatives are products in the dtype of x and y, as it is: from what is wide, JAX would make mixed ones."""
    (x, y), (dx, dy) = primals, tangents
    by_x, by_y = (_plain_product(a, b, contracted, x.dtype, precision) for a, b in ((dx, y), (x, dy)))
    return _widened_product(x, y, contracted, dtype, precision), by_x.astype(dtype) + by_y.astype(dtype)


def _repeated(x: Array, q: Array) -> Array:
    """[B…, K, S, ·] -> [B…, H, S, ·], sharded as the heads of q[B…, H, T, D]."""
    heads, each = q.shape[-3], q.shape[-3] // x.shape[-3]
    if each == 1:
        return x
    spec = PartitionSpec(*jax.typeof(q).sharding.spec[:-2], *jax.typeof(x).sharding.spec[-2:])
    return jnp.repeat(x, each, axis=-3, total_repeat_length=heads, out_sharding=spec)


def _grouped(x: Array, k: Array) -> Array:
    """[B…, H, T, ·] -> [B…, K, H/K T, ·]: the heads that share one head of keys become rows of one product."""
    heads = k.shape[-3]
    return x if x.shape[-3] == heads else x.reshape(*x.shape[:-3], heads, -1, x.shape[-1])


# ---------------------------------------------------------------- masks, blocks, dropout
def with_rank(x: Any, ndim: int) -> Array | None:
    return None if x is None else jnp.reshape(x, (1,) * (ndim - jnp.ndim(x)) + jnp.shape(x))


def _with_causal(mask: Array | None, is_causal: bool, q: Array, k: Array, start: int = 0) -> Array | None:
    """The mask as booleans, with the causal one for queries from position `start` on."""
    if mask is not None:
        mask = mask if mask.dtype == bool else mask != 0
    if not is_causal:
        return mask
    causal = jnp.arange(start, start + q.shape[-2])[:, None] >= jnp.arange(k.shape[-2])[None, :]
    causal = causal.reshape((1,) * (q.ndim - 2) + causal.shape)
    return causal if mask is None else mask & causal


def _blocks(query: Array, key: Array) -> int:
    """How many blocks of rows causal attention is cut into: one where it does not pay, or positions are sharded, or
    how many there are is left open (in a program that is exported)."""
    length = query.shape[-3]
    if any(_is_sharded(x, -3) for x in (query, key)) or not isinstance(length, int):
        return 1
    return max(1, min(BLOCKS, length // ROWS_OF_A_BLOCK))


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
        rows = slice(start, stop) if x.shape[-2] > 1 else slice(None)
        return x[..., rows, : end if x.shape[-1] > 1 else None]

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


def check_shapes(module: Any, query: Array, key: Array, value: Array) -> None:
    """Raises a ShapeError unless queries, keys and values fit together."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"

    def check(fits: bool, problem: str, expected: str, fix: str) -> None:
        if not fits:
            raise ShapeError(f"Attention: {problem}", at=module, got=shapes, expected=expected, fix=fix)

    check(query.ndim == key.ndim == value.ndim >= 3, "q, k, v must have same rank",
          "(batch..., length, heads, depth) of each", "add the missing dims")  # fmt: skip
    check(query.shape[:-3] == key.shape[:-3] == value.shape[:-3], "q, k, v batch dims must match",
          f"batch dims {query.shape[:-3]}", "broadcast the inputs to one batch shape")  # fmt: skip
    check(key.shape[-3] == value.shape[-3], "k, v lengths must match",
          "as many values as keys", "take key and value from the same positions")  # fmt: skip
    check(key.shape[-2] == value.shape[-2], "k, v must have the same number of heads",
          f"{key.shape[-2]} heads of values", "project key and value to the same number of heads")  # fmt: skip
    check(key.shape[-2] > 0 and query.shape[-2] % key.shape[-2] == 0, "query heads must be a multiple of key heads",
          f"a divisor of {query.shape[-2]} as heads of keys", "choose num_kv_heads so")  # fmt: skip
    check(query.shape[-1] == key.shape[-1], "q, k depths must match",
          f"keys of depth {query.shape[-1]}", "project query and key to the same depth")  # fmt: skip


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
