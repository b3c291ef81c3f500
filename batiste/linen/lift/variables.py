# SPDX-License-Identifier: Apache-2.0
"""Functions of scopes that see their variables or keys in another form: map_variables, swap_collection, fold_rngs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ..filters import in_filter, intersect_filters, subtract_filters, union_filters
from ..scope import Frame, Scope, cell_of
from .call import LiftedCall, is_scope


def _same(variables: Any) -> Any:
    return variables


def map_variables(
    fn: Callable[..., Any],
    mapped_collections: Any,
    map_in_fn: Callable[..., Any] = _same,
    map_out_fn: Callable[..., Any] = _same,
    init: bool = False,
    mutable: bool = False,
    rngs: Any = True,
    variables: Any = True,
) -> Callable[..., Any]:
    """fn(scopes, *args), which sees `map_in_fn(variables)` in place of some collections.

    Args:
        mapped_collections: the collections that `map_in_fn` is given, as nested dicts by collection.
        map_out_fn: brings what `fn` made or wrote of them into the outer form.
        init: `fn` may make variables: it is called once before with the variables as they are, where they may be
            written, and `map_out_fn` makes the outer form of what it leaves behind.
        mutable: `fn` may write the mapped collections.
        rngs: the streams that are passed on.
        variables: the other collections that are passed on.
    """

    def inner(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        each, structure = jax.tree.flatten(scopes, is_leaf=is_scope)

        def call(copies: _Copies) -> Any:
            return fn(structure.unflatten(map(copies.of, each)), *args, **kwargs)

        if init and any(_may_write(scope, mapped_collections) for scope in each):
            copies = _Copies(each, mapped_collections, variables, rngs, _same, True)
            call(copies)
            copies.write_back(map_out_fn, others=False)
        copies = _Copies(each, mapped_collections, variables, rngs, map_in_fn, init or mutable)
        out = call(copies)
        copies.write_back(map_out_fn if init or mutable else None)
        return out

    return inner


def _may_write(scope: Scope, collections: Any) -> bool:
    """Whether any of these collections may be written."""
    return intersect_filters(scope.mutable, collections) not in (False, set())


class _Copies:
    """Scopes with Variables of their own, the mapped collections in another form; the counts of keys are shared.

    Args:
        mapped, others: the collections that go through `map_in`, and those that are passed on as they are.
        writable: may the mapped collections be written?
    """

    def __init__(self, scopes: Iterable[Scope], mapped: Any, others: Any, rngs: Any,
                 map_in: Callable[..., Any], writable: bool):  # fmt: skip
        self.mapped, self.others, self.rngs = mapped, others, rngs
        self.map_in, self.writable = map_in, writable
        self.frames: dict[int, Frame] = {}
        self.tops: list[tuple[Scope, Scope]] = []
        self.made: dict[int, Scope] = {}
        for scope in sorted(scopes, key=lambda scope: len(scope.steps)):
            self.made[id(scope)] = self._below_another(scope) or self._copy(scope)

    def of(self, scope: Scope) -> Scope:
        return self.made[id(scope)]

    def _below_another(self, scope: Scope) -> Scope | None:
        for top, copy in self.tops:
            if top.frame is scope.frame and scope.steps[: len(top.steps)] == top.steps:
                for name in scope.steps[len(top.steps) :]:
                    copy = copy.push(name, reuse=True)
                return copy
        return None

    def _copy(self, scope: Scope) -> Scope:
        trees = scope.variables()
        mapped = {col: trees.pop(col) for col in list(trees) if in_filter(self.mapped, col)}
        trees = {col: tree for col, tree in trees.items() if in_filter(self.others, col)} | dict(self.map_in(mapped))
        cells = {col: {name: cell_of(col, x) for name, x in tree.items()} for col, tree in trees.items()}
        copy = Scope.at(self._frame(scope.frame), cells, scope.steps)
        copy.frame.shown = scope.frame.shown
        copy.show_as("map_variables")
        self.tops.append((scope, copy))
        return copy

    def _frame(self, old: Frame) -> Frame:
        frame = self.frames.get(id(old))
        if frame is None:
            seen = union_filters(self.mapped, self.others) if self.writable else self.others
            mutable = intersect_filters(old.mutable, seen)
            mutable = mutable if self.writable else subtract_filters(mutable, self.mapped)
            keys = {name: key.get_value() for name, key in old.rngs.items() if in_filter(self.rngs, name)}
            frame = self.frames[id(old)] = Frame(keys, mutable, old.flags, old.base.path)
            frame.counts = old.counts
        return frame

    def write_back(self, map_out: Callable[..., Any] | None, others: bool = True) -> None:
        """Writes what may be written into the scopes: the mapped collections by way of `map_out`, and the others."""
        for scope, copy in self.tops:
            trees = copy.mutable_variables()
            mapped = {col: trees.pop(col) for col in list(trees) if in_filter(self.mapped, col)}
            if map_out is not None:
                _put(scope, map_out(mapped))
            if others:
                _put(scope, trees)


def _put(scope: Scope, trees: Mapping[str, Mapping[str, Any]]) -> None:
    for col, tree in trees.items():
        if scope.is_mutable_collection(col):
            for name, value in tree.items():
                scope.put_variable(col, name, value)


def swap_collection(fn: Callable[..., Any], col_a: str, col_b: str) -> Callable[..., Any]:
    """`fn`, which sees the collections `col_a` and `col_b` under each other's name."""

    def swapped(variables: Mapping[str, Any]) -> dict[str, Any]:
        return {col_a: variables.get(col_b, {}), col_b: variables.get(col_a, {})}

    return map_variables(fn, (col_a, col_b), swapped, swapped, mutable=True)


def fold_rngs(fn: Callable[..., Any], variables: Any = True, rngs: Any = True) -> Callable[..., Any]:
    """`fn`, which sees new keys, into which the path of each scope has gone already.

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
    """

    def inner(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        call = LiftedCall("fold_rngs", fn, scopes, into=variables, out=variables, rngs=rngs, folded=True)
        out = fn(call.structure.unflatten(call.views), *args, **kwargs)
        call.settle()
        return out

    return inner
