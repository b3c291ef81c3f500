# SPDX-License-Identifier: Apache-2.0
"""Rules: which mesh axes the dims of a value are spread over, by the names of its axes or by its path in the model.

    value  --its axis names, or else the first glob that fits its path-->  axes per dim  --mesh-->  PartitionSpec

A glob is held against the end of a path, name by name: `mlp/up/kernel` fits `layers/0/mlp/up/kernel`. In it `*` stands
for any part of one name, `**` for any number of names, and `{up,gate}` for either. The axes of a rule are one entry
per dim, each a mesh axis, an axis name, a tuple of them or None; `...` stands for all dims that have no entry. A rule
without `...` speaks of values of its rank alone, and the empty one of values of any rank: they stay whole.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.placement import Axes

Spec = tuple[Any, ...]
PathRules = tuple[tuple[str, Spec], ...]
WHOLE_RULE = "vectors stay whole"


class Decision(NamedTuple):
    """Where a value lives, and the rule that says so."""

    spec: PartitionSpec
    rule: str


# ---------------------------------------------------------------- globs
@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    parts = glob.strip("/").split("/")
    text = ""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            text += ".*" if last else "(?:[^/]+/)*"
        else:
            text += _one_name(part) + ("" if last else "/")
    return re.compile(f"(?:.*/)?{text}")


def _one_name(part: str) -> str:
    special = {"*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")", ",": "|"}
    return "".join(special.get(c) or re.escape(c) for c in part)


def fits(glob: str, path: str) -> bool:
    """Whether a glob fits the end of a path.

    >>> fits("mlp/{up,gate}/kernel", "layers/0/mlp/up/kernel"), fits("up/*", "layers/0/setup/kernel")
    (True, False)
    """
    return _pattern(glob).fullmatch(path) is not None


def shown(glob: str, path: str) -> str:
    """The glob, with the name that was met in the place of alternatives.

    >>> shown("mlp/{up,gate}/kernel", "layers/0/mlp/up/kernel")
    'mlp/up/kernel'
    """
    parts = glob.split("/")
    if "**" in parts:
        return glob
    met = path.split("/")[-len(parts) :]
    return "/".join(name if "{" in part else part for part, name in zip(parts, met))


# ---------------------------------------------------------------- axes per dim -> PartitionSpec
def suits(axes: Spec, ndim: int) -> bool:
    """Whether a rule with these axes can speak of a value of this rank; the empty rule speaks of all.

    >>> suits((None, "tensor"), 3), suits((..., None, "tensor"), 3)
    (False, True)
    """
    return not axes or len(axes) == ndim or (Ellipsis in axes and len(axes) - 1 <= ndim)


def expanded(axes: Spec, ndim: int, at: str, rule: str) -> Spec:
    """One entry per dim, `...` written out.

    Raises:
        ShapeError: there are more entries than dims.
    """
    given = len(axes) - (Ellipsis in axes)
    if given > ndim:
        raise ShapeError(f"{rule} has {given} entries, the value has {ndim} dims", at=at,
                         fix="write one entry per dim, or ... for those that have none")  # fmt: skip
    place = axes.index(Ellipsis) if Ellipsis in axes else given
    return (*axes[:place], *[None] * (ndim - given), *axes[place + 1 :])


def mesh_axes(entry: Any, names: Mapping[str, Axes], sizes: Mapping[str, int], at: str, rule: str) -> tuple[str, ...]:
    """The mesh axes that one entry stands for.

    Raises:
        ArgumentError: it is neither a name that the plan explains nor an axis of the mesh.
    """
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    if isinstance(entry, (tuple, list)):
        return tuple(axis for part in entry for axis in mesh_axes(part, names, sizes, at, rule))
    if entry in names:
        meaning = names[entry]
        return () if meaning is None else (meaning,) if isinstance(meaning, str) else tuple(meaning)
    if entry in sizes:
        return (entry,)
    raise ArgumentError(
        f"{entry!r} in {rule} is no axis name of the plan and no axis of its mesh", at=at,
        expected=f"one of {sorted({*names, *sizes})}", fix=f"say what it means: names={{{entry!r}: None}}",
    )  # fmt: skip


def to_spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """A PartitionSpec of the mesh axes per dim, in its shortest form."""
    entries = [None if not dim else dim[0] if len(dim) == 1 else dim for dim in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def check(axes: Sequence[tuple[str, ...]], shape: tuple[int, ...], sizes: Mapping[str, int], at: str,
          rule: str) -> None:  # fmt: skip
    """The axes can divide the value.

    Raises:
        ArgumentError: one mesh axis is to divide two dims.
        ShapeError: a dim is no multiple of the devices it is spread over.
    """
    seen: dict[str, int] = {}
    for dim, entry in enumerate(axes):
        for axis in entry:
            if axis in seen:
                raise ArgumentError(
                    f"{rule} puts the mesh axis {axis!r} on dims {seen[axis]} and {dim}, which cannot share it", at=at,
                    fix="give one of the two another axis, or None",
                )  # fmt: skip
            seen[axis] = dim
        parts = math.prod(sizes[axis] for axis in entry)
        if shape[dim] % parts:
            raise ShapeError(
                f"{rule} spreads dim {dim} over the {parts} devices of {' x '.join(entry)}, which do not divide it",
                at=at, got=f"shape {shape}", expected=f"a multiple of {parts}",
                fix="pad the dim, choose a smaller axis, or give a rule for this parameter with None there",
            )  # fmt: skip


# ---------------------------------------------------------------- what no rule has used
def filled(axes: Sequence[tuple[str, ...]], shape: tuple[int, ...], more: tuple[str, ...], sizes: Mapping[str, int],
           least: int = 0) -> list[tuple[str, ...]]:  # fmt: skip
    """The mesh axes `more` put on the largest dim that they divide, one without axes if there is such a dim.

    Values of fewer than `least` elements, those that have one of the axes already, and those with no such dim stay.
    """
    axes = list(axes)
    parts = math.prod(sizes[axis] for axis in more)
    used = {axis for entry in axes for axis in entry}
    if parts == 1 or math.prod(shape) < least or used & set(more):
        return axes
    local = [size // math.prod(sizes[axis] for axis in entry) for size, entry in zip(shape, axes)]
    possible = [dim for dim, size in enumerate(local) if size and size % parts == 0]
    if possible:
        dim = max(possible, key=lambda d: (not axes[d], local[d]))
        axes[dim] = (*axes[dim], *more)
    return axes


def spread(shape: tuple[int, ...], sizes: Mapping[str, int], over: Sequence[str]) -> PartitionSpec:
    """A value divided by as many of these mesh axes as divide it: where a value is born whose path is not known yet.

    >>> spread((6, 8), {"a": 4, "b": 3}, ("a", "b"))
    P('b', 'a')
    """
    axes: list[tuple[str, ...]] = [()] * len(shape)
    for axis in over:
        axes = filled(axes, shape, (axis,), sizes)
    return to_spec(axes)


def all_axes(entries: Any) -> Iterator[str]:
    """The names in entries, however deep."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, (tuple, list)):
            yield from all_axes(entry)
