# SPDX-License-Identifier: Apache-2.0
"""Batches of which every process reads its own part."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.sharding import Plan, current_plan

__all__ = ["everywhere", "global_batch", "process_slice"]

A = TypeVar("A")


def process_slice(n: int, plan: Plan | None = None) -> slice:
    """The rows of a batch of `n` that this process reads.

    By a plan (the one in use, unless given) these are the rows that its devices hold: processes that share the rows,
    as under tensor parallelism across hosts, read the same ones. Without a plan they are divided evenly.

    >>> process_slice(8)                                # one process reads all
    slice(0, 8, None)

    Raises:
        ShapeError: `n` does not divide.
        ArgumentError: the rows of this process are not one piece.
    """
    plan = plan or current_plan()
    if plan is None:
        if n % jax.process_count():
            raise _indivisible(n, jax.process_count(), "processes")
        rows = n // jax.process_count()
        return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    if n % (parts := _parts(plan)):
        raise _indivisible(n, parts, "parts of the plan's batch")
    pieces = {index[0].indices(n)[:2] for index in _rows(plan, n).values()}
    first, last = min(first for first, _ in pieces), max(last for _, last in pieces)
    if sum(last - first for first, last in pieces) != last - first:
        raise ArgumentError("the rows that this process's devices hold are not one piece", got=sorted(pieces),
                            fix="order the devices of the mesh by process: make_mesh(devices=sorted(jax.devices(), "
                            "key=lambda device: device.process_index))")  # fmt: skip
    return slice(first, last)


def global_batch(local: A, plan: Plan | None = None) -> A:
    """One batch over all processes, of the rows that each has read (`process_slice`); nothing travels between them.

    `local` is a tree of arrays; dim 0 of each holds this process's rows, the other dims are whole.

    >>> import numpy as np
    >>> from batiste import sharding
    >>> rows = process_slice(16, plan := sharding.data_parallel())
    >>> global_batch({"x": np.ones((16, 3))[rows]}, plan)["x"].shape
    (16, 3)

    Raises:
        ArgumentError: no plan was given, and none is in use.
        ShapeError: the rows do not divide over this process's devices.
    """
    plan = plan or current_plan()
    if plan is None:
        raise ArgumentError("a batch over all processes needs a plan", fix="call it under sharding.use(plan), or pass "
                            "the plan")  # fmt: skip
    parts = _parts(plan)
    own = len({index[0].indices(parts)[:2] for index in _rows(plan, parts).values()})

    def one(x: Any) -> Any:
        x = np.asarray(x)
        if x.dtype.kind in "OUSMm":
            return x  # texts stay with the process that read them
        if x.ndim and x.shape[0] % own:
            raise _indivisible(x.shape[0], own, "parts on this process's devices")
        shape = (x.shape[0] // own * parts, *x.shape[1:]) if x.ndim else ()
        return jax.make_array_from_process_local_data(NamedSharding(plan.mesh, plan.batch_spec(x.ndim)), x, shape)

    return jax.tree.map(one, local)


def everywhere(batch: A, plan: Plan | None = None) -> A:
    """The batch as one over all processes: what this process has read, unless it is that already or runs alone.

    >>> everywhere({"x": 1})
    {'x': 1}

    Raises:
        ArgumentError, ShapeError: as `global_batch`.
    """
    if jax.process_count() == 1:
        return batch
    spans = [isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(batch)]
    return batch if any(spans) else global_batch(batch, plan)


def _parts(plan: Plan) -> int:
    return math.prod(plan.sizes[axis] for axis in plan.batch)


def _rows(plan: Plan, n: int) -> Any:
    return NamedSharding(plan.mesh, plan.batch_spec(1)).addressable_devices_indices_map((n,))


def _indivisible(n: int, parts: int, what: str) -> ShapeError:
    return ShapeError("the rows of a batch do not divide", got=f"{n} rows", expected=f"a multiple of {parts} {what}",
                      fix="choose another batch size, or drop or pad the last rows")  # fmt: skip
