# SPDX-License-Identifier: Apache-2.0
"""cond and switch: one of several functions is called on live objects, and all leave the same structure behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax

from batiste.graph.boundary import Boundary, Crossing, Mode, Note
from batiste.graph.errors import ArgumentError, BranchError
from batiste.graph.variable import Variable

from .compare import structure_difference, type_difference


def cond(pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any,
         graph: bool | None = None, graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`true_fun(*operands)` if `pred` else `false_fun(*operands)`, inside one program; updates of Variables come back.

    Raises:
        BranchError: the two leave different structures or types behind.
    """
    branches = Branches(Mode.of("cond", graph, graph_updates), (true_fun, false_fun), operands)
    return branches.leave(jax.lax.cond(_value(pred), *branches.runs, branches.groups))


def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any, graph: bool | None = None,
           graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`branches[index](*operands)`, inside one program; updates of Variables come back. The index is clamped.

    Raises:
        ArgumentError: there are no branches.
        BranchError: two of them leave different structures or types behind.
    """
    if not branches:
        raise ArgumentError("Empty branch sequence", fix="give at least one branch")
    each = Branches(Mode.of("switch", graph, graph_updates), branches, operands)
    return each.leave(jax.lax.switch(_value(index), each.runs, each.groups))


def _value(x: Any) -> Any:
    return x.get_value() if isinstance(x, Variable) else x


class Branches:
    """The passage of one call through one of several functions: all Variables come back, changed or not."""

    def __init__(self, mode: Mode, functions: Sequence[Callable[..., Any]], operands: tuple):
        self.mode = mode
        self.boundary = Boundary(functions[0], mode, keep=lambda label: True)
        self.groups = self.boundary.enter(operands, labels=(None,))
        self.runs = [self.branch(n, f) for n, f in enumerate(functions)]
        self.first: tuple[int, Crossing, list[Any]] | None = None

    def branch(self, n: int, f: Callable) -> Callable:
        """One function, from values to values, compared with the one that was traced first."""
        crossing = copy.copy(self.boundary.crossing)
        crossing.f = f

        def run(groups):
            out = crossing.run(groups)
            if self.first is None:
                self.first = n, crossing, out[0]
            self.compare(n, crossing, out[0])
            return out

        run.__name__ = run.__qualname__ = getattr(f, "__name__", "branch")
        return run

    def compare(self, n: int, crossing: Crossing, values: list[Any]) -> None:
        """What one branch leaves behind, against the first."""
        assert self.first is not None
        first, other, theirs = self.first
        a, b = other.note, crossing.note
        assert a is not None and b is not None
        who = f"{self.name(first)} and {self.name(n)}"
        detail = _note_difference(a, b)
        if detail:
            raise BranchError(
                f"{self.mode.name} branch outputs must have the same pytree structure, but they differ: {who}: "
                f"{detail}", fix="set the same attributes in both, and return the same structure of the same objects",
            )  # fmt: skip
        found = type_difference(crossing.sent, theirs, values)
        if found:
            raise BranchError(
                f"{self.mode.name} branches must have equal output types but they differ: {who}", at=found[0],
                got=f"{found[1]} and {found[2]}", fix="convert one of them (astype, reshape)",
            )  # fmt: skip

    def name(self, n: int) -> str:
        return ("true_fun", "false_fun")[n] if self.mode.name == "cond" else f"branch {n}"

    def leave(self, groups: Sequence[Sequence[Any]]) -> Any:
        """Writes into the live objects; returns the result of the branch that was taken."""
        assert self.first is not None
        return self.boundary.leave(groups, self.first[1].note)


def _note_difference(a: Note, b: Note) -> str:
    """What the notes of two branches differ in; empty if they agree."""
    if (a.args is None) != (b.args is None):
        return "one of them adds, removes or replaces attributes"
    if a.args is not None and b.args is not None and a.args != b.args:
        return structure_difference(a.args, b.args, "the arguments")
    if a.out != b.out:
        return structure_difference(a.out, b.out, "the results")
    if a.metadata != b.metadata:
        return "in the metadata of Variables"
    if a.sources != b.sources or a.changed != b.changed:
        return "they do not change the same parts of the arguments"
    return ""
