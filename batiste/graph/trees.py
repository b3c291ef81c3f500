# SPDX-License-Identifier: Apache-2.0
"""Whether an object is a tree, as JAX takes it to be: looked for once, and known until some structure changes.

JAX calls for one node of a tree after another, and goes round in an object that holds itself until the stack ends; a
Variable at two places becomes two. The first node that it calls for is walked whole, and all below it is known with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from .callers import warn
from .epoch import Epoch
from .errors import StructureError, UntiedWarning
from .variable import Param, Variable

SHALLOW = 100  # levels that are always there
_mark = object.__setattr__


class Tie:
    """One parameter stands at two places of an object. It rides on the structure, and makes no difference there."""

    __slots__ = ("first", "second")

    def __init__(self, first: tuple, second: tuple):
        self.first, self.second = first, second

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Tie)

    def __hash__(self) -> int:
        return hash(None)


class _Place(NamedTuple):
    """A part, the objects above it from the root down, and the path to it."""

    part: Any
    above: tuple
    path: tuple


def look_for_cycles(root: Any) -> None:
    """Walks an object that JAX takes apart, and takes down what is known now.

    What holds plain lists or dicts, which change without telling, is known but for these: it is looked at each time.

    Raises:
        StructureError: it holds itself, or more levels than Python can go down.
    """
    again = root._known_tree == ~Epoch.now  # then all that is known is passed over
    nodes, untelling, params, depth = [], set(), {}, 0
    todo = [_Place(root, (), ())]
    while todo:
        x, above, path = place = todo.pop()
        if isinstance(x, Variable):
            if isinstance(x, Param) and not again:
                _meet(params.setdefault(id(x), place), place)
            continue
        if any(x is other for other in above):
            raise StructureError(
                f"the {type(x).__name__} holds itself, and so is no tree",
                at="/".join(map(str, (type(root).__name__, *path))),
                fix="use the transform of the same name in batiste.nnx, which takes graphs",
            )
        if _is_node(x):
            nodes.append(x)
            if not again:
                _mark(x, "_tie", None)
        elif not isinstance(x, tuple):
            untelling.update(map(id, above))
        above = (*above, x)
        depth = max(depth, len(above))
        todo += [
            _Place(part, above, (*path, key))
            for key, part in _parts(x)
            if isinstance(part, (Variable, list, dict, tuple))
            or (_is_node(part) and not (again and part._known_tree == Epoch.now))
        ]
    if depth > SHALLOW and depth > (room := sys.getrecursionlimit() - _frames() - SHALLOW):
        raise StructureError(f"the {type(root).__name__} is nested too deep for JAX to take it apart", got=depth,
                             expected=f"at most {room} levels",
                             fix=f"sys.setrecursionlimit({depth + 1000})")  # fmt: skip
    for x in nodes:
        _mark(x, "_planned", True)
        _mark(x, "_known_tree", ~Epoch.now if id(x) in untelling else Epoch.now)


def _frames() -> int:
    """The number of calls that are running."""
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


def _meet(first: _Place, second: _Place) -> None:
    """Takes down, at the lowest object above both, that one parameter stands at two places."""
    if first is not second:
        common = [x for x, other in zip(first.above, second.above) if x is other and _is_node(x)]
        _mark(common[-1], "_tie", Tie(*sorted((first.path, second.path), key=str)))


def _is_node(x: Any) -> bool:
    return getattr(type(x), "_pytree__is_pytree", False)


def _parts(x: Any) -> Iterator[tuple[Any, Any]]:
    if _is_node(x):
        nodes = x._pytree__nodes
        return ((k, v) for k, v in vars(x).items() if nodes.get(k))
    return iter(x.items()) if isinstance(x, dict) else enumerate(x)


def warn_untied(kind: str, tie: Tie) -> None:
    """Warns that an object was put together again with two Variables for one."""
    first, second = ("/".join(map(str, path)) for path in (tie.first, tie.second))
    warn(f"the {kind} has one Param at {first} and at {second}; a function of JAX that takes modules for trees has "
         "made two of it.\n  Fix: give it the state (nnx.split, nnx.state), or use the transform of the same name in "
         "batiste.nnx.", UntiedWarning)  # fmt: skip
