# SPDX-License-Identifier: Apache-2.0
"""Hijax Variables: boxes that JAX itself carries through transforms, so that a write inside plain `jax.jit` arrives.

    box      a HijaxVariable, or a tracer of one
    Content  what a box holds at a moment, without the arrays: kind, metadata, structure and types of the value
    look     box -> an ordinary Variable with what is in it        primitive `get_variable`
    put      writes an ordinary Variable back into the box         primitive `set_variable`

Everything that a Variable can do, a box does by one route: look, do it there, put what changed. A box is *mutable*,
and its Content a dynamic part of its type, unless the value is a `jax.Ref` (`ref=True`), which is written itself, or
metadata say `mutable=False`: then the Content is its type, and JAX differentiates it as a value.

JAX 0.11.2 has no types with dynamic parts any more. There each array of a mutable box stands in a `jax.Ref`: a write
arrives as before, but kind, metadata, structure and types of the value change outside of transforms alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import jax
from jax.experimental.hijax import (
    AbstractRef,
    AbstractValue,
    HiType,
    ShapedArray,
    Zero,
    aval_method,
    aval_property,
    control_flow_allowed_effects,
    instantiate_zeros,
    register_hitype,
)

from .captured import AT_REST
from .errors import ImmutableVariableError
from .jaxcompat import (
    AvalQDD,
    Effect,
    HiPrimitive,
    MutableHiType,
    Tracer,
    cur_qdd,
    current_trace,
    custom_derivatives_allowed_effects,
)
from .metadata import Frozen, frozen_metadata
from .variable import Variable


# ---------------------------------------------------------------- what a box holds
@dataclass(frozen=True, slots=True)
class Content:
    """A Variable without its arrays; `leaves` are the types of the arrays."""

    kind: type[Variable]
    metadata: Frozen
    treedef: Any
    leaves: tuple[AbstractValue, ...]

    @staticmethod
    def of(variable: Variable) -> tuple[Content, list[Any]]:
        """The two halves of a Variable."""
        leaves, treedef = jax.tree.flatten(variable._raw_value)
        return Content(type(variable), frozen_metadata(variable), treedef, tuple(map(_type_of, leaves))), leaves

    def variable(self, leaves: Sequence[Any]) -> Variable:
        """Both halves together."""
        return self.kind._new(jax.tree.unflatten(self.treedef, leaves), dict(self.metadata.items), self.metadata)

    def __repr__(self) -> str:
        return f"{self.kind.__name__}({', '.join(a.str_short(short_dtypes=True) for a in self.leaves)})"

    @property
    def mutable(self) -> bool:
        metadata = dict(self.metadata.items)
        return not metadata["ref"] and metadata.get("mutable", True) is not False

    def map(self, f: Callable[[AbstractValue], AbstractValue]) -> Content:
        return Content(self.kind, self.metadata, self.treedef, tuple(map(f, self.leaves)))

    def normalize(self) -> Content:
        return self.map(lambda a: a.normalize())

    def to_tangent_qdd(self) -> Content:
        return self.map(lambda a: a.to_tangent_aval())

    # The types of JAX's lower level that the leaves are made of, and the leaves as values of these types.
    def lowered(self) -> list[AbstractValue]:
        return [low for a in self.leaves for low in a.lo_ty()]

    def lower(self, leaves: Sequence[Any]) -> list[Any]:
        return [low for a, x in zip(self.leaves, leaves) for low in a.lower_val(x)]  # type: ignore[attr-defined]

    def raise_(self, lows: Sequence[Any]) -> list[Any]:
        rest = iter(lows)
        return [a.raise_val(*[next(rest) for _ in a.lo_ty()]) for a in self.leaves]  # type: ignore[attr-defined]


def _type_of(x: Any) -> AbstractValue:
    return ShapedArray(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def content_of(box: Any) -> Content:
    """What a box holds here and now.

    Raises:
        NotImplementedError: JAX does not tell.
    """
    aval = jax.typeof(box)
    content = aval.content if isinstance(aval, ValueType | RefsType) else cur_qdd(box)
    if content is None:
        raise NotImplementedError("JAX does not carry a hijax Variable into this transform as an argument.\n"
                                  "  Fix: let the function close over it, or pass its value")  # fmt: skip
    return content


# ---------------------------------------------------------------- boxes
class HijaxVariable:
    """A box. It passes for its Variable: `isinstance(box, Param)` holds, methods and metadata are the Variable's."""

    __slots__ = ("_content", "_leaves", "__weakref__")

    def __init__(self, content: Content, leaves: Sequence[Any]):
        object.__setattr__(self, "_content", content)
        object.__setattr__(self, "_leaves", tuple(leaves))

    def cur_qdd(self) -> Content:
        return self._content

    type_state = cur_qdd
    has_qdd = property(lambda self: self._content.mutable)

    def __getattr__(self, name: str) -> Any:
        if name in HijaxVariable.__slots__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return _attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        through("__setattr__")(self, name, value)

    def __repr__(self) -> str:
        return repr(look(self))

    def __reduce__(self):
        return from_variable, (look(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> HijaxVariable:
        memo[id(self)] = new = from_variable(copy.deepcopy(look(self), memo))
        return new

    __hash__ = object.__hash__


def is_instance(x: Any, cls: type[Variable]) -> bool:
    """Whether `x` is a box, or a tracer of one, of a Variable of this class."""
    if isinstance(x, HijaxVariable):
        return issubclass(x._content.kind, cls)
    return isinstance(x, Tracer) and isinstance(x.aval, BoxType) and issubclass(x.aval.kind, cls)


def from_variable(variable: Variable) -> Any:
    """A new box with what is in an ordinary Variable."""
    content, leaves = Content.of(variable)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return HijaxVariable(content, leaves)  # a description, which no trace can hold
    return new_p.bind(*leaves, content=content if cur_qdd or not content.mutable else content.normalize())


def look(box: Any) -> Variable:
    """An ordinary Variable with what is in the box."""
    content = content_of(box)
    if isinstance(box, HijaxVariable) and any(isinstance(x, jax.ShapeDtypeStruct) for x in box._leaves):
        return content.variable(box._leaves)
    return content.variable(get_p.bind(box, content=content))


def put(box: Any, variable: Variable) -> None:
    """Makes the box hold what is in an ordinary Variable.

    Raises:
        ImmutableVariableError: the box is a value; or, with JAX 0.11.2, what is written inside of a transform is of
            another structure or type than what is there, or has other metadata.
    """
    aval = jax.typeof(box)
    if isinstance(aval, ValueType):
        raise ImmutableVariableError("this hijax Variable cannot be written", at=type(variable).__name__,
                                     fix="make it with mutable=True, or write the Ref if it has ref=True")  # fmt: skip
    content, leaves = Content.of(variable)
    if isinstance(aval, RefsType) and (content := content.normalize()) != aval.content:
        if not isinstance(box, HijaxVariable) or current_trace() != AT_REST:
            raise ImmutableVariableError(
                "this release of JAX keeps metadata, structure and types of a hijax Variable while a transform runs",
                at=type(variable).__name__, fix="write a value of the same structure, shapes and dtypes; do the rest "
                "outside of the transform")  # fmt: skip
        HijaxVariable.__init__(box, content, [*map(jax.new_ref, leaves)])
    else:
        set_p.bind(box, *leaves, content=content)


# ---------------------------------------------------------------- the methods of a Variable, on boxes
def through(name: str) -> Callable[..., Any]:
    """The method of this name: done on what is in the box; what changed is put back."""

    def method(box: Any, *args: Any, **kwargs: Any) -> Any:
        variable = look(box)
        value, metadata = variable._raw_value, variable._var_metadata
        result = getattr(variable, name)(*args, **kwargs)
        if variable._raw_value is not value or variable._var_metadata is not metadata:
            put(box, variable)
        return result

    method.__name__ = name
    return method


def _attribute(box: Any, name: str) -> Any:
    """An attribute that is no method of every Variable: one of its kind, of its metadata, or of its value."""
    if isinstance(getattr(content_of(box).kind, name, None), FunctionType):
        return through(name).__get__(box)
    return getattr(look(box), name)


# To a Boundary a box is its own value: JAX carries it there and back.
_OF_BOXES: dict[str, Callable[[Any], Any]] = {
    "_raw_value": lambda box: box,
    "_trace_state": lambda box: current_trace(),
    "_home": lambda box: None,
    "_frozen": lambda box: content_of(box).metadata,
    "_var_metadata": lambda box: dict(content_of(box).metadata.items),
    "type": lambda box: content_of(box).kind,
    "var_type": lambda box: content_of(box).kind,
}
_METHODS = [
    name for name, value in vars(Variable).items()
    if isinstance(value, FunctionType) and name not in vars(HijaxVariable)
    and name not in ("__init__", "__new__", "__getstate__", "__setstate__", "__getattr__", "__jax_array__")
]  # fmt: skip
for _name in (*_METHODS, "__jax_array__"):
    setattr(HijaxVariable, _name, through(_name))
for _name, _get in _OF_BOXES.items():
    setattr(HijaxVariable, _name, property(_get))


# ---------------------------------------------------------------- the types of boxes
# What JAX asks of a type to learn whether its values are arrays; a box is none.
_OF_ARRAYS = frozenset({"shape", "dtype", "size", "ndim", "weak_type", "sharding", "memory_space", "vma"})


class BoxType:
    """The attributes that tracers of boxes have: JAX looks them up on the type."""

    kind: type[Variable]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _OF_ARRAYS:
            raise AttributeError(name)
        if isinstance(getattr(ShapedArray, name, None), aval_method):  # a method of all tracers
            return aval_method(lambda box, *args, **kwargs: _attribute(box, name)(*args, **kwargs))
        return aval_property(lambda box: _attribute(box, name))

    def str_short(self, short_dtypes: bool = False, mesh_axis_types: bool = False) -> str:
        return f"{self.kind.__name__}()"

    __repr__ = str_short
    __jax_array__ = aval_method(through("__jax_array__"))


for _name in _METHODS:
    if not _name.startswith("__"):
        setattr(BoxType, _name, aval_method(through(_name)))
    else:  # Python's operators are asked for without their underscores
        setattr(BoxType, f"_{_name.strip('_')}", staticmethod(through(_name)))
for _name, _get in _OF_BOXES.items():
    setattr(BoxType, _name, aval_property(_get))


class MutableType(BoxType, MutableHiType):
    """The type of a box whose Content may change: it is the quasi-dynamic data of JAX."""

    def __init__(self, kind: type[Variable]):
        self.kind = kind

    def __hash__(self) -> int:
        return hash((MutableType, self.kind))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MutableType) and self.kind is other.kind

    def lo_ty_qdd(self, content: Content) -> list[AbstractValue]:  # type: ignore[override]
        return content.lowered()

    def new_from_loval(self, content: Content, *lows: Any) -> HijaxVariable:  # type: ignore[override]
        return HijaxVariable(content, content.raise_(lows))

    def read_loval(self, content: Content, box: Any) -> list[Any]:  # type: ignore[override]
        return content.lower(get_p.bind(box, content=content))

    def update_from_loval(self, content: Content, box: Any, *lows: Any) -> None:  # type: ignore[override]
        set_p.bind(box, *content.raise_(lows), content=content)

    def to_tangent_aval(self) -> MutableType:  # type: ignore[override]
        return self


class RefsType(BoxType, HiType):
    """The type of a mutable box where JAX knows no changing content: each array of the value stands in a `jax.Ref`."""

    def __init__(self, content: Content):
        self.kind, self.content = content.kind, content

    def __hash__(self) -> int:
        return hash((RefsType, self.content))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefsType) and self.content == other.content

    def lo_ty(self) -> list[AbstractValue]:
        return [AbstractRef(low) for low in self.content.lowered()]

    def lower_val(self, box: Any) -> list[Any]:  # type: ignore[override]
        return list(box._leaves)

    def raise_val(self, *lows: Any) -> HijaxVariable:
        return HijaxVariable(self.content, lows)

    def normalize(self) -> RefsType:
        return RefsType(self.content.normalize())

    def to_tangent_aval(self) -> ValueType:  # type: ignore[override]
        return ValueType(self.content.to_tangent_qdd())


class ValueType(BoxType, HiType):
    """The type of a box that is never written, and so is a value like an array: Content and all."""

    def __init__(self, content: Content):
        self.kind, self.content = content.kind, content

    def __hash__(self) -> int:
        return hash((ValueType, self.content))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ValueType) and self.content == other.content

    def lo_ty(self) -> list[AbstractValue]:
        return self.content.lowered()

    def lower_val(self, box: Any) -> list[Any]:  # type: ignore[override]
        return self.content.lower(get_p.bind(box, content=self.content))

    def raise_val(self, *lows: Any) -> HijaxVariable:
        return HijaxVariable(self.content, self.content.raise_(lows))

    def normalize(self) -> ValueType:
        return ValueType(self.content.normalize())

    def to_tangent_aval(self) -> ValueType:  # type: ignore[override]
        return ValueType(self.content.to_tangent_qdd())

    def vspace_zero(self) -> HijaxVariable:
        return new_p.bind(*[instantiate_zeros(Zero(a)) for a in self.content.leaves], content=self.content)

    def vspace_add(self, x: Any, y: Any) -> HijaxVariable:
        pairs = zip(self.content.leaves, get_p.bind(x, content=self.content), get_p.bind(y, content=self.content))
        return new_p.bind(*[a.vspace_add(one, other) for a, one, other in pairs], content=self.content)


def _box_type(box: HijaxVariable) -> AbstractValue:
    content = box._content
    if not content.mutable:
        return ValueType(content)
    return MutableType(content.kind) if cur_qdd else RefsType(content)


register_hitype(HijaxVariable, _box_type)


# ---------------------------------------------------------------- the three primitives
class BoxEffect(Effect):
    """Keeps reads and writes of boxes in their order."""

    def __repr__(self) -> str:
        return "Box"


_EFFECT = frozenset({BoxEffect()})
control_flow_allowed_effects.add_type(BoxEffect)
custom_derivatives_allowed_effects.add_type(BoxEffect)


def _no_derivative(name: str) -> NotImplementedError:
    problem = f"{name} of a hijax Variable cannot be differentiated: the Variable may be written."
    return NotImplementedError(problem + "\n  Fix: differentiate by nnx.with_vars(..., mutable=False), or by its value")


class NewVariable(HiPrimitive):
    """leaves -> box"""

    def abstract_eval(self, *leaves: Any, content: Content):  # type: ignore[override]
        if not content.mutable:
            return ValueType(content), frozenset()
        return (AvalQDD(MutableType(content.kind), content) if cur_qdd else RefsType(content)), _EFFECT

    def to_lojax(self, *leaves: Any, content: Content) -> HijaxVariable:  # type: ignore[override]
        return HijaxVariable(content, leaves if cur_qdd or not content.mutable else [*map(jax.new_ref, leaves)])

    def jvp(self, primals, tangents, *, content: Content):  # type: ignore[override]
        if content.mutable:
            raise _no_derivative("making")
        tangents = map(instantiate_zeros, tangents)
        return self.bind(*primals, content=content), self.bind(*tangents, content=content.to_tangent_qdd())

    def transpose(self, cotangent, *leaves: Any, content: Content):  # type: ignore[override]
        return [Zero(a) for a in content.leaves] if type(cotangent) is Zero else get_p.bind(cotangent, content=content)


class GetVariable(HiPrimitive):
    """box -> leaves"""

    multiple_results = True

    def abstract_eval(self, box, *, content: Content):  # type: ignore[override]
        return list(content.leaves), _EFFECT if content.mutable else frozenset()

    def to_lojax(self, box: HijaxVariable, *, content: Content) -> list[Any]:  # type: ignore[override]
        return list(box._leaves) if cur_qdd or not content.mutable else [ref[...] for ref in box._leaves]

    def jvp(self, primals, tangents, *, content: Content):  # type: ignore[override]
        if content.mutable:
            raise _no_derivative("reading")
        return self.bind(*primals, content=content), self.bind(*tangents, content=content.to_tangent_qdd())

    def transpose(self, cotangents, box, *, content: Content):  # type: ignore[override]
        return [new_p.bind(*map(instantiate_zeros, cotangents), content=content)]


class SetVariable(HiPrimitive):
    """box, leaves -> nothing"""

    multiple_results = True

    def abstract_eval(self, box, *leaves: Any, content: Content):  # type: ignore[override]
        if cur_qdd:
            box.mutable_qdd.update(content)
        return [], _EFFECT

    def to_lojax(self, box: HijaxVariable, *leaves: Any, content: Content) -> list[Any]:  # type: ignore[override]
        if cur_qdd:
            HijaxVariable.__init__(box, content, leaves)
        else:
            for ref, leaf in zip(box._leaves, leaves, strict=True):
                ref[...] = leaf
        return []

    def jvp(self, primals, tangents, *, content: Content):  # type: ignore[override]
        raise _no_derivative("writing")


new_p, get_p, set_p = NewVariable("new_variable"), GetVariable("get_variable"), SetVariable("set_variable")
