# SPDX-License-Identifier: Apache-2.0
"""Scopes: where the variables and random streams of a functional model live during one call.

A Scope is a graph object. Its parts are Variables by collection and name, and the scopes of its submodules. What all
scopes of a call share (the keys, what may be written, flags) is their `Frame`, which is a graph object too:

    variables (dict)  --Scope(...)-->  Scope  --functions of a scope-->  Scope  --mutable_variables()-->  dict

A scope can be handed to the core's transforms like any other module; `batiste.linen.lift` does so by collection and
stream. A Variable whose value is a mapping is a subtree which no submodule has asked for yet; `push` opens it by one
level.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from batiste.errors import (
    ApplyScopeInvalidVariablesStructureError,
    ApplyScopeInvalidVariablesTypeError,
    InvalidRngError,
    InvalidScopeError,
    JaxTransformError,
    ModifyScopeVariableError,
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
    ScopeVariableNotFoundError,
)
from batiste.graph import Object, RngKey, variable_type_from_name
from batiste.graph import Variable as Cell
from batiste.graph.jaxcompat import current_trace
from batiste.graph.pytree import prepare

from .boxes import is_axis_metadata, replace_boxed, unbox
from .filters import DenyList as DenyList
from .filters import in_filter
from .keys import LazyRng, fold_in, is_key

# ---------------------------------------------------------------- scopes


_parents: weakref.WeakKeyDictionary[Scope, weakref.ref[Scope]] = weakref.WeakKeyDictionary()
# By collection, the names of variables and of scopes that hold some, as the nested dicts of results have them: in the
# order in which they were given or first written. What a transform makes comes in when its call ends.
_orders: weakref.WeakKeyDictionary[Scope, dict[str, dict[str, None]]] = weakref.WeakKeyDictionary()


class Base:
    """The path at which a frame begins. All are equal: programs of scopes that differ in it alone are the same."""

    __slots__ = ("path",)

    def __init__(self, path: tuple[str, ...]):
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Base)

    def __hash__(self) -> int:
        return hash(Base)


class Shown(Base):
    """How paths are shown: the names of the transforms that their scopes went through. All are equal, too."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[tuple[str, ...], str]):
        super().__init__(())
        self.names = names


class Frame(Object):
    """What all scopes of one call share.

    Args:
        rngs: keys by the name of their stream.
        mutable: the collections that may be written.
        flags: settings of the call, such as `initializing`.
        base: the path that has gone into the keys already.
    """

    counts: dict[tuple[tuple[str, ...], str], int]

    def __init__(
        self, rngs: Mapping[str, Any], mutable: Any, flags: Mapping[str, Any], base: tuple[str, ...] = ()
    ):  # fmt: skip
        in_filter(mutable, "")  # a wrong filter is refused here
        is_set = isinstance(mutable, Collection) and not isinstance(mutable, str)
        keys = {name: key.as_jax_rng() if isinstance(key, LazyRng) else key for name, key in rngs.items()}
        self.rngs = {name: RngKey(key, tag=name) for name, key in keys.items()}
        self.counts = {}
        self.mutable = frozenset(mutable) if is_set else mutable
        self.flags = dict(flags)
        self.given: dict[str, bool] = {}  # collections that the call was given: is there something in them?
        self.base = Base(base)
        self.shown = Shown({})
        self.valid = True


class Scope(Object):
    """Variables by (collection, name), and scopes by name.

    Args:
        variables: nested dicts `{collection: {scope: {name: value}}}`; they are not changed.
        rngs: keys by the name of their stream.
        mutable: the collections that may be written, and that `mutable_variables` returns.

    >>> scope = Scope({"params": {"dense": {"kernel": 2.0}}})
    >>> scope.push("dense").get_variable("params", "kernel")
    2.0
    """

    cells: dict[str, dict[str, Cell]]
    children: dict[str, Scope]
    reserved: dict[str, tuple[str | None, ...]]
    frame: Frame
    steps: tuple[str, ...]

    def __init__(
        self,
        variables: Mapping[str, Mapping[str, Any]],
        rngs: Mapping[str, Any] | None = None,
        name: str | None = None,
        mutable: Any = False,
        parent: Scope | None = None,
        path: Iterable[str] = (),
        flags: Mapping[str, Any] | None = None,
    ):
        frame = parent.frame if parent is not None else Frame(rngs or {}, mutable, flags or {})
        if parent is None:
            frame.given = {col: bool(tree) for col, tree in variables.items()}
        cells = {col: {k: cell_of(col, v) for k, v in tree.items()} for col, tree in variables.items()}
        self._place(frame, cells, (*path, name) if name is not None else tuple(path))

    def _place(self, frame: Frame, cells: dict[str, dict[str, Cell]], steps: tuple[str, ...]) -> None:
        parts = {"frame": frame, "cells": cells, "children": {}, "reserved": {}, "steps": steps}
        vars(self).update(parts)  # one step: a model has many scopes, and each attribute set by itself is looked at
        self._pytree__nodes.update({part: part != "steps" for part in parts})

    @classmethod
    def at(cls, frame: Frame, cells: dict[str, dict[str, Cell]], steps: tuple[str, ...], trace: Any = None) -> Scope:
        """A scope of this frame, `steps` below its base, as calling the class would make it but without its checks."""
        scope = cls.__new__(cls)
        prepare(scope, {}, trace)
        scope._place(frame, cells, steps)
        return scope

    # ------------------------------------------------------------ where it stands
    @property
    def path(self) -> tuple[str, ...]:
        """The names of the scopes above this one, and its own."""
        return self.frame.base.path + self.steps

    @property
    def name(self) -> str | None:
        return self.path[-1] if self.path else None

    @property
    def debug_path(self) -> tuple[str, ...]:
        """The path, with the transforms that each scope went through: `("vmap(dense)", "kernel")`."""
        names, path = self.frame.shown.names, self.path
        return tuple(names.get(path[: n + 1], name) for n, name in enumerate(path)) if names else path

    @property
    def path_text(self) -> str:
        return "/" + "/".join(self.debug_path)

    @property
    def mutable(self) -> Any:
        return self.frame.mutable

    @property
    def rngs(self) -> dict[str, RngKey]:
        return self.frame.rngs

    def has_flag(self, key: str) -> bool:
        return key in self.frame.flags

    def get_flag(self, key: str, default: Any = None) -> Any:
        return self.frame.flags.get(key, default)

    def invalidate(self) -> None:
        """Ends the call: the scopes of this frame can no longer be used to make or write anything."""
        self.frame.valid = False

    @property
    def parent(self) -> Scope | None:
        """The scope above this one, if there is one in this trace."""
        above = _parents.get(self)
        return above() if above is not None else None

    @property
    def root(self) -> Scope:
        """The topmost scope above this one."""
        scope = self
        while (above := scope.parent) is not None:
            scope = above
        return scope

    @property
    def invalid(self) -> bool:
        """Whether the call is over."""
        return not self.frame.valid

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Scope]:
        """Ends the call when its `with` ends."""
        try:
            yield self
        finally:
            self.invalidate()

    def _check_valid(self) -> None:
        if not self.frame.valid:
            raise InvalidScopeError(self.name or "root")

    def _check_trace(self) -> None:
        self._check_valid()
        if self._pytree__state.trace != current_trace():
            raise JaxTransformError

    # ------------------------------------------------------------ scopes below
    def name_reserved(self, name: str, col: str | None = None) -> bool:
        """Whether `name` is taken: by a scope, or in collection `col`; a scope needs a name that nothing has."""
        taken = self.reserved.get(name, ())
        return bool(taken) and (col is None or None in taken or col in taken)

    def reserve(self, name: str, col: str | None = None) -> None:
        """Takes `name`, for a scope or in the collection `col`.

        Raises:
            ValueError: it is taken.
        """
        if not isinstance(name, str):
            raise TypeError(f"A scope's name must be a string, not {type(name).__name__}: pass name={str(name)!r}.")
        if self.name_reserved(name, col):
            raise ValueError(f'Duplicate use of scope name: "{name}" in {self.path_text}: choose another name.')
        self.reserved[name] = (*self.reserved.get(name, ()), col)

    def default_name(self, prefix: str) -> str:
        """The first of `prefix0`, `prefix1`, … that is free."""
        number = 0
        while self.name_reserved(f"{prefix}{number}"):
            number += 1
        return f"{prefix}{number}"

    def push(self, name: str | None = None, prefix: str = "", reuse: bool = False) -> Scope:
        """The scope `name` below this one; it is made when it is wanted first.

        Args:
            prefix: of a name that is made up where none is given.
            reuse: the name may be taken already.
        """
        self._check_valid()
        name = self.default_name(prefix) if name is None else name
        if not reuse or not self.name_reserved(name):
            self.reserve(name)
        child = self.children.get(name)
        if child is None:
            return self._make_child(name)
        child.reserved.clear()  # another module moves in
        return child

    def child(self, fn: Callable[..., Any], name: str | None = None, prefix: str | None = None,
              named_call: bool = True, **partial_kwargs: Any) -> Callable[..., Any]:  # fmt: skip
        """`fn` as a function of its other arguments, with a scope below this one as the first.

        Calls of the result share that scope's variables.

        Args:
            name: of the scope; by default it is made up of `prefix`, or of the function's name.
            named_call: operations carry the name of the scope.
        """
        label = getattr(fn, "__name__", type(fn).__name__)
        scope = self.push(name, f"{label}_" if prefix is None else prefix)

        @functools.wraps(fn, updated=())
        def of_child(*args: Any, **kwargs: Any) -> Any:
            named = jax.named_scope(scope.name or label) if named_call else contextlib.nullcontext()
            with named:
                return fn(scope.rewound(), *args, **partial_kwargs, **kwargs)

        return of_child

    def _make_child(self, name: str) -> Scope:
        child = Scope.at(self.frame, self._opened(name), (*self.steps, name), self._pytree__state.trace)
        self.children[name] = child
        _parents[child] = weakref.ref(self)
        return child

    def adopt(self) -> None:
        """Makes the scopes below know who is above them: a transform has built them anew."""
        for child in self.children.values():
            _parents[child] = weakref.ref(self)
            child.adopt()

    def show_as(self, transform: str) -> None:
        """From now on this scope's name is shown with the transform that it goes through."""
        if path := self.path:
            shown = f"{transform}({self.debug_path[-1]})"
            self.frame.shown = Shown({**self.frame.shown.names, path: shown})

    def open_all(self) -> None:
        """Makes a scope of each subtree, down to the variables."""
        names = [name for cells in self.cells.values() for name, cell in cells.items() if _is_subtree(cell)]
        for name in dict.fromkeys(names):
            if name not in self.children:
                self._make_child(name)
        for child in self.children.values():
            child.open_all()

    def _opened(self, name: str) -> dict[str, dict[str, Cell]]:
        """The cells of the subtree `name` of every collection, one level opened."""
        opened = {}
        for col, cells in self.cells.items():
            cell = cells.get(name)
            if cell is not None and isinstance(tree := cell.get_raw_value(), Mapping):
                self.order(col)  # which knows the place of what is now taken out
                del cells[name]
                opened[col] = {k: cell_of(col, v) for k, v in tree.items()}
        return opened

    def rewound(self, rewind_rngs: bool = False) -> Scope:
        """This scope with all names free again, and perhaps the counts of the streams at the start."""
        self.reserved.clear()
        if rewind_rngs:
            for key in [key for key in self.frame.counts if key[0] == self.steps]:
                del self.frame.counts[key]
        return self

    # ------------------------------------------------------------ streams
    def has_rng(self, name: str) -> bool:
        return name in self.frame.rngs

    def make_rng(self, name: str = "params") -> jax.Array:
        """key = fold_in(key of the stream, hash(path, count)), count = 1, 2, … of this scope and stream

        Raises:
            InvalidRngError: there is no such stream, nor `params` to stand in.
        """
        self._check_trace()
        frame = self.frame
        if name not in frame.rngs:
            if "params" not in frame.rngs:
                raise InvalidRngError(f'{self.name} needs PRNG for "{name}"')
            name = "params"
        count = frame.counts[self.steps, name] = frame.counts.get((self.steps, name), 0) + 1
        return fold_in(frame.rngs[name].get_value(), (*self.steps, count))

    # ------------------------------------------------------------ variables
    def is_mutable_collection(self, col: str) -> bool:
        return in_filter(self.frame.mutable, col)

    def is_collection_empty(self, col: str) -> bool:
        return not self.cells.get(col) and all(child.is_collection_empty(col) for child in self.children.values())

    def knows(self, col: str) -> bool:
        """Whether the collection was given to the call, be it without anything in it, or there is something in it."""
        return col in self.frame.given or not self.is_collection_empty(col)

    def has_variable(self, col: str, name: str) -> bool:
        if name in self.cells.get(col, ()):
            return True
        return name in self.children and not self.children[name].is_collection_empty(col)

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """The value of a variable, or the nested dict of a scope below."""
        cell = self.cells.get(col, {}).get(name)
        if cell is not None:
            return cell.get_raw_value()
        return self.children[name]._tree(col) if self.has_variable(col, name) else default

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Writes a variable, or makes it.

        Raises:
            ModifyScopeVariableError: the collection may not be written.
            JaxTransformError: the scope was made outside the JAX transform that is running.
        """
        self._check_trace()
        if not self.is_mutable_collection(col):
            raise ModifyScopeVariableError(col, name, self.path_text)
        if name in self.children:
            self.children[name]._clear(col)
            if isinstance(value, Mapping):
                for inner, x in value.items():
                    self.children[name].put_variable(col, inner, x)
                return
        cells = self.cells.setdefault(col, {})
        if name in cells:
            cells[name].set_raw_value(value)
        else:
            cells[name] = cell_of(col, value)
            self.note(col, name)

    def order(self, col: str) -> dict[str, None]:
        """The names in the collection, and of the scopes below with something in it, as results have them."""
        orders = _orders.setdefault(self, {})
        if col not in orders:
            orders[col] = dict.fromkeys(self.cells.get(col, ()))
        return orders[col]

    def note(self, col: str, *names: str) -> None:
        """Variables of these names are now in the collection: they, and the scopes above, come after what is there."""
        scope: Scope | None = self
        while scope is not None:
            scope.order(col).update(dict.fromkeys(names))
            scope, names = scope.parent, scope.steps[-1:]

    def sort(self, col: str) -> list[str]:
        """The names in the collection, sorted; below, what is new comes in this order, as JAX has dicts."""
        names = {*self.cells.get(col, ())}
        for name, child in self.children.items():
            if below := child.sort(col):
                child.order(col).update(dict.fromkeys(below))
                names.add(name)
        return sorted(names)

    def _clear(self, col: str) -> None:
        self.cells.pop(col, None)
        for child in self.children.values():
            child._clear(col)

    def variable(
        self, col: str, name: str, init_fn: Callable[..., Any] | None = None, *init_args: Any,
        unbox: bool = True, **init_kwargs: Any
    ) -> Variable:  # fmt: skip
        """The variable `name` of collection `col`; `init_fn(*init_args)` gives its first value.

        Raises:
            ScopeCollectionNotFound, ScopeVariableNotFoundError: it does not exist and cannot be made.
        """
        self.reserve(name, col)
        if not self.has_variable(col, name):
            if not self.is_mutable_collection(col) or init_fn is None:
                if not self.frame.given.get(col) and self.is_collection_empty(col):
                    raise ScopeCollectionNotFound(col, name, self.path_text)
                raise ScopeVariableNotFoundError(name, col, self.path_text)
            self.put_variable(col, name, init_fn(*init_args, **init_kwargs))
        return Variable(self, col, name, unbox)

    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> Any:
        """The parameter `name`, a key drawn for `init_fn(key, *init_args)` where it has to be made.

        Raises:
            ScopeParamShapeError: it exists in another shape than `init_fn` makes.
            ScopeCollectionNotFound, ScopeParamNotFoundError: it does not exist and cannot be made.
        """
        self.reserve(name, "params")
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            made = jax.eval_shape(lambda: init_fn(jax.random.key(0), *init_args, **init_kwargs))
            self.check_shapes(name, value, made)
        else:
            self.check_can_make(name)
            value = init_fn(self.make_rng("params"), *init_args, **init_kwargs)
            self.put_variable("params", name, value)
        return unboxed(value) if unbox else value

    def check_can_make(self, name: str) -> None:
        """Raises unless the parameter `name` may be made."""
        if not self.is_mutable_collection("params"):
            if not self.frame.given.get("params") and self.is_collection_empty("params"):
                raise ScopeCollectionNotFound("params", name, self.path_text)
            raise ScopeParamNotFoundError(name, self.path_text)

    def check_shapes(self, name: str, value: Any, made: Any) -> None:
        """Raises unless the parameter's value has the shapes that its initialiser makes."""
        for old, new in zip(jax.tree.leaves(unboxed(value)), jax.tree.leaves(unboxed(made))):
            if np.shape(old) != np.shape(new):
                raise ScopeParamShapeError(name, self.path_text, np.shape(old), np.shape(new))

    # ------------------------------------------------------------ as nested dicts
    def _tree(self, col: str) -> dict[str, Any]:
        cells, tree = self.cells.get(col, {}), {}
        for name in self.order(col) | dict.fromkeys((*cells, *self.children)):
            if name in cells:
                tree[name] = _copied(cells[name].get_raw_value())
            elif name in self.children and (below := self.children[name]._tree(col)):
                tree[name] = below
        return tree

    def collections(self) -> list[str]:
        names = dict.fromkeys((*self.frame.given, *_orders.get(self, ()), *self.cells))
        for child in self.children.values():
            names |= dict.fromkeys(child.collections())
        return list(names)

    def variables(self) -> dict[str, dict[str, Any]]:
        """Nested dicts of all collections, from here downwards."""
        trees = {col: self._tree(col) for col in self.collections()}
        return {col: tree for col, tree in trees.items() if tree}

    def mutable_variables(self) -> dict[str, dict[str, Any]]:
        """Nested dicts of the collections that may be written."""
        return {col: tree for col, tree in self.variables().items() if self.is_mutable_collection(col)}


class Variable:
    """A variable of a scope: `.value` reads and writes it."""

    __slots__ = ("scope", "collection", "name", "unbox", "_id")

    def __init__(self, scope: Scope, collection: str, name: str, unbox: bool):
        self.scope, self.collection, self.name, self.unbox = scope, collection, name, unbox

    @property
    def value(self) -> Any:
        value = self.scope.get_variable(self.collection, self.name)
        return unboxed(value) if self.unbox else value

    @value.setter
    def value(self, value: Any) -> None:
        if self.unbox and self.scope.has_variable(self.collection, self.name):
            old = self.scope.get_variable(self.collection, self.name)
            if not isinstance(old, jax.Array):
                boxes = [x for x in jax.tree.leaves(old, is_leaf=is_axis_metadata) if is_axis_metadata(x)]
                value = replace_boxed(old, value) if boxes else value
        self.scope.put_variable(self.collection, self.name, value)

    def is_mutable(self) -> bool:
        return self.scope.is_mutable_collection(self.collection)


def unboxed(value: Any) -> Any:
    """`value` without boxes; an array has none."""
    return value if isinstance(value, jax.Array) else unbox(value)


def _is_subtree(cell: Cell) -> bool:
    """Whether a scope can stand for the cell."""
    value = cell.get_raw_value()
    return isinstance(value, Mapping) and bool(value) and all(isinstance(name, str) for name in value)


def cell_of(col: str, value: Any) -> Cell:
    """The Variable around a value of collection `col`."""
    return variable_type_from_name(col, allow_register=True)(value)


def _copied(value: Any) -> Any:
    """Nested dicts as new ones, so that no two results share any."""
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def root_scope(
    variables: Any, rngs: Mapping[str, Any] | None, mutable: Any, flags: Mapping[str, Any] | None = None
) -> Scope:
    """A scope of its own for one call.

    Raises:
        ApplyScopeInvalidVariablesTypeError: `variables` is no mapping of mappings with string keys.
        ApplyScopeInvalidVariablesStructureError: the collection `params` holds another `params`.
        InvalidRngError: a value of `rngs` is no key.
    """
    if not isinstance(variables, Mapping) or not all(
        isinstance(col, str) and isinstance(tree, Mapping) for col, tree in variables.items()
    ):
        raise ApplyScopeInvalidVariablesTypeError
    if isinstance(params := variables.get("params"), Mapping) and isinstance(params.get("params"), Mapping):
        raise ApplyScopeInvalidVariablesStructureError(variables)
    for name, key in (rngs or {}).items():
        if not is_key(key):
            raise InvalidRngError(f"rngs should be a dictionary of PRNG keys of shape (2,), but {name!r} is: {key}")
    return Scope(variables, rngs, mutable=mutable, flags=flags)
