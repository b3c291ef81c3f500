# SPDX-License-Identifier: Apache-2.0
"""What a plan does to a model: a table of its parameters, and the memory that a step needs, before anything is run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from batiste.graph import Param, Pytree, Variable, iter_graph
from batiste.graph.errors import ArgumentError, BatisteError
from batiste.graph.jaxcompat import key_name
from batiste.graph.placement import put
from batiste.graph.text import size_text, table

from .plan import Plan, use
from .values import contents, is_optimizer_state, is_value


class Row(NamedTuple):
    """One value of a model: where it lives, why, and how much of it each device holds."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    rule: str
    spec: PartitionSpec
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The rows of a model; printed, a table."""

    rows: tuple[Row, ...]
    mesh: Mapping[str, int]

    @property
    def bytes_per_device(self) -> int:
        return sum(row.bytes_per_device for row in self.rows)

    def __getitem__(self, path: str) -> Row:
        return next(row for row in self.rows if row.path == path)

    def __str__(self) -> str:
        cells = [(r.path, f"{r.dtype}{list(r.shape)}", r.rule, str(r.spec), size_text(r.bytes_per_device))
                 for r in self.rows]  # fmt: skip
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        total = (f"{len(self.rows)} values on {mesh}", "", "", "", size_text(self.bytes_per_device))
        return table([("parameter", "shape", "rule", "spec", "per device"), *cells, total])


def explain_sharding(model: Any, plan: Plan) -> Explanation:
    """The place of each value of a model, its rule, and its bytes per device. Nothing is compiled, or made.

    Args:
        model: an object, abstract or not; a tree of parameters; or a function that makes one of these.

    Raises:
        ArgumentError: parameters that no rule speaks of, or whose rule cannot be kept: all of them, with their rules.
    """
    if not isinstance(model, Pytree) and callable(model):
        model = jax.eval_shape(model)
    rows, problems = [], []
    for path, x in values_of(model):
        try:
            rows.append(_row(path, x, plan))
        except BatisteError as error:
            problems.append(str(error))
    if problems:
        alike = Counter(re.sub(r"(?<=/)\d+(?=/)", "*", problem) for problem in problems)  # layers of a list as one
        text = "\n".join(f"- {text}" if n == 1 else f"- ({n} times) {text}" for text, n in alike.items())
        raise ArgumentError(f"the plan does not fit the model, in {len(problems)} places\n{text}")
    return Explanation(tuple(rows), plan.sizes)


def values_of(tree: Any) -> Iterator[tuple[tuple, Any]]:
    """The Variables of an object, or the Variables, boxes and arrays of a tree, with their paths."""
    if isinstance(tree, Pytree):
        yield from ((path, x) for path, x in iter_graph(tree, graph=True) if isinstance(x, Variable))
    else:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_value)
        yield from ((tuple(map(key_name, path)), x) for path, x in leaves)


def _row(path: tuple, x: Any, plan: Plan) -> Row:
    value, _ = contents(x)
    decision = plan.place_of(path, x)
    shape, dtype = tuple(np.shape(value)) if not hasattr(value, "shape") else tuple(value.shape), value.dtype
    parts = math.prod(plan.sizes[a] for entry in decision.spec for a in _axes(entry))
    return Row("/".join(map(str, path)), shape, str(dtype), decision.rule, decision.spec,
               math.prod(shape) * dtype.itemsize // parts)  # fmt: skip


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


# ---------------------------------------------------------------- memory
@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device during a step.

    Args:
        parameters, optimizer, state: what stays from step to step: `state` is all but the first two.
        batch: the other inputs.
        gradients: one per parameter.
        working: activations kept for the backward pass, and temporaries.
        results: outputs that have buffers of their own, where the inputs are not donated.
        limit: what a device has, if that is known.
    """

    parameters: int
    optimizer: int
    state: int
    batch: int
    gradients: int
    working: int
    results: int
    limit: int | None = None

    @property
    def total(self) -> int:
        return sum(size for name, size in dataclasses.asdict(self).items() if name != "limit")

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None where no limit is known."""
        return None if self.limit is None else self.total <= self.limit

    def __str__(self) -> str:
        rows = [(name, size_text(size)) for name, size in dataclasses.asdict(self).items() if name != "limit"]
        verdict = "" if self.limit is None else f"{'fits' if self.fits else 'does not fit'} {size_text(self.limit)}"
        return table([("per device", "bytes"), *rows, ("total", size_text(self.total)), (verdict, "")])


def memory_plan(step: Any, plan: Plan, *args: Any, limit: int | None = None) -> Memory:
    """What `step(*args)` will need on each device, from abstract shapes: the step is compiled, no value is made.

    Args:
        step: a function under `jit`.
        args: objects and trees, abstract (from `jax.eval_shape`) or not. Abstract objects are marked with their places;
            arrays outside objects are batches.
        limit: bytes of a device; None asks the device.

    Raises:
        ArgumentError: `step` is not compiled.
    """
    if not hasattr(step, "lower"):
        raise ArgumentError("memory_plan needs a compiled step", got=type(step).__name__, fix="pass jit(step)")
    with use(plan):
        args = tuple(_placed(x, plan) for x in args)
        analysis = step.lower(*args).compile().memory_analysis()
    sizes = {"parameters": 0, "optimizer": 0, "state": 0, "batch": 0}
    trained = 0
    for arg in args:
        for path, x in values_of(arg):
            kind = kind_of(path, x, isinstance(arg, Pytree))
            sizes[kind] += local_bytes(x)
            trained += local_bytes(x) if kind == "parameters" else 0
    sizes["batch"] = max(0, analysis.argument_size_in_bytes - sum(sizes.values()) + sizes["batch"])
    gradients = min(trained, analysis.temp_size_in_bytes)
    return Memory(
        **sizes,
        gradients=gradients,
        working=analysis.temp_size_in_bytes - gradients,
        results=max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        limit=limit if limit is not None else device_bytes(plan.mesh.devices.flat[0]),
    )


def _placed(x: Any, plan: Plan) -> Any:
    """An argument with the places of its values: those of an object by the rules, those of a batch over its dims."""
    if isinstance(x, Pytree):
        plan.settle(x)
        return x
    leaves, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_value)
    paths = [tuple(map(key_name, path)) for path, _ in leaves]
    if any(kind_of(path, leaf, False) != "batch" for path, leaf in zip(paths, (leaf for _, leaf in leaves))):
        return jax.tree.map(lambda sharding, part: jax.tree.map(lambda leaf: put(leaf, sharding), part),
                            plan.shardings(x), x)  # fmt: skip
    return treedef.unflatten([_batch_placed(leaf, plan) for _, leaf in leaves])


def _batch_placed(x: Any, plan: Plan) -> Any:
    return x if isinstance(x, jax.Array) and x.committed else plan.shard_batch(x)


def kind_of(path: tuple, x: Any, in_object: bool) -> str:
    """What a value of an argument is counted as: `parameters`, `optimizer`, `state` or `batch`."""
    if is_optimizer_state(path, x):
        return "optimizer"
    if isinstance(x, Param) or "params" in path:
        return "parameters"
    return "state" if in_object or isinstance(x, Variable) else "batch"


def local_bytes(x: Any) -> int:
    """Bytes of a value's part on one device."""
    value, _ = contents(x)
    return sum(_local(leaf) for leaf in jax.tree.leaves(value))


def _local(x: Any) -> int:
    shape = tuple(getattr(x, "shape", ()))
    sharding = getattr(x, "sharding", None)
    if sharding is not None:
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * getattr(getattr(x, "dtype", None), "itemsize", 0)


def device_bytes(device: Any) -> int | None:
    """The memory of a device, where it says."""
    stats: Callable[[], Any] = getattr(device, "memory_stats", lambda: None)
    return (stats() or {}).get("bytes_limit")


# ---------------------------------------------------------------- text
