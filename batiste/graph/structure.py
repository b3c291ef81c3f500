# SPDX-License-Identifier: Apache-2.0
"""The static half of objects: hashable descriptions of types, names and settings, and of what is one and the same.

A `GraphDef` is a tree of descriptions. Objects and Variables are numbered in the order they are met; a `RefDef` stands
where one was met before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from .errors import StaticError
from .metadata import Frozen
from .represent import Layout, represent

Node = TypeVar("Node")
Path = tuple[Any, ...]

# ---------------------------------------------------------------- the static half: hashable descriptions
OBJECT, VARIABLE, ARRAY_REF, TREE, REF, LEAF, STATIC, SHARED = range(8)


class ObjectDef(NamedTuple):
    """A graph object: `keys` and `children` are its data, `settings` its static attributes."""

    tag: int
    type: type
    index: int
    keys: tuple
    children: tuple
    settings: Settings
    names: tuple  # attributes in the order of assignment, with their status


class VariableDef(NamedTuple):
    """A Variable; `ref` is the number of the `jax.Ref` in it. If that was met before (SHARED), there is no leaf."""

    tag: int
    type: type
    index: int
    metadata: Frozen
    ref: int | None = None


class ArrayRefDef(NamedTuple):
    """A bare `jax.Ref`, which has an identity but no metadata."""

    tag: int
    index: int


class TreeDef(NamedTuple):
    """Any other pytree node: a value. `form` rebuilds it: a type for the built-in ones, else a PyTreeDef."""

    tag: int
    form: Any
    keys: tuple
    children: tuple


class RefDef(NamedTuple):
    """An object that was met before."""

    tag: int
    index: int


class LeafDef(NamedTuple):
    tag: int


class StaticDef(NamedTuple):
    tag: int
    setting: Settings


LEAF_DEF = LeafDef(LEAF)


class Settings:
    """Static attributes: compared by value *and type* (1 is not True; lists equal tuples), hashed when first asked."""

    __slots__ = ("names", "values", "_key", "_hash")

    def __init__(self, names: tuple, values: tuple):
        self.names, self.values = names, values
        self._key: Any = None
        self._hash: int | None = None

    def key(self):
        if self._key is None:
            self._key = (self.names, tuple(map(type, self.values)), tuple(map(comparable, self.values)))
        return self._key

    def __hash__(self):
        if self._hash is None:
            try:
                self._hash = hash(self.key())
            except TypeError:
                raise self._unhashable() from None
        return self._hash

    def _unhashable(self) -> StaticError:
        for name, value in zip(self.names, self.values):
            try:
                hash(comparable(value))
            except TypeError as error:
                return StaticError(
                    f"static attribute '{name}' cannot be hashed",
                    got=f"{type(value).__name__} ({error})",
                    expected="a value with __hash__ and __eq__",
                    fix=f"make it hashable, or mark it as data: self.{name} = nnx.data(...)",
                )
        return StaticError("static attributes cannot be hashed")

    def __eq__(self, other):
        return self is other or (isinstance(other, Settings) and self.key() == other.key())


ATOMS = frozenset({int, float, bool, str, type(None), bytes, complex, type, type(lambda: None), type(len), type(...)})


def comparable(value: Any) -> Any:
    """A hashable copy of a setting: plain containers are turned into tuples, so that a change in place is seen."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind is list or kind is tuple:
        return (kind, tuple(map(comparable, value)))
    if kind is dict:
        return (kind, tuple((k, comparable(v)) for k, v in value.items()))
    if kind is set:
        return (kind, frozenset(value))
    return value


def show_path(path: Path) -> str:
    return "/".join(map(str, path)) or "<root>"


# ---------------------------------------------------------------- GraphDef
class GraphDef(Generic[Node]):
    """The static half of an object: types, names, settings, and which objects are one and the same. No arrays.

    Two equal GraphDefs describe the same program, so it is what compiled functions are remembered by.
    """

    __slots__ = ("root", "num_leaves", "leaf_types", "_hash", "_paths")

    def __init__(self, root: Any, num_leaves: int, paths: list[Path] | None = None):
        self.root, self.num_leaves, self._paths = root, num_leaves, paths
        self.leaf_types: list[Any] | None = None  # shapes and dtypes at the time of a split: known, and no part of it
        self._hash: int | None = None

    def __hash__(self):
        if self._hash is None:
            self._hash = hash(self.root)
        return self._hash

    def __eq__(self, other):
        if self is other:
            return True
        return isinstance(other, GraphDef) and self.num_leaves == other.num_leaves and self.root == other.root

    @property
    def paths(self) -> list[Path]:
        """The path of each leaf, in order."""
        if self._paths is None:
            self._paths = [path for path, d in walk_defs(self.root) if d[0] in (LEAF, VARIABLE, ARRAY_REF)]
        return self._paths

    @property
    def nodes(self) -> list[Any]:
        """The descriptions of objects, containers and Variables, in the order they are met."""
        return [d for _, d in walk_defs(self.root) if d[0] not in (LEAF, STATIC)]

    @property
    def attributes(self) -> list[tuple[Any, Any]]:
        """The pairs (name, description) of all attributes, in the order they are met."""
        found: list[tuple[Any, Any]] = []
        for _, d in walk_defs(self.root):
            if d[0] == OBJECT:
                found += zip(d.settings.names, d.settings.values)
            if d[0] in (OBJECT, TREE):
                found += zip(d.keys, d.children)
        return found

    def with_no_outer_index(self) -> GraphDef[Node]:
        return self

    def with_same_outer_index(self) -> GraphDef[Node]:
        return self

    def with_matching_outer_index(self, other) -> GraphDef[Node]:
        return self

    def __batiste_repr__(self) -> Layout:
        lines = [(show_path(path), _summary(d)) for path, d in walk_defs(self.root) if d[0] not in (LEAF, STATIC)]
        return Layout("GraphDef", [*lines, ("num_leaves", self.num_leaves)], join=": ")

    def __repr__(self) -> str:
        return represent(self)

    def __getstate__(self):
        return self.root, self.num_leaves

    def __setstate__(self, state):
        self.root, self.num_leaves = state
        self.leaf_types = self._hash = self._paths = None


def _summary(d: Any) -> str:
    """One line about a description, without what is below it."""
    if d[0] == OBJECT:
        settings = ", ".join(f"{k}={v!r}" for k, v in zip(d.settings.names, d.settings.values))
        return f"{d.type.__name__} #{d.index}({settings})"
    if d[0] == TREE:
        return f"{d.form.__name__ if isinstance(d.form, type) else 'pytree'} of {len(d.children)}"
    if d[0] == REF:
        return f"met before: #{d.index}"
    return f"{d.type.__name__ if hasattr(d, 'type') else 'Ref'} #{d.index}"


jax.tree_util.register_static(GraphDef)


def walk_defs(d: Any, path: Path = ()) -> Iterable[tuple[Path, Any]]:
    """The pairs (path, description) below `d`, parents first."""
    yield path, d
    if d[0] == OBJECT or d[0] == TREE:
        for key, child in zip(d.keys, d.children):
            yield from walk_defs(child, (*path, key))
