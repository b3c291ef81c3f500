# SPDX-License-Identifier: Apache-2.0
"""Attention over positions that are divided over devices: each keeps its queries, the keys and values travel.

Dims:  B… batch   T queries   S keys and values   H heads of queries   K heads of keys   G = H / K   D depth of a head

Ring: in each of n steps a device meets one block of keys and values and passes it on to its neighbour; the softmax is
kept as a running maximum, sum and weighted mean, which later blocks rescale. Gather: every device fetches all keys and
values at once. The ring holds 1/n of them at a time and can send while it computes.
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

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.placement import current_mesh

from .plan import current_plan
from .rules import mesh_axes, to_spec

Running = tuple[Array, Array, Array]


def ring_attention(query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None,
                   *, axis: str = "sequence", **options: Any) -> Array:  # fmt: skip
    """y[B…, T, H, D] = softmax_S(query · key / √D + bias, where mask) · value, T and S divided over a mesh axis

    Takes the place of `dot_product_attention`: `MultiHeadAttention(..., attention_fn=ring_attention)`. Where the mesh
    in context has no such axis, it is computed in one block.

    Args:
        bias, mask: broadcast to (B…, H, T, S); their queries are divided, their keys are not.
        options: those of `dot_product_attention`, but dropout and `module` are refused.

    Raises:
        ArgumentError: dropout of the weights, or `module`, is asked for.
        ShapeError: the positions cannot be divided.

    >>> x = jnp.ones((2, 6, 4, 3))
    >>> ring_attention(x, x, x, is_causal=True).shape
    (2, 6, 4, 3)

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3.
    """
    return _divided(_ring, axis, query, key, value, bias, mask, **options)


def gather_attention(query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None,
                     *, axis: str = "sequence", **options: Any) -> Array:  # fmt: skip
    """The same as `ring_attention`, all keys and values fetched at once.

    >>> x = jnp.ones((2, 6, 4, 3))
    >>> gather_attention(x, x, x).shape
    (2, 6, 4, 3)
    """
    return _divided(_gathered, axis, query, key, value, bias, mask, **options)


def _divided(attend: Callable[..., Array], axis: str, query: Array, key: Array, value: Array, bias: Array | None,
             mask: Array | None, *, dropout_rate: float = 0.0, deterministic: bool = False, dropout_rng: Any = None,
             broadcast_dropout: bool = True, dtype: DTypeLike | None = None, precision: lax.PrecisionLike = None,
             module: Any = None, promote_dtype: Callable[..., Any] | None = None,
             is_causal: bool = False) -> Array:  # fmt: skip
    if (dropout_rate > 0 and not deterministic) or module is not None:
        raise ArgumentError("attention over divided positions has no weights to drop or to record",
                            fix="set dropout_rate=0 and sow_weights=False")  # fmt: skip
    if promote_dtype is None:
        kind = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (x.astype(kind) for x in (query, key, value))
    else:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    mesh = current_mesh()
    parts = mesh.shape.get(axis, 1) if not mesh.empty else 1
    for name, x in (("query", query), ("key", key)):
        if x.shape[-3] % parts:
            raise ShapeError(f"the positions of {name} cannot be divided over the {parts} devices of {axis}",
                             got=x.shape, expected=f"a multiple of {parts}", fix="pad the sequence")  # fmt: skip
    run = functools.partial(attend, parts=parts, axis=axis, causal=is_causal, precision=precision)
    if parts == 1:
        return run(query, key, value, bias, mask)
    batch, heads = _other_axes(query, key)
    inputs = to_spec([batch, *[()] * (query.ndim - 4), (axis,), heads] if query.ndim > 3 else [(axis,), heads])
    extra = [_place(x, [batch, *[()] * (query.ndim - 4), heads, (axis,), ()]) for x in (bias, mask)]
    specs = (inputs, inputs, inputs, *extra)
    names = frozenset({axis, *batch, *heads})
    return _compiled(mesh, names, axis, attend, parts, is_causal, precision, specs)(query, key, value, bias, mask)


@functools.cache
def _compiled(mesh: Any, names: frozenset[str], axis: str, attend: Callable[..., Array], parts: int, causal: bool,
              precision: Any, specs: tuple) -> Callable[..., Array]:  # fmt: skip
    run = functools.partial(attend, parts=parts, axis=axis, causal=causal, precision=precision)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], axis_names=set(names)))


def _other_axes(query: Array, key: Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of the batch and of the heads by the plan in use, where they divide them.

    These too are handled by hand, for the compiler would gather them before it gathers the positions.
    """
    plan = current_plan()
    if plan is None:
        return (), ()
    batch, heads = (mesh_axes(n, plan.names, plan.sizes, "", "") if n in plan.names else () for n in ("batch", "heads"))
    parts = [math.prod(plan.sizes[a] for a in axes) for axes in (batch, heads)]
    divides = query.ndim > 3 and query.shape[0] % parts[0] == 0, key.shape[-2] % parts[1] == 0
    return batch if divides[0] else (), heads if divides[1] else ()


def _place(x: Array | None, axes: list[tuple[str, ...]]) -> PartitionSpec:
    """The place of a bias or mask, which lacks leading dims or has ones where it is the same for all."""
    if x is None:
        return PartitionSpec()
    return to_spec([dim if size > 1 else () for size, dim in zip(x.shape, axes[len(axes) - x.ndim :])])


# ---------------------------------------------------------------- one device's part
def _ring(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, *, parts: int, axis: str, causal: bool,
          precision: lax.PrecisionLike) -> Array:  # fmt: skip
    me = lax.axis_index(axis) if parts > 1 else 0
    block = jax.checkpoint(functools.partial(_block, causal=causal, precision=precision))
    to_next = [(i, (i + 1) % parts) for i in range(parts)]

    def step(carry: tuple[Running, Array, Array], i: Array) -> tuple[tuple[Running, Array, Array], None]:
        running, k, v = carry
        k, v = (lax.ppermute(x, axis, to_next) for x in (k, v))
        return (_merged(running, block(q, k, v, bias, mask, me, (me - i) % parts)), k, v), None

    running = block(q, k, v, bias, mask, me, me)
    if parts > 1:
        (running, _, _), _ = lax.scan(step, (running, k, v), jnp.arange(1, parts))
    return _finished(running, q, v)


def _gathered(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, *, parts: int, axis: str,
              causal: bool, precision: lax.PrecisionLike) -> Array:  # fmt: skip
    me = lax.axis_index(axis) if parts > 1 else 0
    if parts > 1:
        k, v = (lax.all_gather(x, axis, axis=x.ndim - 3, tiled=True) for x in (k, v))
    block = jax.checkpoint(functools.partial(_block, causal=causal, precision=precision))
    return _finished(block(q, k, v, bias, mask, me, 0), q, v)


def _block(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, row: Any, column: Any, *, causal: bool,
           precision: lax.PrecisionLike) -> Running:  # fmt: skip
    """Maximum, sum and weighted sum of the values over the `column`-th block of keys, for the `row`-th queries."""
    wide = jnp.promote_types(jnp.float32, q.dtype)
    t, s, kv = q.shape[-3], k.shape[-3], k.shape[-2]
    q = (q.astype(wide) / math.sqrt(q.shape[-1])).astype(q.dtype).reshape(*q.shape[:-2], kv, -1, q.shape[-1])
    logits = jnp.einsum("...tkgd,...skd->...kgts", q, k, precision=precision, preferred_element_type=wide)
    lowest = jnp.finfo(wide).min
    if bias is not None:
        logits = logits + _part(bias, s, column, kv, logits.ndim).astype(wide)
    if mask is not None:
        logits = jnp.where(_part(mask, s, column, kv, logits.ndim), logits, lowest)
    if causal:
        rows, columns = row * t + jnp.arange(t), column * s + jnp.arange(s)
        seen = rows[:, None] >= columns[None, :]
        logits = jnp.where(seen.reshape((1,) * (logits.ndim - 2) + seen.shape), logits, lowest)
    highest = lax.stop_gradient(jnp.max(logits, axis=-1))
    e = jnp.exp(logits - highest[..., None])
    mean = jnp.einsum("...kgts,...skd->...kgtd", e.astype(v.dtype), v, precision=precision, preferred_element_type=wide)
    return highest, jnp.sum(e, axis=-1), mean


def _part(x: Array, size: int, column: Any, kv: int, ndim: int) -> Array:
    """The columns of a bias or mask (…, H, T, S) that belong to a block of keys, as (…, K, G, T, S)."""
    x = x.reshape((1,) * (ndim - 1 - x.ndim) + x.shape)
    if x.shape[-1] > 1:
        x = lax.dynamic_slice_in_dim(x, column * size, size, axis=-1)
    heads = (1, 1) if x.shape[-3] == 1 else (kv, x.shape[-3] // kv)
    return x.reshape(*x.shape[:-3], *heads, *x.shape[-2:])


def _merged(a: Running, b: Running) -> Running:
    highest = jnp.maximum(a[0], b[0])
    wa, wb = jnp.exp(a[0] - highest), jnp.exp(b[0] - highest)
    return highest, a[1] * wa + b[1] * wb, a[2] * wa[..., None] + b[2] * wb[..., None]


def _finished(running: Running, q: Array, v: Array) -> Array:
    _, total, y = running
    y = jnp.moveaxis(y / total[..., None], -2, -4)  # (…, K, G, T, D) -> (…, T, K, G, D)
    return y.reshape(*q.shape[:-1], v.shape[-1]).astype(q.dtype)
