# SPDX-License-Identifier: Apache-2.0
"""Modules: plain objects whose attributes are parts (data) or settings (static).

An attribute is *data* when it holds an array, a Variable or another graph object; everything else is *static*.
`data(x)` and `static(x)` say so explicitly, on assignment or as a dataclass field. Every class is registered as a JAX
pytree too, unless it is declared with `pytree=False`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import typing
import warnings
from abc import ABCMeta
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from .birth import nursery
from .captured import AT_REST
from .epoch import Epoch, structure_changed
from .errors import StructureError, TraceContextError
from .jaxcompat import current_trace, is_ref
from .lost import Home
from .represent import Layout, represent, treescope_form
from .trees import Tie, look_for_cycles, warn_untied
from .variable import MISSING, Variable

A = TypeVar("A")
M = TypeVar("M", bound="Pytree")

ARRAYS = (jax.Array, np.ndarray)
NOWHERE = contextlib.nullcontext()
_data_types: set[type] = set()


# ---------------------------------------------------------------- data and static
def register_data_type(type_: type, /) -> type:
    """Makes values of this type count as data when they are assigned to an attribute; also a decorator."""
    _data_types.add(type_)
    return type_


def is_data(value: Any, /) -> bool:
    """Whether an attribute with this value becomes data: an array, Ref, Variable or graph object, or a registered type.

    >>> is_data(jax.numpy.ones(2)), is_data(3), is_data([1, 2])
    (True, False, False)
    """
    return isinstance(value, (*ARRAYS, Variable, Pytree)) or is_ref(value) or type(value) in _data_types


def has_data(value: Any, /) -> list[Any]:
    """The data leaves inside a value that itself is none, such as a plain list of Variables."""
    return [x for x in jax.tree.leaves(value, is_leaf=is_data) if is_data(x)]


def _field(value: Any, is_static: bool, options: dict[str, Any]):
    metadata = {**(options.pop("metadata", None) or {}), "nnx_value": value, "static": is_static}
    return dataclasses.field(**options, metadata=metadata)


def data(value: Any = MISSING, /, **kwargs) -> Any:
    """Marks a value on assignment (`self.parts = data([...])`) or a dataclass field as data."""
    return _field(value, False, kwargs)


def static(value: Any = MISSING, /, **kwargs) -> Any:
    """Marks a value on assignment or a dataclass field as static: part of the structure, compared and hashed."""
    return _field(value, True, kwargs)


class DataAnnotation:
    """`x: Data[T]`, the older spelling of `x: T = data()`."""


class StaticAnnotation:
    """`x: Static[T]`, the older spelling of `x: T = static()`."""


if typing.TYPE_CHECKING:
    Data = typing.Annotated[A, DataAnnotation]
    Static = typing.Annotated[A, StaticAnnotation]
else:

    class _Marker:
        def __init__(self, mark, word):
            self.mark, self.word = mark, word

        def __getitem__(self, item):
            warnings.warn(
                f"'{self.word}' is deprecated, please replace `x: {self.word}[T]` with `x: T = {self.word.lower()}()`.",
                DeprecationWarning,
                stacklevel=2,
            )
            return typing.Annotated[item, self.mark]

    Data, Static = _Marker(DataAnnotation, "Data"), _Marker(StaticAnnotation, "Static")


def _declared(cls: type) -> dict[str, bool]:
    """Attributes whose status a class says explicitly: name -> is it data."""
    declared: dict[str, bool] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, dataclasses.Field) and "nnx_value" in value.metadata:
                declared[name] = not value.metadata["static"]
        fields = vars(base).get("__dataclass_fields__", {})
        for name, field in fields.items():
            if "nnx_value" in field.metadata:
                declared[name] = not field.metadata["static"]
        for name, hint in vars(base).get("__annotations__", {}).items():
            if isinstance(hint, str):
                mark = hint.split("[")[0].split(".")[-1]
                if mark in ("Data", "Static") and "[" in hint:
                    declared[name] = mark == "Data"
            else:
                marks = getattr(hint, "__metadata__", ())
                if DataAnnotation in marks or StaticAnnotation in marks:
                    declared[name] = DataAnnotation in marks
    return declared


# ---------------------------------------------------------------- construction
class PytreeMeta(ABCMeta):
    """Runs `__init__` through `_pytree_meta_construct`, then checks that no data hides in static attributes."""

    def __call__(cls: Any, *args, **kwargs):
        self = cls.__new__(cls, *args, **kwargs)
        if not _is_prepared(self):  # a `__new__` that sets attributes has done so
            prepare(self, {})
        place = nursery.get()
        with NOWHERE if place is None else place.raising(self):
            cls._pytree_meta_construct(self, *args, **kwargs)
            if cls._pytree__is_pytree:
                check_pytree(self)
        return self

    def _pytree_meta_construct(cls, self, *args, **kwargs):
        self.__init__(*args, **kwargs)


def prepare(self: Pytree, nodes: dict[str, bool], trace=None) -> None:
    """Sets up the bookkeeping of a new object, before any attribute."""
    slot = object.__setattr__
    slot(self, "_pytree__nodes", nodes)
    slot(self, "_pytree__state", PytreeState(current_trace() if trace is None else trace))
    slot(self, "_planned", False)
    slot(self, "_known_tree", None)
    slot(self, "_tie", None)
    slot(self, "_home", None)


def _is_prepared(self: Pytree) -> bool:
    try:
        object.__getattribute__(self, "_planned")  # past a `__getattr__` of the class
    except AttributeError:
        return False
    return True


class PytreeState:
    """The trace level that an object was made in, and whether it is just being set up."""

    __slots__ = ("trace",)

    def __init__(self, trace=None):
        self.trace = current_trace() if trace is None else trace

    def __repr__(self):
        return "PytreeState()"


# ---------------------------------------------------------------- Pytree
class Pytree(metaclass=PytreeMeta):
    """An object whose attributes are parts (data) or settings (static), and that is a JAX pytree.

    Subclass it with `pytree=False` to make a graph object that plain JAX takes as one opaque leaf, and whose attributes
    may be plain lists and dicts of Variables.
    """

    __slots__ = (
        "_pytree__nodes",
        "_pytree__state",
        "_planned",
        "_known_tree",
        "_tie",
        "_home",
        "__dict__",
        "__weakref__",
    )

    _pytree__is_pytree: bool = True
    _pytree__has_int_keys: bool = False
    _pytree__declared: ClassVar[dict[str, bool]] = {}

    if typing.TYPE_CHECKING:
        _pytree__nodes: dict[str, bool]
        _planned: bool
        _known_tree: int | None
        _tie: Tie | None
        _home: Home | None

    def __init_subclass__(cls, *, pytree: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        if vars(cls).get("__slots__"):
            raise TypeError(
                f"{cls.__name__} has __slots__={vars(cls)['__slots__']}, but the attributes of a Pytree live in "
                "__dict__: take __slots__ out."
            )
        cls._pytree__is_pytree = pytree
        cls._pytree__declared = _declared(cls)
        if pytree:
            jax.tree_util.register_pytree_with_keys(
                cls, _flatten_with_keys, lambda aux, children: _unflatten(cls, aux, children), _flatten
            )

    # ------------------------------------------------------------ attributes
    def __setattr__(self, name: str, value: Any) -> None:
        self._setattr(name, value)

    def _setattr(self, name: str, value: Any) -> None:
        if not _is_prepared(self):
            prepare(self, {})
        if self._pytree__state.trace != current_trace():
            raise TraceContextError(f"Cannot mutate '{type(self).__name__}' from different trace level", at=self,
                                    fix="pass the module to the transformed function as an argument")  # fmt: skip
        cls = type(self)
        prop = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
        if hasattr(type(prop), "__set__"):  # a property, `__class__`, a descriptor of the program: theirs to do
            object.__setattr__(self, name, value)
            return
        nodes, attributes = self._pytree__nodes, vars(self)
        explicit: bool | None = None
        wrapped = False
        if (
            type(value) is dataclasses.Field
            and "nnx_value" in value.metadata
            and value.metadata["nnx_value"] is not MISSING
        ):
            explicit, value, wrapped = not value.metadata["static"], value.metadata["nnx_value"], True
        elif name in cls._pytree__declared and name not in nodes:
            explicit = cls._pytree__declared[name]
        if cls._pytree__is_pytree:
            status = self._status(name, value, explicit, wrapped)
        else:
            status = nodes.get(name, True) if explicit is None else explicit
        if self._planned and not (nodes.get(name) == status and same_place(attributes.get(name, MISSING), value)):
            structure_changed()
        nodes[name] = status
        attributes[name] = value

    def _status(self, name: str, value: Any, explicit: bool | None, wrapped: bool) -> bool:
        """Whether the attribute is data from now on."""
        if explicit is not None:
            if not explicit and wrapped and (is_data(value) or (type(value) not in _SCALARS and has_data(value))):
                raise StructureError(
                    f"Found data in value of type '{type(value).__name__}' that nnx.static(...) was to make a setting",
                    at=self._attribute(name),
                    fix=f"assign nnx.data(...) to self.{name}",
                )
            if not explicit and not is_data(value):  # a bare array is found at the end of __init__
                self._refuse_hidden_data(name, value)
            return explicit
        known, is_data_now = self._pytree__nodes.get(name), is_data(value)
        if is_data_now and known is False:
            raise StructureError(
                f"Cannot assign data value of type '{type(value).__name__}' to static attribute '{name}'",
                at=self._attribute(name),
                fix=f"say that it becomes data: self.{name} = nnx.data(...)",
            )
        if known or is_data_now:
            return True
        self._refuse_hidden_data(name, value)
        return False

    def _refuse_hidden_data(self, name: str, value: Any) -> None:
        if type(value) in _SCALARS:
            return
        if not (found := has_data(value)):
            return
        raise StructureError(
            f"Found data on value of type '{type(value).__name__}', which makes a static attribute '{name}'",
            at=self._attribute(name),
            got=_kinds(found),
            fix=_ways_out(name, value),
        )

    def _attribute(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def __delattr__(self, name: str) -> None:
        if self._pytree__state.trace != current_trace():
            raise TraceContextError(f"Cannot mutate '{type(self).__name__}' from different trace level", at=self,
                                    fix="pass the module to the transformed function as an argument")  # fmt: skip
        object.__delattr__(self, name)
        self._pytree__nodes.pop(name, None)
        if self._planned:
            structure_changed()

    def __batiste_repr__(self) -> Layout:
        shown = [(k, v) for k, v in self.__dict__.items() if not k.startswith("_") or self._pytree__nodes.get(k)]
        return Layout(type(self).__name__, shown, counted=True)

    def __repr__(self) -> str:
        return represent(self)

    def __treescope_repr__(self, path, subtree_renderer):
        return treescope_form(self, path, subtree_renderer)

    # ------------------------------------------------------------ copies
    def __copy__(self):
        new = object.__new__(type(self))
        prepare(new, dict(self._pytree__nodes))
        vars(new).update(vars(self))
        return new

    def __getstate__(self):
        attributes = {name: by_name(x) if isinstance(x, COMPILED) else x for name, x in self.__dict__.items()}
        return {**attributes, "_pytree__nodes": dict(self._pytree__nodes)}

    def __setstate__(self, state):
        state = dict(state)
        prepare(self, state.pop("_pytree__nodes", {}))
        vars(self).update((name, x.found() if isinstance(x, Named) else x) for name, x in state.items())


class Named(NamedTuple):
    """Where a function is found."""

    module: str
    name: str

    def found(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


def by_name(function: Any) -> Any:
    """The name of a compiled function, such as `jax.nn.sigmoid`, which pickle cannot send; itself if it has none."""
    named = Named(function.__module__, getattr(function, "__qualname__", ""))
    return named if getattr(sys.modules.get(named.module), named.name, None) is function else function


COMPILED = (type(jnp.tanh), jax.custom_jvp, jax.custom_vjp)
_SCALARS = frozenset({int, float, bool, str, type(None), bytes, complex, type, type(lambda: None)})


def same_place(old: Any, new: Any) -> bool:
    """Whether one array takes another's place: then the structure stays as it was."""
    return isinstance(old, ARRAYS) and isinstance(new, ARRAYS)


def _kinds(found: list[Any]) -> str:
    return "a plain container of " + ", ".join(sorted({type(x).__name__ for x in found}))


def _ways_out(name: str, value: Any) -> str:
    """How to keep data in a container."""
    module = {list: "nnx.List", dict: "nnx.Dict"}.get(type(value))
    choices = [f"self.{name} = {module}(...)"] if module else []
    choices += [f"self.{name} = nnx.data(...)", f"declare `{name}: {type(value).__name__} = nnx.data()` in the class"]
    return ", or ".join(choices) + "; a class with pytree=False takes it as it is"


def check_pytree(pytree: Pytree) -> None:
    """Looks for data that came into static attributes behind the back of assignment.

    Raises:
        ValueError: a static attribute holds data.
    """
    if not isinstance(pytree, Pytree):
        raise TypeError(f"check_pytree expects a Pytree, got {type(pytree)}.")
    nodes = pytree._pytree__nodes
    for name, value in pytree.__dict__.items():
        if not nodes.get(name, False) and type(value) not in _SCALARS and (found := has_data(value)):
            raise StructureError(
                f"Found unexpected data on value of type '{type(value).__name__}' in static attribute '{name}'",
                at=pytree._attribute(name),
                got=_kinds(found) if not is_data(value) else None,
                fix=_ways_out(name, value),
            )


class Object(Pytree, pytree=False):
    """A graph object that is no JAX pytree."""

    def __init_subclass__(cls, *, pytree: bool = False, **kwargs):
        super().__init_subclass__(pytree=pytree, **kwargs)


@dataclass_transform(field_specifiers=(data, static, dataclasses.field))
def dataclass(
    cls=None,
    /,
    *,
    init: bool = True,
    eq: bool = True,
    order: bool = False,
    unsafe_hash: bool = False,
    match_args: bool = True,
    kw_only: bool = False,
    slots: bool = False,
    weakref_slot: bool = False,
):
    """`dataclasses.dataclass` for Pytrees: fields may be `data(...)` or `static(...)`; the repr stays the tree's."""

    def wrap(cls):
        new = dataclasses.dataclass(
            init=init,
            repr=False,
            eq=eq,
            order=order,
            unsafe_hash=unsafe_hash,
            match_args=match_args,
            kw_only=kw_only,
            slots=slots,
            weakref_slot=weakref_slot,
        )(cls)
        if issubclass(new, Pytree):
            new._pytree__declared = _declared(new)
        return new

    return wrap if cls is None else wrap(cls)


# ---------------------------------------------------------------- modules as JAX pytrees
def sorted_names(self: Pytree) -> list[str]:
    """The names of all attributes, in the order in which structures list them."""
    if self._pytree__has_int_keys:
        return sorted(self.__dict__, key=lambda k: (0, int(k), "") if k.isdigit() else (1, 0, k))
    return sorted(self.__dict__)


def _split_attributes(self: Pytree):
    if self._known_tree != Epoch.now:
        look_for_cycles(self)
    attributes, nodes = self.__dict__, self._pytree__nodes
    names = sorted_names(self)
    parts = tuple(k for k in names if nodes.get(k))
    settings = tuple(k for k in names if not nodes.get(k))
    if self._home is not None:
        self._home.delivered()
    return parts, (parts, settings, tuple(attributes[k] for k in settings), tuple(nodes.items()), self._tie)


def _flatten(self: Pytree):
    parts, aux = _split_attributes(self)
    attributes = self.__dict__
    return [attributes[k] for k in parts], aux


def _flatten_with_keys(self: Pytree):
    parts, aux = _split_attributes(self)
    attributes = self.__dict__
    if self._pytree__has_int_keys:
        key = lambda k: jax.tree_util.SequenceKey(int(k)) if k.isdigit() else jax.tree_util.GetAttrKey(k)
    else:
        key = jax.tree_util.GetAttrKey
    return [(key(k), attributes[k]) for k in parts], aux


def _unflatten(cls: type[Pytree], aux, children):
    parts, settings, values, nodes, tie = aux
    self = object.__new__(cls)
    prepare(self, dict(nodes))
    object.__setattr__(self, "_planned", True)
    object.__setattr__(self, "_known_tree", Epoch.now)
    if tie is not None and self._pytree__state.trace == AT_REST:
        warn_untied(cls.__name__, tie)
    children = list(children)
    vars(self).update(zip(parts, children))
    vars(self).update(zip(settings, values))
    home = None
    for name, child in zip(parts, children):
        inner = child._home if isinstance(child, (Variable, Pytree)) else None
        if inner is not None:
            if home is None:
                home = Home(cls.__name__)
            inner.name, inner.parent = name, home
    object.__setattr__(self, "_home", home)
    return self
