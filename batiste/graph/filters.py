# SPDX-License-Identifier: Apache-2.0
"""Filters: which paths of a State, and which Variables.

A filter is a predicate `(path, value) -> bool` with a short spelling: a Variable type, a tag, `...` for everything,
None for nothing, a list of filters for any of them.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from types import EllipsisType
from typing import Any as AnyValue

from .errors import FilterError
from .variable import Variable

Key = Hashable
Path = tuple[Key, ...]
Predicate = Callable[[Path, AnyValue], bool]
Filter = AnyValue


def to_predicate(filter: Filter) -> Predicate:
    """The predicate that a short spelling stands for.

    Raises:
        FilterError: `filter` is none.

    >>> to_predicate([Variable, "tag"])
    Any(OfType(<class 'batiste.graph.variable.Variable'>), WithTag('tag'))
    """
    if isinstance(filter, str):
        return WithTag(filter)
    if isinstance(filter, type):
        return OfType(filter)
    if isinstance(filter, bool):
        return Everything() if filter else Nothing()
    if isinstance(filter, EllipsisType):
        return Everything()
    if filter is None:
        return Nothing()
    if callable(filter):
        return filter  # type: ignore[return-value]
    if isinstance(filter, (list, tuple)):
        return Any(*filter)
    raise FilterError(
        "Invalid collection filter",
        got=repr(filter),
        expected="a Variable type, a tag, ..., None, True, False, a callable (path, value) -> bool, or a list of those",
    )


def to_predicates(filters: Sequence[Filter]) -> tuple[Predicate, ...]:
    """The predicates of several filters of which the first that matches counts.

    Raises:
        ValueError: `...` or True stands before another filter, which could never match.
    """
    for index, filter in enumerate(filters):
        if _is_everything(filter) and not all(map(_is_everything, filters[index + 1 :])):
            raise ValueError(
                "`...` or `True` can only be used as the last filters, for they match everything: "
                f"got {filter} at index {index}."
            )
    return tuple(map(to_predicate, filters))


def _is_everything(filter: Filter) -> bool:
    return filter is ... or filter is True


filters_to_predicates = to_predicates


@dataclasses.dataclass(frozen=True)
class WithTag:
    """Matches what carries this `tag`."""

    tag: str

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return getattr(x, "tag", None) == self.tag

    def __repr__(self):
        return f"WithTag({self.tag!r})"


HasTag = WithTag


@dataclasses.dataclass(frozen=True)
class PathContains:
    """Matches paths that hold a key; with `exact=False` the key may be a part of a path's key."""

    key: Key
    exact: bool = True

    def __call__(self, path: Path, x: AnyValue) -> bool:
        if self.exact:
            return self.key in path
        return any(str(self.key) in str(part) for part in path)

    def __repr__(self):
        return f"PathContains({self.key!r}, exact={self.exact})"


class PathIn:
    """Matches exactly these paths."""

    def __init__(self, *paths: Path):
        self.paths = frozenset(paths)

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return path in self.paths

    def __repr__(self):
        return f"PathIn({', '.join(map(repr, self.paths))})"

    def __eq__(self, other):
        return isinstance(other, PathIn) and self.paths == other.paths

    def __hash__(self):
        return hash(self.paths)


@dataclasses.dataclass(frozen=True)
class OfType:
    """Matches instances of a type; also what stands for a Variable of that type."""

    type: builtins.type

    def __call__(self, path: Path, x: AnyValue) -> bool:
        if isinstance(x, self.type):
            return True
        kind = getattr(x, "type", None) if not isinstance(x, Variable) else None
        return isinstance(kind, type) and issubclass(kind, self.type)

    def __repr__(self):
        return f"OfType({self.type!r})"


class _Combined:
    def __init__(self, *filters: Filter):
        self.predicates = tuple(map(to_predicate, filters))

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(map(repr, self.predicates))})"

    def __eq__(self, other):
        return type(self) is type(other) and self.predicates == other.predicates

    def __hash__(self):
        return hash((type(self), self.predicates))


class Any(_Combined):
    """Matches what any of the filters matches."""

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return any(p(path, x) for p in self.predicates)


class All(_Combined):
    """Matches what all of the filters match."""

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return all(p(path, x) for p in self.predicates)


class Not:
    """Matches what the filter does not match."""

    def __init__(self, collection_filter: Filter, /):
        self.predicate = to_predicate(collection_filter)

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return not self.predicate(path, x)

    def __repr__(self):
        return f"Not({self.predicate!r})"

    def __eq__(self, other):
        return isinstance(other, Not) and self.predicate == other.predicate

    def __hash__(self):
        return hash((Not, self.predicate))


@dataclasses.dataclass(frozen=True)
class Everything:
    """Always matches; the same as `...` and True."""

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return True

    def __repr__(self):
        return "Everything()"


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Never matches; the same as None and False."""

    def __call__(self, path: Path, x: AnyValue) -> bool:
        return False

    def __repr__(self):
        return "Nothing()"
