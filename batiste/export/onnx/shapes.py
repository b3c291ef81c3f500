# SPDX-License-Identifier: Apache-2.0
"""Operations of JAX that move elements, and those that look them up, in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .graph import BOOL, Graph, drawn, dtypes, lying, rule
from .scattered import gathered

END = np.iinfo(np.int64).max


@rule("reshape")
def reshape(graph: Graph, eqn: Any, x: str) -> str:
    return graph.reshape(x, drawn(eqn.outvars[0].aval))


@rule("squeeze", "expand_dims")
def squeeze(graph: Graph, eqn: Any, x: str) -> str:
    return graph.reshape(x, drawn(eqn.outvars[0].aval))


@rule("transpose")
def transpose(graph: Graph, eqn: Any, x: str) -> str:
    return graph.transpose(x, eqn.params["permutation"])


@rule("broadcast_in_dim")
def broadcast_in_dim(graph: Graph, eqn: Any, x: str, *sizes: str) -> str:
    shape, places, old = eqn.params["shape"], eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape
    among = [1] * len(shape)
    for place, n in zip(places, old):
        among[place] = n
    if tuple(among) != tuple(old):
        x = graph.reshape(x, among)
    return x if tuple(among) == tuple(shape) else graph.expand(x, shape)


@rule("tile")
def tile(graph: Graph, eqn: Any, x: str) -> str:
    return graph.op("Tile", x, graph.shape(eqn.params["reps"]))


@rule("concatenate")
def concatenate(graph: Graph, eqn: Any, *xs: str) -> str:
    return graph.op("Concat", *xs, axis=eqn.params["dimension"])


@rule("stack")
def stack(graph: Graph, eqn: Any, *xs: str) -> str:
    axis = eqn.params["axis"]
    return graph.op("Concat", *(graph.op("Unsqueeze", x, graph.ints(axis)) for x in xs), axis=axis)


@rule("unstack")
def unstack(graph: Graph, eqn: Any, x: str) -> list[str]:
    axis = eqn.params["axis"]
    return [graph.op("Gather", x, graph.const(np.asarray(i, np.int64)), axis=axis) for i in range(len(eqn.outvars))]


@rule("split")
def split(graph: Graph, eqn: Any, x: str) -> list[str]:
    sizes = graph.shape(eqn.params["sizes"])
    found = graph.op("Split", x, sizes, outputs=len(eqn.outvars), axis=eqn.params["axis"])
    return [found] if isinstance(found, str) else found


@rule("slice")
def sliced(graph: Graph, eqn: Any, x: str) -> str:
    shape, steps = eqn.invars[0].aval.shape, eqn.params["strides"] or (1,) * eqn.invars[0].aval.ndim
    for axis, (start, stop, step) in enumerate(zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps)):
        if (start, stop, step) != (0, shape[axis], 1):
            x = graph.cut(x, axis, start, stop, step)
    return x


@rule("rev")
def reversed_(graph: Graph, eqn: Any, x: str) -> str:
    for axis in eqn.params["dimensions"]:
        x = graph.op("Slice", x, graph.ints(-1), graph.ints(-END), graph.ints(axis), graph.ints(-1))
    return x


def starts(graph: Graph, indices: Sequence[str], avals: Sequence[Any], rooms: Sequence[Any]) -> str:
    """Where a dynamic slice begins, each start moved so that the slice is inside: int64[dims]"""
    found = []
    for index, aval, room in zip(indices, avals, rooms):
        wide = graph.reshape(graph.cast(index, np.int64) if aval.dtype != np.int64 else index, (1,))
        found.append(graph.op("Min", graph.op("Max", wide, graph.ints(0)), graph.dim(room)))
    return graph.op("Concat", *found, axis=0)


@rule("dynamic_slice")
def dynamic_slice(graph: Graph, eqn: Any, x: str, *indices: str) -> str:
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    rooms = [n - size for n, size in zip(shape, sizes)]
    start = starts(graph, indices, [v.aval for v in eqn.invars[1:]], rooms)
    stop = graph.op("Add", start, graph.shape(sizes))
    return graph.op("Slice", x, start, stop, graph.ints(*range(len(shape))))


@rule("dynamic_update_slice")
def dynamic_update_slice(graph: Graph, eqn: Any, x: str, new: str, *indices: str) -> str:
    """The new values stand at the places of the slice: a grid of all their indices, scattered."""
    shape, sizes = (v.aval.shape for v in eqn.invars[:2])
    rooms = [n - size for n, size in zip(shape, sizes)]
    start = starts(graph, indices, [v.aval for v in eqn.invars[2:]], rooms)
    places = [graph.reshape(iota(graph, sizes, axis, np.int64), (*sizes, 1)) for axis in range(len(sizes))]
    grid = graph.op("Add", graph.op("Concat", *places, axis=-1), start)
    return graph.op("ScatterND", x, grid, new)


def iota(graph: Graph, shape: Sequence[Any], axis: int, dtype: Any) -> str:
    """0, 1, … along one axis"""
    count = graph.op("Squeeze", graph.dim(shape[axis]))
    zero, one = (graph.const(np.asarray(n, np.int64)) for n in (0, 1))
    x = graph.cast(graph.op("Range", zero, count, one), dtype)
    x = graph.reshape(x, [-1 if i == axis else 1 for i in range(len(shape))])
    return graph.expand(x, shape) if len(shape) > 1 else x


@rule("iota")
def iota_(graph: Graph, eqn: Any, *sizes: str) -> str:
    shape = eqn.params["shape"]
    if all(isinstance(n, (int, np.integer)) for n in shape) and np.prod(shape, dtype=int) <= 1 << 16:
        dtype, axis = lying(eqn.params["dtype"]), eqn.params["dimension"]
        return graph.const(np.asarray(np.indices(shape)[axis], dtype))
    return iota(graph, shape, eqn.params["dimension"], lying(eqn.params["dtype"]))


@rule("dim_as_value", "dimension_as_value")
def dim_as_value(graph: Graph, eqn: Any) -> str:
    return graph.cast(graph.op("Squeeze", graph.dim(eqn.params["dim"])), eqn.outvars[0].aval.dtype)


@rule("pad")
def pad(graph: Graph, eqn: Any, x: str, value: str) -> str:
    return padded(graph, x, value, eqn.params["padding_config"], eqn.invars[0].aval.shape, dtypes(eqn)[0])


def padded(graph: Graph, x: str, value: str, config: Any, shape: Sequence[Any], dtype: Any) -> str:
    """With elements before, behind and between those of each dim; a negative number takes some away."""
    old = lying(dtype)
    if old == BOOL:
        return graph.cast(
            padded(graph, graph.cast(x, np.int32), graph.cast(value, np.int32), config, shape, np.int32), bool
        )
    shape = list(shape)
    for axis, (_, _, between) in enumerate(config):
        if between:  # [n, 1] is padded to [n, 1 + between], flattened, and the last ones are cut off
            x = graph.reshape(x, [*shape[: axis + 1], 1, *shape[axis + 1 :]])
            widths = [0] * (2 * len(shape) + 2)
            widths[len(shape) + 1 + axis + 1] = between
            x = graph.op("Pad", x, graph.ints(*widths), value)
            shape[axis] = shape[axis] * (between + 1)
            x = graph.reshape(x, shape)
            x = graph.cut(x, axis, 0, shape[axis] - between)
            shape[axis] = shape[axis] - between
    before, behind = ([max(0, pair[i]) for pair in config] for i in (0, 1))
    if any(before) or any(behind):
        x = graph.op("Pad", x, graph.ints(*before, *behind), value)
    for axis, (low, high, _) in enumerate(config):
        if low < 0 or high < 0:
            x = graph.cut(x, axis, max(0, -low), END if high >= 0 else high)
    return x


# ---------------------------------------------------------------- looking up


@rule("gather")
def gather(graph: Graph, eqn: Any, x: str, indices: str) -> str:
    """Whole slices along some dims, chosen by indices along the others: GatherND of the operand with those in front."""
    dims, sizes, mode = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.params["mode"]
    operand, where = (v.aval for v in eqn.invars)
    if where.ndim == 1:
        return one_slice(graph, eqn, x, indices)
    batching = list(dims.operand_batching_dims)
    looked = list(dims.start_index_map)
    rest = [i for i in range(operand.ndim) if i not in looked and i not in batching]
    whole = all(sizes[i] == operand.shape[i] for i in rest)
    if not whole or any(sizes[i] != 1 for i in looked) or not set(dims.collapsed_slice_dims) <= set(looked):
        filler = _filler(eqn.outvars[0].aval) if mode == jax.lax.GatherScatterMode.FILL_OR_DROP else None
        return gathered(graph, eqn, x, indices, filler)
    indices = graph.cast(indices, np.int64) if where.dtype != np.int64 else indices
    limits = graph.op("Sub", graph.shape([operand.shape[i] for i in looked]), graph.ints(1))
    inside = None
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fits = graph.op(
            "And", graph.op("GreaterOrEqual", indices, graph.ints(0)), graph.op("LessOrEqual", indices, limits)
        )
        inside = graph.op("ReduceMin", graph.cast(fits, np.int32), graph.ints(-1), keepdims=0)
    indices = graph.op("Min", graph.op("Max", indices, graph.ints(0)), limits)
    # indices as [batching dims, other dims, looked]; the result as [batching dims, other dims, rest]
    front = list(dims.start_indices_batching_dims)
    others = [i for i in range(where.ndim - 1) if i not in front]
    x = graph.transpose(x, [*batching, *looked, *rest])
    order = [*front, *others]
    found = graph.op("GatherND", x, graph.transpose(indices, [*order, where.ndim - 1]), batch_dims=len(batching))
    # dims of indices in their own order, then the rest: to their places in the output
    out, kept = eqn.outvars[0].aval, [i for i in range(operand.ndim) if i not in batching]
    kept = [i for i in kept if i not in dims.collapsed_slice_dims]
    place = {("rest", i): dims.offset_dims[n] for n, i in enumerate(kept)}
    free = [i for i in range(out.ndim) if i not in dims.offset_dims]
    place.update({("index", i): free[i] for i in range(where.ndim - 1)})
    now = [("index", i) for i in order] + [("rest", i) for i in rest]
    ones = [key for key in place if key not in now]  # dims of size 1 that were looked up and kept
    shape = [out.shape[place[key]] for key in now]
    if inside is not None:
        mask = graph.reshape(graph.transpose(inside, order), [*shape[: len(order)], *([1] * len(rest))])
        empty = graph.const(np.asarray(_filler(out), lying(out.dtype)))
        found = graph.op("Where", graph.cast(mask, bool), found, empty)
    if ones:
        found = graph.reshape(found, [*shape, *([1] * len(ones))])
    now = [*now, *ones]
    return graph.transpose(found, [[place[key] for key in now].index(i) for i in range(out.ndim)])


def one_slice(graph: Graph, eqn: Any, x: str, indices: str) -> str:
    """A gather of a single slice, of whatever size."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, out = eqn.invars[0].aval, eqn.outvars[0].aval
    axes = graph.ints(*dims.start_index_map)
    wanted = graph.op("Cast", indices, to=graph.type(np.int64))
    rooms = graph.shape([operand.shape[i] - sizes[i] for i in dims.start_index_map])
    start = graph.op("Min", graph.op("Max", wanted, graph.ints(0)), rooms)
    stop = graph.op("Add", start, graph.shape([sizes[i] for i in dims.start_index_map]))
    found = graph.op("Slice", x, start, stop, axes) if dims.start_index_map else x
    for axis in [i for i in range(operand.ndim) if i not in dims.start_index_map and sizes[i] != operand.shape[i]]:
        found = graph.cut(found, axis, 0, sizes[axis])
    found = graph.reshape(found, out.shape)
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP or not dims.start_index_map:
        return found
    inside = graph.op("ReduceMin", graph.cast(graph.op("Equal", start, wanted), np.int32), keepdims=0)
    return graph.op("Where", graph.cast(inside, bool), found, graph.const(np.asarray(_filler(out), lying(out.dtype))))


def _filler(aval: Any) -> float:
    return np.nan if jnp.issubdtype(aval.dtype, jnp.inexact) else _filling(aval.dtype)


def _filling(dtype: Any) -> int:
    """What JAX puts where an index is outside: the least number, or of unsigned ones the largest."""
    about = jnp.iinfo(dtype)
    return about.max if jnp.issubdtype(dtype, jnp.unsignedinteger) else about.min
