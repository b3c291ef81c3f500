# SPDX-License-Identifier: Apache-2.0
"""The labels of mapped and looping transforms: axes, Carry, axes by filter, and the names of axes in metadata."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from batiste.graph.boundary import Boundary, Crossing, Mode, Rules, broadcast, walk_tree
from batiste.graph.errors import ArgumentError, CallError, ShapeError
from batiste.graph.flatten import Walk
from batiste.graph.modes import graph_mode
from batiste.graph.pytree import Pytree
from batiste.graph.variable import MISSING, Variable
from batiste.graph.walk import node_items, rebuilt
from batiste.sharding import PARTITION_NAME, add_axis, remove_axis

from .arguments import bound, by_position
from .compare import place
from .compile import refuse_bound_method, refuse_rules

T = TypeVar("T")

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Carry:
    """Marks the argument and the result of `scan` that go from one iteration to the next."""


@dataclasses.dataclass(frozen=True)
class In(Generic[T]):
    """A collection goes into a transformed function only, along this axis."""

    axis: T


@dataclasses.dataclass(frozen=True)
class Out(Generic[T]):
    """A collection comes out of a transformed function only, along this axis."""

    axis: T


class StateAxes(Rules, Mapping):
    """Axes of a module's Variables by filter, the first that matches: `StateAxes({Param: 0, ...: None})`.

    >>> axes = StateAxes({"params": 0, ...: None})
    >>> axes.axes, axes["params"], dict(axes)
    ((0, None), 0, {'params': 0, Ellipsis: None})
    """

    def __init__(self, filter_axes, /):
        super().__init__(filter_axes)

    @property
    def axes(self) -> tuple:
        return self.labels

    def __getitem__(self, key: Any) -> Any:
        for chosen, axis in self.items():
            if chosen == key:
                return axis
        raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.filters)

    def __len__(self) -> int:
        return len(self.filters)

    def map_prefix(self, path: tuple, variable: Any) -> Any:
        """The axis of one Variable."""
        return self(path, variable)


def prefix(node: Any, filter_map: Any, /, *, graph: bool | None = None) -> Any:
    """A copy of an object with a label (an axis, a sharding) in the place of each leaf, to stand in a prefix argument.

    Args:
        filter_map: `{filter: label}`, the first that matches; or a function of `(path, leaf)`.
        graph: accepted for symmetry. A Variable that is met on several paths is labelled on each; transforms refuse it
            where the labels differ.

    Raises:
        ArgumentError: no filter matches a leaf.

    >>> from batiste import nnx
    >>> prefix({"a": nnx.Param(1.0), "b": nnx.BatchStat(2.0)}, {nnx.Param: 0, ...: None})
    {'a': 0, 'b': None}
    """
    choose: Callable = filter_map if callable(filter_map) else Rules(filter_map)

    def label(path: tuple, x: Any) -> Any:
        inner = not isinstance(x, Variable) and (x is None or isinstance(x, Pytree) or node_items(x) is not None)
        return x if inner else choose(path, x)

    return rebuilt(label, node, True, once=False)


# ---------------------------------------------------------------- the names of mapped axes
def mapped_variables(tree: Any, axes: Any, name: str) -> Iterator[tuple[Variable, int]]:
    """The Variables of a tree whose label is an axis, with that axis."""
    walk = Walk(True)
    walk_tree(walk, tree, broadcast(axes, tree, name))
    for x, axis in zip(walk.leaves, walk.labels):
        if isinstance(x, Variable) and isinstance(axis, int):
            yield x, axis


def without_axis_names(f: Callable, in_axes: Any, out_axes: Any, metadata: Mapping[str, Any]) -> Callable:
    """`f`, inside which the metadata of Variables do not name the mapped axis; without a name for it, `f` itself."""
    if PARTITION_NAME not in metadata:
        return f

    def inside(*args):
        for x, axis in mapped_variables(args, in_axes, "in_axes"):
            remove_axis(x, axis, metadata)
        out = f(*args)
        for x, axis in mapped_variables((args, out), (in_axes, out_axes), "out_axes"):
            add_axis(x, axis, metadata)
        return out

    return inside


def transform_metadata(f: Any = MISSING, *, in_axes: Any = 0, out_axes: Any = 0, partition: str | None,
                       graph: bool | None = None) -> Any:  # fmt: skip
    """`f` with the name `partition` taken out of the metadata of its arguments, and put into that of its results.

    It stands below `vmap` or `scan` where these have no `transform_metadata=` of their own: with `graph_updates=False`.

    Raises:
        ArgumentError: another name stands at an axis.
        AliasError: `f` returns one of its arguments.
    """
    if f is MISSING:
        return functools.partial(transform_metadata, in_axes=in_axes, out_axes=out_axes, partition=partition,
                                 graph=graph)  # fmt: skip
    mode = Mode(graph_mode(graph), False, "transform_metadata")
    if not mode.graph:
        refuse_rules(mode, in_axes=in_axes, out_axes=out_axes)

    @functools.wraps(f, updated=())
    def renamed(*args, **kwargs):
        call, args, axes = positional(f, *bound_to_axes(f, args, kwargs, in_axes), in_axes)
        boundary = Boundary(without_axis_names(call, axes, out_axes, {PARTITION_NAME: partition}), mode)
        groups = boundary.enter(args)
        return boundary.leave(boundary.run(groups))

    return renamed


# ---------------------------------------------------------------- arguments and their axes
def positional(f: Callable, args: tuple, kwargs: dict[str, Any], axes: Any) -> tuple[Callable, tuple, Any]:
    """`(function, args, axes)` of positions alone: what is left with a name is mapped over axis 0, as by `jax.vmap`."""
    call, xs = by_position(f, args, kwargs)
    if len(xs) > len(args):
        each = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,) * len(args)
        axes = (*each, *(0,) * (len(xs) - len(args)))
    return call, xs, axes


def bound_to_axes(f: Callable, args: tuple, kwargs: dict[str, Any], axes: Any) -> tuple[tuple, dict[str, Any]]:
    """The same call by position; arguments that were left out but have an axis take their defaults."""
    args, kwargs = bound(f, args, kwargs)
    if isinstance(axes, tuple) and len(axes) > len(args):
        missing = list(inspect.signature(f).parameters.values())[len(args) : len(axes)]
        defaults = [p.default for p in missing if p.default is not p.empty]
        args = (*args, *defaults) if len(defaults) == len(missing) else args
    return args, kwargs


def check_function(f: Any, mode: Mode, in_axes: Any, out_axes: Any) -> None:
    """What can be said when a function is decorated.

    Raises:
        ArgumentError: `f` is a bound method, or a prefix holds what the mode cannot take.
        CallError: `in_axes` does not speak of positions.
    """
    refuse_bound_method(f, mode.name)
    refuse_rules(mode, in_axes=in_axes, out_axes=out_axes)
    if not (in_axes is None or in_axes is Carry or isinstance(in_axes, (int, tuple, list))):
        raise CallError(
            f"{mode.name} in_axes must be an int, None, or a tuple of entries corresponding to the positional "
            "arguments passed to the function", got=repr(in_axes), fix=f"write in_axes=({in_axes!r},)",
        )  # fmt: skip


def check_sizes(name: str, crossing: Crossing, leaves: Sequence[Any]) -> None:
    """All mapped axes have the same size.

    Raises:
        ShapeError: two differ, or a value has no such axis.
    """
    sizes: dict[int, list[str]] = {}
    mapped = [part for part in zip(crossing.paths, crossing.leaf_labels, leaves) if isinstance(part[1], int)]
    for path, axis, shape in ((path, axis, jnp.shape(x)) for path, axis, tree in mapped for x in jax.tree.leaves(tree)):
        least = axis + 1 if axis >= 0 else -axis
        if len(shape) < least:
            raise ShapeError(
                f"{name} was requested to map its argument along axis {axis}, which implies that its rank should be at "
                f"least {least}, but is only {len(shape)} (its shape is {shape})", at=place(path),
                fix="give it the axis None",
            )  # fmt: skip
        sizes.setdefault(shape[axis], []).append(f"axis {axis} of {place(path)}, shape {shape}")
    if len(sizes) > 1:
        lines = "".join(f"\n  size {n}: {'; '.join(who[:3])}{'; ...' * (len(who) > 3)}" for n, who in sizes.items())
        many = "values with different leading axis sizes"
        what = many if name == "scan" else "inconsistent sizes for array axes to be mapped"
        raise ShapeError(f"{name} got {what}:{lines}\n",
                         fix="give the axis None to what is the same for all")  # fmt: skip


_BATCHED = re.compile(r"out_axes\[(\d+)\]\[(\d+)\].*got axis spec None but output was batched on axis (\d+)")


def explain_batched(error: ValueError, crossing: Crossing) -> Exception:
    """JAX's complaint about a result that differs along the axis, in terms of the objects of the call."""
    found, note = _BATCHED.search(str(error)), crossing.note
    if found is None or note is None:
        return error
    label = crossing.labels[int(found[1])]
    path = [path for path, other in zip(crossing.sent, note.labels) if other == label][int(found[2])]
    path = tuple(map(repr, path)) if path[:1] != ("out",) else ("out", *map(repr, path[1:]))
    return ArgumentError(
        f"at {crossing.mode.name}, {place(path)}: got axis spec None but output was batched on axis {found[3]}",
        fix="give it an axis in in_axes and out_axes (StateAxes, nnx.prefix), or reduce it over the axis before it is "
        "written or returned (jax.lax.pmean)",
    )  # fmt: skip
