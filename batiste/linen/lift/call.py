# SPDX-License-Identifier: Apache-2.0
"""One call of a lifted function: how scopes pass through a JAX transform.

    scopes --view--> views --Boundary--> [trace: fn(copies of the views, *args)] --Boundary--> views --settle--> scopes

A *view* of a scope is another scope around the very same Variables: of the collections that are lifted in, in a frame
that lets write those that are lifted out. The views of one call share a frame as their scopes do. Plain arguments go
directly through the transform, beside the groups of values into which the Boundary sorts the Variables by their labels.

Names that are taken inside and scopes that stay empty are forgotten: so what one trace leaves behind differs from what
it met by new variables alone, and the two branches of a `cond` may name different scopes. Counts of keys go on from
trace to trace, also where one function is traced twice for one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax

from batiste.graph import RngKey, Variable
from batiste.graph.boundary import Boundary, Mode, Note, Rule

from ..filters import in_filter, intersect_filters
from ..scope import Frame, Scope, cell_of

Labels = Callable[[str], Hashable]


def _one_label(_: str) -> None:
    return None


def is_scope(x: Any) -> bool:
    return isinstance(x, Scope)


class ByCollection(Rule):
    """Labels of the Variables of scopes: by collection, and of keys by stream."""

    def __init__(self, of_collection: Labels, of_stream: Labels):
        self.labels = ()
        self.of_collection, self.of_stream = of_collection, of_stream

    def __call__(self, path: tuple, x: Any) -> Hashable:
        return self.of_stream(path[-1]) if isinstance(x, RngKey) else self.of_collection(path[-2])


class LiftedCall:
    """The passage of one call.

    Args:
        name: of the transform.
        scopes: a scope, or a tree of them.
        into: the collections that are seen inside.
        out: the collections that may be written inside.
        rngs: the streams that are seen inside.
        labels, streams: the label of a collection, and of a stream.
        all_labels: those that new variables may get.
        keep: which Variables come back although they did not change: a predicate on their label.
        folded: a frame for each top scope, whose path goes into the keys.
    """

    def __init__(self, name: str, fn: Callable[..., Any], scopes: Any, *, into: Any = True, out: Any = True,
                 rngs: Any = True, labels: Labels = _one_label, streams: Labels = _one_label,
                 all_labels: Iterable[Hashable] = (None,), keep: Callable[[Any], bool] | None = None,
                 folded: bool = False):  # fmt: skip
        self.name, self.fn, self.into, self.out, self.rngs = name, fn, into, out, rngs
        self.rule, self.all_labels, self.keep, self.folded = (
            ByCollection(labels, streams),
            tuple(all_labels),
            keep,
            folded,
        )
        self.scopes, self.structure = jax.tree.flatten(scopes, is_leaf=is_scope)
        self.frames: dict[int, tuple[Frame, Frame]] = {}
        self.steps: dict[int, tuple[str, ...]] = {}  # below the old frame: a program brings the base of its first call
        self.made: dict[int, Scope] = {}
        self.given = {id(scope) for scope in self.scopes}
        for scope in sorted(self.scopes, key=lambda scope: len(scope.steps)):  # what lies below another goes with it
            scope._check_valid()
            if id(scope) not in self.made:
                scope.open_all()
                self._view(scope, self._frame(scope))
        self.views = [self.made[id(scope)] for scope in self.scopes]
        for view in {id(view): view for view in self.views}.values():
            view.show_as(name)
        self.counts = {id(frame): dict(frame.counts) for _, frame in self.frames.values()}

    # ------------------------------------------------------------ views
    def _frame(self, scope: Scope) -> Frame:
        key = id(scope) if self.folded else id(scope.frame)
        if key not in self.frames:
            old, steps = scope.frame, scope.steps if self.folded else ()
            names = [name for name in old.rngs if in_filter(self.rngs, name)]
            keys = {name: scope.make_rng(name) if self.folded else old.rngs[name].get_value() for name in names}
            new = Frame(keys, intersect_filters(old.mutable, self.out), old.flags, old.base.path + steps)
            new.counts = {
                (path[len(steps) :], name): count
                for (path, name), count in old.counts.items()
                if path[: len(steps)] == steps
            }
            new.shown = old.shown
            self.frames[key], self.steps[id(new)] = (old, new), steps
        return self.frames[key][1]

    def _view(self, scope: Scope, frame: Frame) -> Scope:
        cells = {col: dict(cells) for col, cells in scope.cells.items() if cells and in_filter(self.into, col)}
        view = self.made[id(scope)] = Scope.at(frame, cells, scope.path[len(frame.base.path) :])
        for name, child in scope.children.items():
            below = self._view(child, frame)
            if id(child) in self.given or not _is_bare(below):
                view.children[name] = below
        return view

    def variables(self) -> Iterable[tuple[Hashable, Variable]]:
        """The Variables of all views with their labels."""
        for scope in self.made.values():
            for col, cells in scope.cells.items():
                for x in cells.values():
                    yield self.rule.of_collection(col), x

    def map_keys(self, fn: Callable[[str, jax.Array], jax.Array]) -> None:
        """Puts `fn(stream, key)` in place of the keys of the views."""
        for _, frame in self.frames.values():
            for name, x in frame.rngs.items():
                x.set_raw_value(fn(name, x.get_raw_value()))

    # ------------------------------------------------------------ through the transform
    def enter(self) -> tuple[list[Any], ...]:
        """The values of the views' Variables, one list per label."""
        self.boundary = Boundary(self.fn, Mode(True, True, self.name), None, keep=self.keep)
        groups = self.boundary.enter((self.views,), specs=[self.rule] * len(self.views), labels=self.all_labels)
        self.crossing = self.boundary.crossing
        return groups

    @property
    def labels(self) -> tuple:
        return self.boundary.labels

    def run(self, groups: Sequence[Sequence[Any]], *args: Any, **kwargs: Any) -> tuple[Any, tuple[list[Any], ...]]:
        """What the transform calls: `(fn(scopes, *args), what comes back by label)`."""
        return self.run_other(self.fn, groups, *args, **kwargs)

    def run_other(self, fn: Callable[..., Any], groups: Sequence[Sequence[Any]], *args: Any,
                  **kwargs: Any) -> tuple[Any, tuple[list[Any], ...]]:  # fmt: skip
        """`run` of another function."""
        crossing = self.crossing
        before = crossing.ungroup(groups)
        (views,), opened = crossing.open(before)
        frames = {id(view.frame): inner.frame for view, inner in zip(self.views, views)}
        if not self.folded:
            at_entry = {key: frame.counts for key, frame in frames.items()}
            for key, frame in frames.items():
                frame.counts = dict(self.counts[key])
        for view in views:
            view.adopt()
        out = fn(jax.tree.unflatten(self.structure, views), *args, **kwargs)
        if not self.folded:  # else they are a part of what a cached program leaves behind
            self.counts.update({key: frame.counts for key, frame in frames.items()})
            for key, frame in frames.items():
                frame.counts = at_entry[key]
        given = {id(view) for view in views}
        for view in views:
            _tidy(view, given)
        return out, crossing.close(before, opened, ())

    @property
    def note(self) -> Note:
        assert self.crossing.note is not None
        return self.crossing.note

    def without_objects(self) -> LiftedCall:
        """The static half, which a compiled program may keep."""
        other = copy.copy(self)
        other.scopes, other.views, other.made, other.frames = [], [], {}, {}
        del other.boundary
        return other

    def ask(self, fn: Callable[..., Any], groups: Sequence[Sequence[Any]], *args: Any) -> Any:
        """The result of a function that may write nothing."""

        def asked(scopes: Any, *args: Any) -> Any:
            for scope in jax.tree.leaves(scopes, is_leaf=is_scope):
                scope.frame.mutable = False
            return fn(scopes, *args)

        crossing = self.crossing
        self.crossing = copy.copy(crossing)
        try:
            return self.run_other(asked, groups, *args)[0]
        finally:
            self.crossing = crossing

    def put(self, label: Hashable, values: Sequence[Any]) -> None:
        """Writes what came back under one label into the views, and so into the Variables of the scopes."""
        if values:
            self._check_traces()
        paths = [path for path, other in zip(self.crossing.sent, self.note.labels) if other == label]
        for path, value in zip(paths, values):
            put_at(path, self.views, value)

    # ------------------------------------------------------------ back
    def leave(self, groups: Sequence[Sequence[Any]], note: Note | None = None) -> None:
        """Writes what came back into the scopes.

        Raises:
            JaxTransformError: they were made outside the JAX transform that is running.
        """
        note = note or self.note
        if note.changed or note.args is not None:
            self._check_traces()
        self.boundary.leave(groups, note)
        self.settle()

    def _check_traces(self) -> None:
        for scope in self.scopes:
            scope._check_trace()

    def settle(self) -> None:
        """Lets the scopes take over what is new in the views."""
        done: set[int] = set()
        for scope, view in zip(self.scopes, self.views):
            self._take_over(scope, view, done)
            for col in view.collections():
                if in_filter(self.out, col):
                    scope.note(col, *scope.sort(col))
        for old, new in self.frames.values():
            counts = new.counts if self.folded else self.counts[id(new)]
            steps = self.steps[id(new)]
            old.counts.update({((*steps, *path), name): count for (path, name), count in counts.items()})

    def _take_over(self, scope: Scope, view: Scope, done: set[int]) -> None:
        if id(view) in done:
            return
        done.add(id(view))
        for col, cells in view.cells.items():
            scope.order(col)  # is kept; what is new is sorted in the end
            if in_filter(self.into, col) and in_filter(self.out, col):
                scope.cells[col] = dict(cells)
            elif in_filter(self.out, col):
                scope.cells.setdefault(col, {}).update(cells)
        for name, child in view.children.items():
            self._take_over(scope.children.get(name) or scope._make_child(name), child, done)


def below(scopes: Any) -> Iterator[Scope]:
    """The scopes of a tree and all below them, each once."""
    open_, done = jax.tree.leaves(scopes, is_leaf=is_scope), set()
    while open_:
        scope = open_.pop()
        if id(scope) not in done:
            done.add(id(scope))
            open_.extend(scope.children.values())
            yield scope


def _is_bare(scope: Scope) -> bool:
    return not any(scope.cells.values()) and not scope.children


def _tidy(scope: Scope, given: set[int]) -> None:
    """Forgets what names are taken, and scopes without variables but for the given ones."""
    scope.reserved.clear()
    for name, child in list(scope.children.items()):
        _tidy(child, given)
        if _is_bare(child) and id(child) not in given:
            del scope.children[name]


def first_axis_size(pairs: Iterable[tuple[Any, Any]]) -> int | None:
    """The size of the mapped axis, by the first pair (axis, value) whose axis is a number."""
    for axis, value in pairs:
        if isinstance(axis, int):
            for x in jax.tree.leaves(value):
                return jax.numpy.shape(x)[axis]
    return None


def put_at(path: tuple, views: Sequence[Scope], value: Any) -> None:
    """Writes the variable that a path inside the views speaks of, or makes it."""
    _, number, *steps = path
    scope = views[number]
    while steps[0] == "children":
        _, name, *steps = steps
        scope = scope.children.get(name) or scope._make_child(name)
    _, col, name = steps
    cells = scope.cells.setdefault(col, {})
    if name in cells:
        cells[name].set_raw_value(value)
    else:
        cells[name] = cell_of(col, value)
