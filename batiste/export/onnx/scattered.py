# SPDX-License-Identifier: Apache-2.0
"""Elements that are written, or read, at computed places: where each lies in the flat array is itself computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ExportError
from .graph import BOOL, Graph, lying, rule

CLIP = jax.lax.GatherScatterMode.CLIP
JOINED = {"scatter": "none", "scatter-add": "add", "scatter-sub": "add", "scatter-mul": "mul", "scatter-min": "min",
          "scatter-max": "max"}  # fmt: skip


def places(
    indices: jax.Array, shape: Sequence[Any], sizes: Sequence[Any], out: Sequence[Any], window: Sequence[int],
    into: Sequence[int], looked: Sequence[int], batch: Sequence[tuple[int, int]], mode: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of each element of an array `out` of slices: its place in the flat operand, and whether its slice is inside.

    Args:
        shape, sizes: of the operand, and of a slice of it.
        window: dims of `out` that run through a slice, and `into`, the dims of the operand that they run through.
        looked: dims of the operand that the indices are of.
        batch: dims of the operand and of the indices that run together.
        mode: CLIP moves slices inside.
    """
    free = [axis for axis in range(len(out)) if axis not in window]
    at: list[Any] = [jnp.int32(0)] * len(shape)
    inside: Any = jnp.full((1,) * len(out), True)
    for n, axis in enumerate(looked):
        start = indices[..., n].astype(np.int32)
        room = shape[axis] - sizes[axis]
        if mode == CLIP:
            start = jnp.clip(start, 0, room)
        start = jnp.expand_dims(start, [i for i in range(len(out)) if i not in free])
        inside = inside & (start >= 0) & (start <= room)
        at[axis] = start
    for axis, of_index in batch:
        at[axis] = along(out, free[of_index])
    for axis, inner in zip(window, into):
        at[inner] = at[inner] + along(out, axis)
    flat: Any = jnp.int32(0)
    for place, n in zip(at, shape):
        flat = flat * n + place
    return jnp.broadcast_to(flat, out), jnp.broadcast_to(inside, out)


def along(shape: Sequence[Any], axis: int) -> jax.Array:
    """0, 1, … along one axis of many"""
    return jnp.arange(shape[axis], dtype=np.int32).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def count(shape: Sequence[Any]) -> Any:
    found: Any = 1
    for n in shape:
        found = found * n
    return found


@rule(*JOINED)
def scatter(graph: Graph, eqn: Any, x: str, indices: str, updates: str) -> str:
    """Into the flat operand with one place more, where what lies outside goes."""
    dims, kind = eqn.params["dimension_numbers"], JOINED[eqn.primitive.name]
    operand, where, update = (v.aval for v in eqn.invars)
    if kind != "none" and lying(operand.dtype) == BOOL:
        raise ExportError("ONNX does not join truth values at places", got=eqn.primitive.name)
    out, window = update.shape, dims.update_window_dims
    absent = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    into = [axis for axis in range(len(operand.shape)) if axis not in absent]
    sizes: list[Any] = [1] * len(operand.shape)
    for axis, inner in zip(window, into):
        sizes[inner] = out[axis]
    looked = dims.scatter_dims_to_operand_dims
    batch = list(zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims))
    last = count(operand.shape)

    def flat_places(indices: jax.Array) -> jax.Array:
        flat, inside = places(indices, operand.shape, sizes, out, window, into, looked, batch, eqn.params["mode"])
        return jnp.where(inside, flat, last).reshape(-1)

    (at,) = graph.traced(flat_places, [where], [indices])
    room = graph.const(np.zeros(1, lying(operand.dtype)))
    flat = graph.op("Concat", graph.reshape(x, [-1]), room, axis=0)
    updates = graph.op("Neg", updates) if eqn.primitive.name == "scatter-sub" else updates
    flat = graph.op("ScatterElements", flat, at, graph.reshape(updates, [-1]), axis=0, reduction=kind)
    return graph.reshape(graph.cut(flat, 0, 0, last), operand.shape)


def gathered(graph: Graph, eqn: Any, x: str, indices: str, filler: Any) -> str:
    """Slices of any size."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (operand, where), out = (v.aval for v in eqn.invars), eqn.outvars[0].aval
    absent = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    into = [axis for axis in range(operand.ndim) if axis not in absent]
    batch = list(zip(dims.operand_batching_dims, dims.start_indices_batching_dims))
    mode = eqn.params["mode"]
    fills = mode == jax.lax.GatherScatterMode.FILL_OR_DROP

    def look(x: jax.Array, indices: jax.Array) -> jax.Array:
        flat, inside = places(indices, operand.shape, sizes, out.shape, dims.offset_dims, into, dims.start_index_map,
                              batch, mode if fills else CLIP)  # fmt: skip
        found = x.reshape(-1).at[jnp.where(inside, flat, 0) if fills else flat].get(mode="promise_in_bounds")
        return jnp.where(inside, found, jnp.asarray(filler, x.dtype)) if fills else found

    return graph.traced(look, [operand, where], [x, indices])[0]
