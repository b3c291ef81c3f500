# SPDX-License-Identifier: Apache-2.0
"""Live objects -> (structure, leaves): the one traversal that everything else rests on.

`flatten_graph` walks modules, containers and Variables, numbers each object the first time it meets it, and writes a
`RefDef` the next time: sharing and cycles need no second mode. `unflatten` holds the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from .captured import AT_REST
from .errors import AliasError, StructureError, TraceContextError, too_deep
from .jaxcompat import Tracer, current_trace, is_ref, key_name, one_level
from .metadata import frozen_metadata
from .pytree import Pytree, sorted_names
from .states import State, key_order
from .structure import (
    ARRAY_REF,
    ATOMS,
    LEAF_DEF,
    OBJECT,
    REF,
    SHARED,
    STATIC,
    TREE,
    VARIABLE,
    ArrayRefDef,
    GraphDef,
    ObjectDef,
    Path,
    RefDef,
    Settings,
    StaticDef,
    TreeDef,
    VariableDef,
    show_path,
)
from .variable import Variable

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
    walk = Walk(graph, known, what)
    walk.rule = labels if callable(labels) else None
    walk.label = labels
    return walk.finish(walk.whole(root, ()))


class Walk:
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

    def whole(self, x: Any, path: Path) -> Any:
        """The structure of a value, where the walk enters it.

        Raises:
            StructureError: it is nested too deep.
        """
        try:
            return self.value(x, path)
        except RecursionError:
            raise too_deep(x) from None

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
            if type(value) in ATOMS and not (says_data and nodes.get(name) and value is not None):
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
            if current_trace() == AT_REST:
                raise TraceContextError(f"a {type(x).__name__} is kept here, and the transform that it stood for a "
                                        "value in has ended", at=show_path(path),
                                        fix="return the value from the transformed function")  # fmt: skip
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


def _kind_name(x: Any) -> str:
    return (x.type if isinstance(x, Variable) else type(x)).__name__


def inconsistent_error(x: Any, places: list[tuple[Path, Any]]) -> AliasError:
    lines = "\n".join(f"  {show_path(path)}: {label}" for path, label in places)
    return AliasError(
        f"Inconsistent aliasing detected. The following nodes have different prefixes: one and the same "
        f"{_kind_name(x)} stands at\n{lines}\n",
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
