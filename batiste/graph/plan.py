# SPDX-License-Identifier: Apache-2.0
"""Plans: the remembered flattening of a call, valid until the epoch moves.

A jitted function of live objects needs, on every call, the values of their Variables and where to write the results. A
`Plan` keeps both as flat lists: reading is one list comprehension, writing one loop. It is dropped with the objects it
speaks of, which it holds weakly.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from .boundary import Boundary, Note, is_root, write_back
from .captured import note_read, recorders
from .epoch import Epoch
from .errors import BatisteError
from .jaxcompat import current_trace
from .structure import comparable
from .variable import Variable

_set = Variable._raw_value.__set__  # type: ignore[attr-defined]
_drain = deque(maxlen=0).extend


class StalePlanError(BatisteError):
    """A remembered flattening no longer described the objects: someone went around attribute assignment."""


def _watch(container: Any) -> Callable[[], bool]:
    """A question that is answered with True while a plain container holds the very same children."""
    if isinstance(container, dict):
        keys, values, n = list(container), list(container.values()), len(container)
        return lambda: (
            len(container) == n
            and all(map(operator.is_, container.values(), values))
            and all(map(operator.eq, container, keys))
        )
    if isinstance(container, list):
        items = list(container)
        return lambda: len(container) == len(items) and all(map(operator.is_, container, items))
    children, form = jax.tree.flatten(container, is_leaf=lambda x: x is not container)

    def same() -> bool:
        now, now_form = jax.tree.flatten(container, is_leaf=lambda x: x is not container)
        return len(now) == len(children) and all(map(operator.is_, now, children)) and now_form == form

    return same


def _watch_setting(value: Any) -> Callable[[], bool]:
    """A question that is answered with True while a list, dict or set in a static attribute has the same contents."""
    contents = comparable(value)
    return lambda: comparable(value) == contents


class Landing(NamedTuple):
    """Where the results of a program go: per group the Variables that come first, and per result (group, position)."""

    note: Note
    targets: list[list[Variable]]
    places: list[tuple[int, int]]
    writes: bool


_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by the id of an object


def lock_of(root: Any) -> Any:
    """The lock of an object: all plans that begin with it have the same one, whatever their functions."""
    return _locks.setdefault(id(root), threading.RLock())


class Plan:
    """The flattening of one call: `program` runs it, `gather` reads its inputs and `scatter` writes its results."""

    def __init__(
        self, boundary: Boundary, leaves: Sequence[Any], program: Callable[..., Any], forget: Callable[[Plan], None]
    ):
        flat, crossing = boundary.flat, boundary.crossing
        self.epoch, self.trace, self.program = Epoch.now, current_trace(), program
        self.labels = crossing.labels
        self.roots = [(i, weakref.ref(x, lambda _: forget(self))) for i, x in enumerate(leaves) if is_root(x)]
        self.kinds = [is_root(x) for x in leaves]
        self.types: list[type] | None = None  # of the arguments, where these are nothing but objects and arrays
        self.leaves = [x if is_variable else None for x, is_variable in zip(flat.leaves, flat.variables)]
        self.objects = {i: weakref.ref(x) for i, x in flat.objects.items()}
        self.watches = [*map(_watch, flat.containers), *map(_watch_setting, flat.settings)]
        positions = iter([i for i, x in enumerate(leaves) if not is_root(x)])
        self.sources: dict[int, Callable[[Sequence[Any]], Any]] = {}
        for n in flat.plain:
            self.sources[n] = operator.itemgetter(next(positions))
        for n, (x, is_variable) in enumerate(zip(flat.leaves, flat.variables)):
            if n in flat.slots:
                owner, name = flat.slots[n]
                self.sources[n] = _slot_reader(weakref.ref(owner), name)
            elif not is_variable and n not in self.sources:
                self.sources[n] = _constant(x)
        self.groups = []
        for part in crossing.order:
            variables = [flat.leaves[n] for n in part if n not in self.sources]
            self.groups.append((variables, [self.sources[n] for n in part[len(variables) :]]))
        self.landing: Landing | None = None  # of the latest note; replaced whole, for threads may share a plan
        self.lock = lock_of(self.roots[0][1]()) if self.roots else threading.RLock()

    def run(self, leaves: Sequence[Any]) -> Any:
        """Calls the program. Calls from several threads that write follow each other, if they get one object first."""
        with self.lock:
            inputs = self.gather(leaves)
            if self.landing is None or self.landing.writes:
                groups, note = self.program(*inputs)
                return self.scatter(groups, note, leaves)
        groups, note = self.program(*inputs)
        return self.scatter(groups, note, leaves)

    def takes(self, args: tuple) -> bool:
        """Whether these arguments are the leaves themselves, and the plan describes them: the shortest way."""
        return list(map(type, args)) == self.types and self.is_current(args)

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether the plan describes these leaves, whose plain structure is known to be the same."""
        return self.kinds == [is_root(x) for x in leaves] and self.is_current(leaves)

    def is_current(self, leaves: Sequence[Any]) -> bool:
        """Whether the objects are the same and nothing of their structure has changed."""
        if self.epoch != Epoch.now:
            return False
        for i, root in self.roots:
            if leaves[i] is not root():
                return False
        for same in self.watches:
            if not same():
                return False
        return self.trace == current_trace()

    def gather(self, leaves: Sequence[Any]) -> list[list[Any]]:
        """The present values, one list per label."""
        if recorders:
            for variables, _ in self.groups:
                for v in variables:
                    note_read(v)
        return [
            [v._raw_value for v in variables] + [read(leaves) for read in others]
            if others
            else [v._raw_value for v in variables]
            for variables, others in self.groups
        ]

    def scatter(self, groups: Sequence[Sequence[Any]], note: Note, leaves: Sequence[Any]) -> Any:
        """Writes the results into the same objects; returns the function's result."""
        landing = self.landing
        if landing is None or landing.note is not note:
            landing = self.landing = self.learn(note)
        if not note.plain:
            objects = {i: ref() for i, ref in self.objects.items()}
            entry = [x if x is not None else self.sources[n](leaves) for n, x in enumerate(self.leaves)]
            return write_back(note, [groups[g][i] for g, i in landing.places], entry, objects)
        for targets, values in zip(landing.targets, groups):
            _drain(map(_set, targets, values))
        if len(groups) == 1:
            return note.out.treedef.unflatten(groups[0][len(landing.targets[0]) :])
        return note.out.treedef.unflatten([groups[g][i] for g, i in landing.places[len(note.changed) :]])

    def learn(self, note: Note) -> Landing:
        """Where the parts of the results go; the first of each group are values of Variables."""
        counts, places = [0] * len(self.labels), []
        where = {label: g for g, label in enumerate(self.labels)}
        targets: list[list[Variable]] = [[] for _ in self.labels]
        for n, label in enumerate(note.labels):
            g = where[label]
            places.append((g, counts[g]))
            counts[g] += 1
            if n < len(note.changed):
                target: Variable = self.leaves[note.changed[n]]  # type: ignore[assignment]
                target._check_can_update()  # once for all calls: a plan stays at the trace level it was made at
                targets[g].append(target)
        return Landing(note, targets, places, not note.plain or bool(note.changed))

    def check(self, boundary: Boundary) -> None:
        """Compares the plan with a fresh walk.

        Raises:
            StalePlanError: they differ.
        """
        fresh = [x if is_variable else None for x, is_variable in zip(boundary.flat.leaves, boundary.flat.variables)]
        if len(fresh) != len(self.leaves) or any(a is not b for a, b in zip(fresh, self.leaves)):
            raise StalePlanError(
                "the remembered structure of a call's arguments is out of date",
                fix="change attributes by assignment, not through __dict__ or object.__setattr__",
            )


def _slot_reader(owner: weakref.ref, name: str):
    return lambda leaves: owner().__dict__[name]  # type: ignore[union-attr]


def _constant(x: Any):
    return lambda leaves: x
