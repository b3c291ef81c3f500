# SPDX-License-Identifier: Apache-2.0
"""Filters of collections: a bool, a name, several names, or all names but some. They form a set algebra."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from batiste.errors import InvalidFilterError


class DenyList:
    """A filter of collections: all but those that `deny` lets through.

    >>> in_filter(DenyList("params"), "cache"), in_filter(DenyList(["params"]), "params")
    (True, False)
    """

    def __init__(self, deny: Any):
        self.deny = deny

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenyList) and self.deny == other.deny

    def __hash__(self) -> int:
        return hash(("DenyList", self.deny if isinstance(self.deny, (bool, str, DenyList)) else frozenset(self.deny)))

    def __repr__(self) -> str:
        return f"DenyList(deny={self.deny!r})"


CollectionFilter = bool | str | Collection[str] | DenyList


def in_filter(filter_like: Any, col: str) -> bool:
    """Whether a filter lets the collection `col` through.

    Raises:
        InvalidFilterError: it is no bool, name, set of names, or DenyList.
    """
    if isinstance(filter_like, bool):
        return filter_like
    if isinstance(filter_like, str):
        return col == filter_like
    if isinstance(filter_like, Collection):
        return col in filter_like
    if isinstance(filter_like, DenyList):
        return not in_filter(filter_like.deny, col)
    raise InvalidFilterError(filter_like)


def _names(filter_like: Any) -> tuple[set[str], bool]:
    """`(names, False)` for these names, `(names, True)` for all others."""
    if isinstance(filter_like, bool):
        return set(), filter_like
    if isinstance(filter_like, str):
        return {filter_like}, False
    if isinstance(filter_like, Collection):
        return set(filter_like), False
    if isinstance(filter_like, DenyList):
        names, others = _names(filter_like.deny)
        return names, not others
    raise InvalidFilterError(filter_like)


def _filter(names: set[str], others: bool) -> Any:
    return DenyList(names) if others else names


def filter_to_set(x: Any) -> set[str]:
    """The names that a filter lets through.

    Raises:
        AssertionError: it lets all but some through.
    """
    names, others = _names(x)
    if others:
        raise AssertionError(f"Infinite set: {x!r} lets all names through but {sorted(names)}.")
    return names


def is_filter_empty(filter_like: Any) -> bool:
    """Whether a filter lets nothing through."""
    return _names(filter_like) == (set(), False)


def union_filters(a: Any, b: Any) -> Any:
    """What `a` or `b` lets through.

    >>> union_filters("a", ["a", "b"]) == {"a", "b"}
    True
    """
    (these, a_others), (those, b_others) = _names(a), _names(b)
    if a is True or b is True:
        return True
    if a_others and b_others:
        return DenyList(these & those)
    if a_others or b_others:
        return DenyList(these - those if a_others else those - these)
    return these | those


def intersect_filters(a: Any, b: Any) -> Any:
    """What both `a` and `b` let through.

    >>> intersect_filters(DenyList("a"), ["a", "b"])
    {'b'}
    """
    (these, a_others), (those, b_others) = _names(a), _names(b)
    if a is True or b is True:
        return b if a is True else a
    if a_others or b_others:
        return _filter(these | those if a_others and b_others else those - these if a_others else these - those,
                       a_others and b_others)  # fmt: skip
    return these & those


def subtract_filters(a: Any, b: Any) -> Any:
    """What `a` lets through and `b` does not.

    >>> subtract_filters(True, "a")
    DenyList(deny='a')
    """
    if b is True:
        return False
    return intersect_filters(a, DenyList(b))


def group_collections(xs: Mapping[str, Any], col_filters: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """For each filter the collections of `xs` that it lets through and none before it did.

    >>> group_collections({"a": 1, "b": 2}, ["a", True])
    ({'a': 1}, {'b': 2})
    """
    rest = dict(xs)
    return tuple({col: rest.pop(col) for col in list(rest) if in_filter(wanted, col)} for wanted in col_filters)
