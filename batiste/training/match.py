# SPDX-License-Identifier: Apache-2.0
"""Fits one tree of values to another: gradients to parameters, new parameters to averaged ones."""

from __future__ import annotations

from typing import Any

from batiste.graph import Pytree, State, Variable, state, to_flat_state, to_predicate
from batiste.graph.errors import StructureError

Path = tuple[Any, ...]
SHOWN = 8  # how many paths an error message names at most


def path_text(path: Path) -> str:
    return "/".join(map(str, path)) or "the root"


def match(given: Any, wanted: dict[Path, Any], wrt: Any, graph: bool | None, *, what: str, fix: str) -> list[Any]:
    """The values of `given` at the paths of `wanted`, in that order.

    Args:
        given: a State, a module, a nested dict, or any other object, of Variables or of bare values.
        wanted: values by path; shapes are compared with theirs.
        wrt: the filter that chose `wanted`; Variables of `given` that it does not match are left out.
        what: what `given` is, for the message.

    Raises:
        StructureError: a path is missing or unknown, or a shape differs; the message names all such paths.
    """
    found, others = _values(given, wrt, graph)
    complaints = [_missing(path, others) for path in wanted if path not in found]
    complaints += [f"{path_text(path)} is unknown" for path in found if path not in wanted]
    if others and not wanted:
        complaints.append(f"the filter {to_predicate(wrt)} matches no Variable")
    for path, target in wanted.items():
        got, expected = (getattr(x, "shape", None) for x in (found.get(path), target))
        if None not in (got, expected) and got != expected:
            complaints.append(f"{path_text(path)} has shape {got}, expected {expected}")
    if complaints:
        shown = complaints[:SHOWN] + [f"and {len(complaints) - SHOWN} more"] * (len(complaints) > SHOWN)
        raise StructureError(f"{what} do not fit: {'; '.join(shown)}", got=_kinds(given, graph), fix=fix)
    return [found[path] for path in wanted]


def _missing(path: Path, others: dict[Path, Any]) -> str:
    if path in others:
        return f"{path_text(path)} is a {type(others[path]).__name__}, which the filter does not match"
    return f"{path_text(path)} is missing"


def _flat(given: Any, graph: bool | None) -> dict[Path, Any]:
    if isinstance(given, dict):
        given = State(given)
    found = given if isinstance(given, State) else state(given, graph=graph)
    return dict(to_flat_state(found)) if isinstance(found, State) else {(): found}


def _values(given: Any, wrt: Any, graph: bool | None) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """What the filter selects, by value, and the Variables that it does not. Arrays of a module are no gradients."""
    chosen = to_predicate(wrt)
    values, others = {}, {}
    for path, x in _flat(given, graph).items():
        if not isinstance(x, Variable):
            if not isinstance(given, Pytree):
                values[path] = x
        elif chosen(path, x):
            values[path] = x.get_value()
        else:
            others[path] = x
    return values, others


def _kinds(given: Any, graph: bool | None) -> str:
    kinds = sorted({type(x).__name__ for path, x in _flat(given, graph).items() if path})
    return type(given).__name__ + (f" of {', '.join(kinds)}" if kinds else "")
