# SPDX-License-Identifier: Apache-2.0
"""Live objects <-> (structure, leaves): the one traversal that everything else rests on.

`flatten` walks modules, containers and Variables, numbers each object the first time it meets it, and writes a `RefDef`
the next time: sharing and cycles need no second mode. `unflatten` is its inverse; given objects to `reuse` it rebuilds
*into* them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from .epoch import structure_changed
from .errors import AliasError, StaticError, StructureError
from .jaxcompat import Tracer, current_trace, is_ref, key_name, one_level
from .metadata import Frozen, frozen_metadata
from .pytree import Pytree, prepare, same_place, sorted_names
from .represent import Layout, represent
from .states import State, key_order
from .variable import Variable

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


_ATOMS = frozenset({int, float, bool, str, type(None), bytes, complex, type, type(lambda: None), type(len), type(...)})


def comparable(value: Any) -> Any:
    """A hashable copy of a setting: plain containers are turned into tuples, so that a change in place is seen."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list or kind is tuple:
        return (kind, tuple(map(comparable, value)))
    if kind is dict:
        return (kind, tuple((k, comparable(v)) for k, v in value.items()))
    if kind is set:
        return (kind, frozenset(value))
    return value


# ---------------------------------------------------------------- kinds of values, by type
(
    _IS_VARIABLE,
    _IS_OBJECT,
    _IS_ARRAY,
    _IS_NUMBER,
    _IS_DICT,
    _IS_LIST,
    _IS_NAMED,
    _IS_TREE,
    _IS_TRACER,
    _IS_REF,
    _IS_OTHER,
) = range(11)
_kinds: dict[type, int] = {}


def _kind_of(x: Any) -> int:
    cls = type(x)
    kind = _kinds.get(cls)
    if kind is None:
        kind = _kinds[cls] = _find_kind(cls, x)
    return kind


def _find_kind(cls: type, x: Any) -> int:
    if not issubclass(cls, Tracer) and isinstance(x, Variable):
        return _IS_VARIABLE
    if issubclass(cls, Pytree):
        return _IS_OBJECT
    if issubclass(cls, Tracer):
        return _IS_TRACER
    if is_ref(x):
        return _IS_REF
    if issubclass(cls, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return _IS_ARRAY
    if issubclass(cls, (int, float, complex, np.generic)):
        return _IS_NUMBER
    if cls is dict or cls is State:
        return _IS_DICT
    if cls is list or cls is tuple:
        return _IS_LIST
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _IS_NAMED
    if one_level(x) is not None:
        return _IS_TREE
    return _IS_OTHER


def is_graph_node(x: Any) -> bool:
    """Whether `x` has an identity in a graph: a module, a Variable or a Ref."""
    kind = _kind_of(x)
    return kind in (_IS_VARIABLE, _IS_OBJECT, _IS_REF) or (kind == _IS_TRACER and _has_identity(x))


def _has_identity(tracer: Any) -> bool:
    """Whether it stands for a `jax.Ref` or a hijax Variable, not for a value."""
    return is_ref(tracer) or isinstance(tracer, Variable)


# ---------------------------------------------------------------- GraphDef
class GraphDef(Generic[Node]):
    """The static half of an object: types, names, settings, and which objects are one and the same. No arrays.

    Two equal GraphDefs describe the same program, so it is what compiled functions are remembered by.
    """

    __slots__ = ("root", "num_leaves", "_hash", "_paths")

    def __init__(self, root: Any, num_leaves: int, paths: list[Path] | None = None):
        self.root, self.num_leaves, self._paths = root, num_leaves, paths
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
        self._hash = self._paths = None


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


# ---------------------------------------------------------------- flatten
class _Any:
    def __repr__(self):
        return "ANY"


ANY = _Any()
"""A label that agrees with every other one that the object bears elsewhere."""


class Flat:
    """What a traversal found: leaves (Variables, Refs and bare arrays) with their paths and labels, and all objects."""

    __slots__ = (
        "graphdef",
        "leaves",
        "paths",
        "labels",
        "objects",
        "numbers",
        "containers",
        "settings",
        "slots",
        "variables",
        "plain",
    )

    def __init__(
        self, graphdef, leaves, paths, labels, objects, numbers, containers, settings, slots, variables, plain
    ):
        self.graphdef: GraphDef = graphdef
        self.leaves: list[Any] = leaves
        self.paths: list[Path] = paths
        self.labels: list[Any] = labels
        self.objects: dict[int, Any] = objects  # by number
        self.numbers: dict[int, int] = numbers  # id(object) -> number
        self.containers: list[Any] = containers  # plain lists and dicts, which change without telling
        self.settings: list[Any] = settings  # lists, dicts and sets in static attributes
        self.variables: list[bool] = variables  # per leaf: is it a Variable
        self.plain: list[int] = plain  # positions of leaves that stand beside objects, not inside them
        self.slots: dict[int, tuple[Any, str]] = (
            slots  # position of a bare array -> the object and attribute that hold it
        )

    def values(self) -> list[Any]:
        return [x._raw_value if is_variable else x for x, is_variable in zip(self.leaves, self.variables)]


Rule = Callable[[Path, Any], Any]


def flatten_graph(root: Any, *, graph: bool = True, labels: Any = None, known: Mapping[int, int] | None = None,
                  what: str = "") -> Flat:  # fmt: skip
    """Walks `root`.

    Args:
        graph: False refuses sharing, and takes plain numbers in data attributes as leaves.
        labels: one constant for all leaves, or a `Rule`.
        known: id(object) -> number of objects that have one already; new ones are numbered behind them.
        what: the function that an error message speaks of.
    """
    walk = _Walk(graph, known, what)
    walk.rule = labels if callable(labels) else None
    walk.label = labels
    return walk.finish(walk.value(root, ()))


class _Walk:
    """One traversal in progress."""

    def __init__(self, graph: bool, known: Mapping[int, int] | None = None, what: str = ""):
        self.graph, self.known, self.what = graph, known, what
        self.base = len(known) if known else 0
        self.leaves: list[Any] = []
        self.paths: list[Path] = []
        self.labels: list[Any] = []
        self.objects: dict[int, Any] = {}
        self.open: set[int] = set()  # the objects whose children are being walked
        self.seen: dict[int, tuple[int, Any, Path]] = {}  # id -> (number, label or rule, path)
        self.containers: list[Any] = []
        self.settings: list[Any] = []
        self.variables: list[bool] = []
        self.plain: list[int] = []
        self.in_state = 0
        self.slots: dict[int, tuple[Any, str]] = {}
        self.fresh = 0
        self.rule: Rule | None = None
        self.label: Any = None
        self.start = 0  # length of the path of the root that the rule speaks of

    def finish(self, root: Any) -> Flat:
        numbers = {key: entry[0] for key, entry in self.seen.items()}
        graphdef = GraphDef(root, len(self.leaves), self.paths)
        return Flat(graphdef, self.leaves, self.paths, self.labels, self.objects, numbers, self.containers,
                    self.settings, self.slots, self.variables, self.plain)  # fmt: skip

    # ------------------------------------------------------------ leaves and objects
    def label_of(self, path: Path, x: Any) -> Any:
        return self.label if self.rule is None else self.rule(path[self.start :], x)

    def leaf(self, x: Any, path: Path, is_variable: bool = False) -> None:
        self.leaves.append(x)
        self.variables.append(is_variable)
        self.paths.append(path)
        self.labels.append(self.label_of(path, x))

    def number(self, x: Any, path: Path, label: Any) -> int:
        index = self.known.get(id(x)) if self.known else None
        if index is None:
            index = self.base + self.fresh
            self.fresh += 1
        self.seen[id(x)] = (index, label, path)
        self.objects[index] = x
        return index

    def met_again(self, x: Any, path: Path) -> RefDef:
        index, _, first = self.seen[id(x)]
        if not self.graph:
            raise duplicate_error(x, [first, path], self.what)
        return RefDef(REF, index)

    def variable(self, x: Any, path: Path) -> Any:
        entry = self.seen.get(id(x))
        if entry is not None:
            label = self.label_of(path, x)
            if self.graph and label != entry[1] and label is not ANY and not self.same_root(entry[2], path):
                raise inconsistent_error(x, [(entry[2], entry[1]), (path, label)])
            return self.met_again(x, path)
        if not isinstance(x, Variable):
            self.leaf(x, path)
            return ArrayRefDef(ARRAY_REF, self.number(x, path, self.labels[-1]))
        if x._var_metadata["ref"] and is_ref(x._raw_value):
            return self.around_ref(x, x._raw_value, path)
        self.leaf(x, path, True)
        return VariableDef(VARIABLE, x.type, self.number(x, path, self.labels[-1]), frozen_metadata(x))

    def same_root(self, first: Path, path: Path) -> bool:
        """Whether two paths lie in one root: there a rule that goes by path speaks through the first of them."""
        return self.rule is not None and first[: self.start] == path[: self.start]

    def around_ref(self, x: Variable, ref: Any, path: Path) -> VariableDef:
        """A Variable that holds a Ref, which other Variables may hold too."""
        label, entry = self.label_of(path, x), self.seen.get(id(ref))
        if entry is None:
            self.leaf(x, path, True)
        elif label != entry[1] and label is not ANY:
            raise inconsistent_error(x, [(entry[2], entry[1]), (path, label)])
        index = self.number(x, path, label)
        number = self.number(ref, path, label) if entry is None else entry[0]
        return VariableDef(VARIABLE if entry is None else SHARED, x.type, index, frozen_metadata(x), number)

    def object(self, x: Pytree, path: Path) -> Any:
        entry = self.seen.get(id(x))
        rule = self.rule if self.rule is not None else self.label
        if entry is not None and (self.graph or id(x) in self.open):  # in a tree, only Variables and cycles are refused
            if self.graph and entry[1] != (rule, self.start):
                self.compare_labels(x, path, set())
            return self.met_again(x, path)
        self.open.add(id(x))
        index = self.number(x, path, (rule, self.start))
        object.__setattr__(x, "_planned", True)
        attributes, nodes = x.__dict__, x._pytree__nodes
        keys, children, names, values = [], [], [], []
        int_keys, says_data = x._pytree__has_int_keys, x._pytree__is_pytree
        if not self.graph and not says_data:
            raise no_tree_error(x, path, self.what)
        for name in sorted_names(x):
            value = attributes[name]
            if type(value) in _ATOMS and not (says_data and nodes.get(name) and value is not None):
                names.append(name)
                values.append(value)
                continue
            if nodes.get(name):
                key = int(name) if int_keys and name.isdigit() else name
                child = self.value(value, (*path, key))
                if child[0] == STATIC and says_data:  # a plain value that was declared to be data
                    self.leaf(value, (*path, key))
                    child = LEAF_DEF
                if child[0] == STATIC:
                    names.append(name)
                    values.append(value)
                else:
                    if child is LEAF_DEF:
                        self.slots[len(self.leaves) - 1] = x, name
                    keys.append(key)
                    children.append(child)
            else:
                names.append(name)
                values.append(value)
                if type(value) in _MUTABLE:
                    self.settings.append(value)
        self.open.discard(id(x))
        settings = Settings(tuple(names), tuple(values))
        return ObjectDef(OBJECT, type(x), index, tuple(keys), tuple(children), settings, tuple(nodes.items()))

    def compare_labels(self, x: Any, path: Path, done: set[int]) -> None:
        """The Variables below an object that was met before must bear the same labels on this way too."""
        done.add(id(x))
        for name, value in x.__dict__.items():
            for keys, part in iter_parts(value):
                here = (*path, name, *keys)
                if isinstance(part, Variable) and id(part) in self.seen:
                    self.variable(part, here)
                elif isinstance(part, Pytree) and id(part) not in done:
                    self.compare_labels(part, here, done)

    # ------------------------------------------------------------ any value
    def value(self, x: Any, path: Path) -> Any:
        kind = _kind_of(x)
        if kind == _IS_VARIABLE:
            return self.variable(x, path)
        if kind == _IS_OBJECT:
            return self.object(x, path)
        if kind == _IS_ARRAY:
            self.leaf(x, path)
            return LEAF_DEF
        if kind == _IS_TRACER:
            if _has_identity(x):
                return self.variable(x, path)
            self.leaf(x, path)
            return LEAF_DEF
        if kind == _IS_REF:
            return self.variable(x, path)
        if kind in (_IS_NUMBER, _IS_OTHER):
            if not path or (not self.graph and kind == _IS_NUMBER):
                self.leaf(x, path)
                return LEAF_DEF
            return StaticDef(STATIC, Settings(path[-1:], (x,)))
        return self.tree(x, path, kind)

    def tree(self, x: Any, path: Path, kind: int) -> TreeDef:
        form: Any = type(x)
        if kind == _IS_DICT:
            keys = sorted(x, key=key_order)
            mapping = x._mapping if form is State else x
            children = [mapping[k] for k in keys]
        elif kind == _IS_LIST:
            keys, children = range(len(x)), x
        elif kind == _IS_NAMED:
            keys, children = x._fields, x
        else:
            pairs, form = one_level(x)  # type: ignore[misc]
            keys, children = [key_name(p[-1]) for p, _ in pairs], [child for _, child in pairs]
        if form is State:  # it tells when it changes, also in the dicts inside it
            self.in_state += 1
        elif form is not tuple and kind != _IS_NAMED and not self.in_state:
            self.containers.append(x)
        children = tuple(self.value(c, (*path, k)) for k, c in zip(keys, children))
        if form is State:
            self.in_state -= 1
        return TreeDef(TREE, form, tuple(keys), children)


_MUTABLE = frozenset({list, dict, set})


def iter_parts(value: Any, keys: Path = ()) -> Iterable[tuple[Path, Any]]:
    """The graph objects directly inside an attribute's value, through plain containers."""
    kind = _kind_of(value)
    if kind in (_IS_VARIABLE, _IS_OBJECT):
        yield keys, value
    elif kind in (_IS_DICT, _IS_LIST, _IS_NAMED, _IS_TREE):
        for path, x in jax.tree_util.tree_flatten_with_path(
            value, is_leaf=lambda y: y is not value and is_graph_node(y)
        )[0]:
            if is_graph_node(x):
                yield (*keys, *map(key_name, path)), x


def show_path(path: Path) -> str:
    return "/".join(map(str, path)) or "<root>"


def _kind_name(x: Any) -> str:
    return (x.type if isinstance(x, Variable) else type(x)).__name__


def inconsistent_error(x: Any, places: list[tuple[Path, Any]]) -> AliasError:
    lines = "\n".join(f"  {show_path(path)}: {label}" for path, label in places)
    return AliasError(
        f"Inconsistent aliasing detected: one and the same {_kind_name(x)} has different prefixes:\n{lines}\n",
        fix="give the object the same axis, sharding or role wherever it is passed, or pass a copy (nnx.clone)",
    )


def no_tree_error(x: Any, path: Path, what: str) -> StructureError:
    where = f"with {what!r} " if what else ""
    return StructureError(
        f"Cannot use graph=False {where}on a {type(x).__name__!r} instance, which has pytree=False. Found at path "
        f"{show_path(path)}",
        fix="pass graph=True",
    )


def duplicate_error(x: Any, paths: list[Path], what: str) -> AliasError:
    places = "\n".join(f"  - {show_path(path)}" for path in paths)
    text = f"Duplicate {_kind_name(x)}\nfound at paths:\n\n{places}\n\n"
    if what:
        text += (f"Without graph updates, nnx.{what} does not support Variable aliasing: it can take an object once, "
                 "and cannot hand an input out again.\n")  # fmt: skip
        fix = (
            "remove the duplicate, pass a copy (nnx.clone), "
            f"or use nnx.{what}(..., graph=True, graph_updates=True) or nnx.compat.{what}"
        )
    else:
        text += "A tree (graph=False) does not support shared references.\n"
        fix = "remove the duplicate, or pass graph=True"
    return AliasError(text, fix=fix)


# ---------------------------------------------------------------- unflatten
class _Unchanged:
    def __repr__(self):
        return "UNCHANGED"


UNCHANGED = _Unchanged()
"""A leaf's new value that says: keep the one that is there."""
jax.tree_util.register_pytree_node(_Unchanged, lambda _: ((), None), lambda *_: UNCHANGED)


def unflatten_graph(root: Any, leaves: Iterable[Any], *, reuse: Mapping[int, Any] | None = None, copy: bool = False,
                    recreate: bool = True):  # fmt: skip
    """Returns `(object, objects by number)`: objects whose number is in `reuse` are rebuilt in place, others are made.

    A leaf that is a Variable becomes part of the new object as it is, unless `copy` is set; a plain value gets a
    Variable around it where one stood, unless `recreate` is False.
    """
    build = _Build(leaves, reuse, copy, recreate)
    return build.value(root), build.objects


class _Build:
    """One reconstruction in progress."""

    def __init__(self, leaves: Iterable[Any], reuse: Mapping[int, Any] | None, copy: bool, recreate: bool = True):
        self.leaves, self.reuse, self.copy, self.recreate = iter(leaves), reuse, copy, recreate
        self.objects: dict[int, Any] = {}
        self.trace = current_trace()

    def value(self, d: Any) -> Any:
        tag = d[0]
        if tag == VARIABLE:
            return self.variable(d, next(self.leaves))
        if tag == OBJECT:
            return self.object(d)
        if tag == LEAF:
            x = next(self.leaves)
            return x.get_raw_value() if isinstance(x, Variable) else x
        if tag == TREE:
            return build_tree(d, [self.value(c) for c in d.children])
        if tag == STATIC:
            return d.setting.values[0]
        if tag == REF:
            return self.met(d.index)
        if tag == SHARED:
            return self.variable(d, self.met(d.ref))
        old = self.reuse.get(d.index) if self.reuse else None
        x = next(self.leaves)
        if isinstance(x, jax.Array) and not is_ref(x):  # a new Ref came out of a transform by its value
            x = jax.new_ref(x)
        self.objects[d.index] = x = old if x is UNCHANGED else x
        return x

    def met(self, index: int) -> Any:
        return self.objects[index] if index in self.objects else self.reuse[index]  # type: ignore[index]

    def variable(self, d: VariableDef, new: Any) -> Variable:
        old = self.reuse.get(d.index) if self.reuse else None
        if old is not None:
            if new is not UNCHANGED:
                old.set_raw_value(new)
            if d.metadata is not old._frozen and d.metadata != frozen_metadata(old):
                old._set_metadata(dict(d.metadata.items))
            new = old
        elif isinstance(new, Variable):
            new = new.copy() if self.copy else new
        elif self.recreate:
            metadata = dict(d.metadata.items)
            if metadata["ref"] and isinstance(new, jax.Array) and not is_ref(new):
                new = jax.new_ref(new)
            new = d.type._new(new, metadata, d.metadata, self.trace)._in_its_form()
        self.objects[d.index] = new
        if d.ref is not None:
            self.objects[d.ref] = new._raw_value if isinstance(new, Variable) else new
        return new

    def object(self, d: ObjectDef) -> Pytree:
        x = self.reuse.get(d.index) if self.reuse else None
        made = x is None
        if made:
            x = object.__new__(d.type)
            prepare(x, dict(d.names), self.trace)
            object.__setattr__(x, "_planned", True)
        self.objects[d.index] = x
        int_keys = d.type._pytree__has_int_keys
        attributes = dict(zip(d.settings.names, d.settings.values))
        old = {} if made else x.__dict__
        for key, child in zip(d.keys, d.children):
            name = str(key) if int_keys else key
            value = self.value(child)
            attributes[name] = old.get(name) if value is UNCHANGED else value
        if made:
            x.__dict__.update(attributes)
        else:
            if not _same_structure(old, attributes) or x._pytree__nodes != dict(d.names):
                object.__setattr__(x, "_pytree__nodes", dict(d.names))
                structure_changed()
            old.clear()
            old.update(attributes)
        return x


def _same_structure(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the same objects stand under the same names; one array may have taken another's place."""
    return len(old) == len(new) and all(
        name in old and (old[name] is value or same_place(old[name], value)) for name, value in new.items()
    )


def build_tree(d: TreeDef, children: list[Any]) -> Any:
    """One plain pytree node around its children."""
    form = d.form
    if form is dict:
        return dict(zip(d.keys, children))
    if form is State:
        return State(dict(zip(d.keys, children)), _copy=False)
    if form is list or form is tuple:
        return form(children)
    if isinstance(form, type):
        return form(*children)
    return jax.tree.unflatten(form, children)
