# SPDX-License-Identifier: Apache-2.0
"""cond and switch of functions of scopes: one of several is called, and all make and write the same variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from batiste.graph.boundary import Note
from batiste.graph.errors import BranchError
from batiste.graph.structure import show_path

from ..filters import in_filter
from .call import LiftedCall

WRITABLE = "writable"


def cond(pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], scope: Any, *operands: Any,
         variables: Any = True, rngs: Any = True) -> Any:  # fmt: skip
    """true_fun(scopes, *operands) if pred else false_fun(scopes, *operands)

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.

    Raises:
        BranchError: the two make different variables.
    """
    return _one_of("cond", lambda runs, *args: jax.lax.cond(pred, *runs, *args), (true_fun, false_fun), scope,
                   operands, variables, rngs)  # fmt: skip


def switch(index: Any, branches: Sequence[Callable[..., Any]], scope: Any, *operands: Any, variables: Any = True,
           rngs: Any = True) -> Any:  # fmt: skip
    """branches[index](scopes, *operands); the index is clamped.

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.

    Raises:
        BranchError: two of them make different variables.
    """
    return _one_of("switch", lambda runs, *args: jax.lax.switch(index, runs, *args), branches, scope, operands,
                   variables, rngs)  # fmt: skip


def _one_of(name: str, choose: Callable[..., Any], fns: Sequence[Callable[..., Any]], scopes: Any, operands: tuple,
            variables: Any, rngs: Any) -> Any:  # fmt: skip
    mutable = [scope.mutable for scope in jax.tree.leaves(scopes, is_leaf=lambda x: hasattr(x, "frame"))]

    def label_of(col: str) -> str | None:
        return WRITABLE if any(in_filter(each, col) for each in mutable) else None

    call = LiftedCall(name, fns[0], scopes, into=variables, out=variables, rngs=rngs, labels=label_of,
                      all_labels=(WRITABLE, None), keep=lambda label: label is WRITABLE)  # fmt: skip
    groups = call.enter()
    first: list[tuple[Note, list[tuple]]] = []

    def run_of(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(groups: Any, *operands: Any) -> Any:
            out = call.run_other(fn, groups, *operands)
            note, paths = call.note, list(call.crossing.sent)
            if not first:
                first.append((note, paths))
            elif note != first[0][0]:
                problem = f"{name}: the branches make or write different variables"
                fix = "make the same variables in all branches, or before them"
                raise BranchError(problem, at=_only_in_one(first[0][1], paths), fix=fix)
            return out

        return run

    out, groups = choose([run_of(fn) for fn in fns], groups, *operands)
    call.leave(groups, first[0][0])
    return out


def _only_in_one(these: list[tuple], those: list[tuple]) -> str:
    return ", ".join(show_path(path[2:]) for path in [*these, *those] if (path in these) != (path in those))
