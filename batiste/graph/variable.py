# SPDX-License-Identifier: Apache-2.0
"""Variables: the only mutable thing in a model.

A `Variable` holds one value (an array, or any pytree) and metadata. Its class says what the value is for: `Param` is
trained, `BatchStat` is accumulated. The class and its collection name (`params`, `batch_stats`) are two spellings of
one *kind*.
"""

from __future__ import annotations

import copy
import importlib
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from .backing import current_defaults
from .captured import AT_REST, note_read, recorders
from .epoch import structure_changed
from .errors import ShapeError, StructureError, TraceContextError
from .jaxcompat import current_trace, is_inside, is_ref
from .lost import Home, written_far_from_home
from .metadata import (
    HOOKS,
    REQUIRED,
    Frozen,
    VariableMetadata,
    as_tuple,
    class_hooks,
    frozen_metadata,
    rename_sharding,
    run_hooks,
)
from .placement import place, using_eager_sharding
from .represent import Layout, represent, treescope_form

A = TypeVar("A")
F = TypeVar("F", bound=Callable)


class Missing:
    """The type of `MISSING`, the default of arguments for which None means something."""

    def __repr__(self):
        return "MISSING"


MISSING = Missing()

# ---------------------------------------------------------------- the Variable


class VariableMeta(type):
    """Makes `Param(..., hijax=True)` return its hijax form, which `isinstance(x, Param)` recognises."""

    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)._in_its_form()

    def __instancecheck__(cls, x):
        return type.__instancecheck__(cls, x) or (_hijax is not None and _hijax.is_instance(x, cls))


_hijax: Any = None


def hijax_forms():
    """The module of hijax Variables, loaded the first time one is wanted."""
    global _hijax
    if _hijax is None:
        _hijax = importlib.import_module(".hijax", __package__)  # it rests on experimental parts of JAX
    return _hijax


class Variable(Generic[A], metaclass=VariableMeta):
    """One mutable value of a model, with metadata.

    `v[...]` reads the value and `v[...] = x` writes it; in arithmetic and as an argument of jnp functions a Variable
    stands for its value. The subclass says what the value is for, and names its collection:
    `class Param(Variable, collection="params")`.

    Args:
        value: an array or any pytree; a `VariableMetadata` brings its own metadata.
        hijax, ref: back the value by a hijax box or a `jax.Ref`; None takes the default of `var_defaults`.
        eager_sharding: place the value by its `out_sharding` now; None takes the default of `use_eager_sharding`.
        metadata: anything else that should travel with the value, such as `out_sharding`.

    >>> v = Param(jnp.zeros(3), note="x")
    >>> v[...] = 1.0
    >>> float(v.sum()), v.note
    (3.0, 'x')
    """

    __slots__ = ("_raw_value", "_trace_state", "_var_metadata", "_frozen", "_home", "__weakref__")
    collection: str = "variable"

    def __init_subclass__(cls, collection: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if collection is not None:
            cls.collection = collection
            register_variable_name(collection, cls, overwrite=True)
        _register_pytree(cls)

    def __init__(self, value: A | VariableMetadata[A], *, hijax: bool | None = None, ref: bool | None = None,
                 eager_sharding: bool | None = None, **metadata: Any):  # fmt: skip
        if type(value) is VariableMetadata:
            metadata = {**metadata, **value.all_metadata()}
            value = value.raw_value
        if is_ref(value):
            raise StructureError("Cannot pass a Ref directly into Variable constructor", at=type(self).__name__,
                                 fix="pass an array and ref=True")  # fmt: skip
        defaults = current_defaults()
        hijax = metadata.pop("hijax", None) if hijax is None else hijax
        metadata["hijax"] = defaults.hijax if hijax is None else hijax
        metadata["ref"] = defaults.ref if ref is None else ref
        metadata["eager_sharding"] = using_eager_sharding() if eager_sharding is None else eager_sharding
        metadata.update(class_hooks(type(self)))
        rename_sharding(metadata)
        slot = object.__setattr__
        slot(self, "_trace_state", current_trace())
        slot(self, "_var_metadata", metadata)
        slot(self, "_frozen", None)
        slot(self, "_home", None)
        slot(self, "_raw_value", value)
        if any(name in metadata for name in HOOKS):
            warnings.warn(
                "Variable hooks are deprecated: make a Variable type of your own that overrides get_value and "
                "set_value.",
                UserWarning,
                stacklevel=3,
            )
        value = self.create_value(value)  # type: ignore[arg-type]
        if metadata["eager_sharding"] and metadata.get("out_sharding") is not None:
            value = place(value, metadata)
        if metadata["ref"]:
            value = jax.tree.map(_as_ref, value)
        slot(self, "_raw_value", value)

    # ------------------------------------------------------------ reading and writing
    @property
    def _can_update(self) -> bool:
        return self._trace_state == current_trace()

    def _check_can_update(self) -> None:
        if self._trace_state != current_trace():
            raise TraceContextError(
                f"Cannot mutate {type(self).__name__} from a different trace level",
                at=_path_of(self),
                fix="pass the module that holds it to the transformed function as an argument, "
                "or use a batiste transform",
            )

    def create_value(self, value: A) -> A:
        """What is stored when the Variable is made from `value`; override it to store something else."""
        hooks = self._var_metadata.get("on_create_value")
        return run_hooks(hooks, self, value) if hooks else value

    def get_value(self, *, index: Any = MISSING) -> A:
        """The value, or `value[index]`."""
        if recorders:
            note_read(self)
        value = self._raw_value
        hooks = self._var_metadata.get("on_get_value")
        if is_ref(value):
            read = value[...] if index is MISSING else value[index]
            return run_hooks(hooks, self, read) if hooks else read  # type: ignore[return-value]
        if hooks:
            value = run_hooks(hooks, self, value)
        if index is MISSING or (index is Ellipsis and isinstance(value, jax.Array)):
            return value  # type: ignore[return-value]
        return value[index]  # type: ignore[index]

    def set_value(self, value: A, *, index: Any = MISSING) -> None:
        """Stores `value`; with `index`, `value` is written into a part and takes the stored dtype.

        Raises:
            TraceContextError: the Variable was made at another trace level.
        """
        if isinstance(value, Variable):
            value = value.get_value()
        hooks = self._var_metadata.get("on_set_value")
        if hooks:
            value = run_hooks(hooks, self, value)
        raw = self._raw_value
        if is_ref(raw):
            if index is MISSING:
                raw[...] = value
            else:
                raw[index] = _fitted(value, raw, index)
            return
        self._check_can_update()
        if index is not MISSING and not (index is Ellipsis and _same_type(raw, value)):
            if isinstance(raw, jax.Array):
                value = _written(self, raw, index, value)  # type: ignore[assignment]
            else:
                new = copy.copy(raw)  # another object, so that transforms see the change
                new[index] = value  # type: ignore[index]
                value = new
        if self._home is not None:
            written_far_from_home(self)
        object.__setattr__(self, "_raw_value", value)

    def get_raw_value(self) -> A:
        """The stored object itself, without hooks; a `jax.Ref` where `ref=True`."""
        return self._raw_value

    def set_raw_value(self, value: A, *, _unsafe_bypass_check: bool = False) -> None:
        """Stores `value` without hooks."""
        if not _unsafe_bypass_check:
            self._check_can_update()
            if self._home is not None:
                written_far_from_home(self)
        object.__setattr__(self, "_raw_value", value)

    @property
    def value(self) -> A:
        _warn_old(".value", "variable[...] or variable.get_value()")
        return self.get_value()

    @value.setter
    def value(self, value: A) -> None:
        _warn_old("setting .value", "variable[...] = x or variable.set_value(x)")
        self.set_value(value)

    @property
    def raw_value(self) -> A:
        _warn_old(".raw_value", "variable.get_raw_value()")
        return self._raw_value

    @raw_value.setter
    def raw_value(self, value: A) -> None:
        _warn_old("setting .raw_value", "variable.set_raw_value(x)")
        self.set_raw_value(value)

    # ------------------------------------------------------------ metadata
    @property
    def type(self) -> type:
        return type(self)

    @property
    def var_type(self) -> type:
        return type(self)

    @property
    def hijax(self) -> bool:
        return self._var_metadata["hijax"]

    @property
    def ref(self) -> bool:
        return self._var_metadata["ref"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._raw_value.shape  # type: ignore[attr-defined]

    @property
    def sharding_names(self):
        warnings.warn("'sharding_names' is deprecated, use 'out_sharding' instead.", DeprecationWarning, stacklevel=2)
        return self.get_metadata("out_sharding")

    @property
    def required_metadata(self) -> frozenset[str]:
        return REQUIRED

    def has_metadata(self, name: str) -> bool:
        return name in self._var_metadata

    def get_metadata(self, name: str | None = None, default: Any = MISSING, *, exclude_required: bool | None = None):
        """All metadata as a new dict, or one entry.

        Raises:
            KeyError: there is no entry `name`, and no default was given.
        """
        if name is None:
            if not exclude_required:
                return dict(self._var_metadata)
            return {k: v for k, v in self._var_metadata.items() if k not in REQUIRED}
        if exclude_required is not None:
            raise TypeError("Cannot specify both 'name' and 'exclude_required' arguments.")
        if name in self._var_metadata or default is MISSING:
            return self._var_metadata[name]
        return default

    def set_metadata(self, *args: Any, **kwargs: Any) -> None:
        """`set_metadata(name, value)` and `set_metadata(a=1)` change entries; `set_metadata({...})` replaces all."""
        self._check_can_update()
        metadata = self._var_metadata
        if (args and kwargs) or len(args) > 2:
            raise TypeError("set_metadata takes a dict, or a name and a value, or keyword arguments.")
        if len(args) == 1:
            changes = dict(args[0])
            kept = {k: changes.get(k, metadata[k]) for k in REQUIRED if k in metadata}
            metadata = {**changes, **kept}
        elif args:
            metadata = {**metadata, args[0]: args[1]}
        else:
            metadata = {**metadata, **kwargs}
        self._set_metadata(metadata)

    def del_metadata(self, name: str) -> None:
        self._check_can_update()
        metadata = dict(self._var_metadata)
        del metadata[name]
        self._set_metadata(metadata)

    def _set_metadata(self, metadata: dict[str, Any]) -> None:
        object.__setattr__(self, "_var_metadata", metadata)
        object.__setattr__(self, "_frozen", None)
        structure_changed()

    def add_axis(self, axis_index: int, axis_name: str | None) -> None:
        """Tells the `on_add_axis` hooks that a transform has put a new axis at `axis_index`."""
        for hook in as_tuple(self._var_metadata.get("on_add_axis")):
            hook(self, axis_index, axis_name)

    def remove_axis(self, axis_index: int, axis_name: str | None) -> None:
        """Tells the `on_remove_axis` hooks that a transform has taken away the axis at `axis_index`."""
        for hook in as_tuple(self._var_metadata.get("on_remove_axis")):
            hook(self, axis_index, axis_name)

    # ------------------------------------------------------------ copies
    @classmethod
    def _new(cls, value, metadata: dict[str, Any], frozen: Frozen | None = None, trace=None) -> Variable:
        """A Variable around what is stored already: no hooks, no placement."""
        self = cls.__new__(cls)
        slot = object.__setattr__
        slot(self, "_raw_value", value)
        slot(self, "_trace_state", current_trace() if trace is None else trace)
        slot(self, "_var_metadata", metadata)
        slot(self, "_frozen", frozen)
        slot(self, "_home", None)
        return self

    @classmethod
    def from_metadata(cls, value: A, attributes: dict[str, Any]) -> Variable[A]:
        """A Variable with exactly these metadata, which must hold the required ones."""
        metadata = dict(attributes)
        metadata.setdefault("eager_sharding", using_eager_sharding())
        if metadata["ref"] and not metadata["hijax"]:
            value = _as_ref(value)  # type: ignore[assignment]
        return cls._new(value, metadata)._in_its_form()

    def _in_its_form(self) -> Variable:
        """The Variable itself, or a box with it where its metadata ask for one."""
        return hijax_forms().from_variable(self) if self._var_metadata["hijax"] else self

    def replace(self, value: Any = MISSING, *, _copy_ref: bool = True, **updates: Any) -> Variable:
        """A new Variable of this type with another value and changed metadata."""
        if value is MISSING:
            value = self._raw_value
            if _copy_ref and is_ref(value):
                value = jax.new_ref(value[...])
        metadata = {**self._var_metadata, **updates}
        if metadata["ref"] and (_is_arraylike(value) or isinstance(value, (bool, int, float, complex))):
            value = _as_ref(value)
        elif not metadata["ref"] and is_ref(value):
            value = value[...]
        return self._new(value, metadata)._in_its_form()

    copy = to_state = replace

    def copy_from(self, other: Variable[A]) -> None:
        """Takes over the value and the metadata of a Variable of the same type.

        Raises:
            StructureError: `other` is of another type.
        """
        if type(self) is not other.type:
            raise StructureError("Cannot copy from incompatible container", got=other.type.__name__,
                                 expected=type(self).__name__)  # fmt: skip
        if self is not other:
            self.update_from_state(other)

    def update_from_state(self, variable_state: Variable[A]) -> None:
        """Takes over the value, and the metadata where they differ."""
        value = variable_state.get_raw_value()
        if is_ref(self._raw_value) and value is not self._raw_value:
            self._raw_value[...] = value[...] if is_ref(value) else value  # type: ignore[index]
        else:
            self.set_raw_value(value[...] if is_ref(value) and not self.ref else value)  # type: ignore[index]
        if variable_state._var_metadata != self._var_metadata:
            kept = {k: self._var_metadata[k] for k in REQUIRED if k in self._var_metadata}
            self._set_metadata({**variable_state._var_metadata, **kept})

    def __copy__(self) -> Variable:
        return self._new(self._raw_value, dict(self._var_metadata))

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        return self._new(copy.deepcopy(self._raw_value, memo), copy.deepcopy(self._var_metadata, memo))

    def __getstate__(self):
        return {"_raw_value": self._raw_value, "_var_metadata": self._var_metadata}

    def __setstate__(self, state):
        slot = object.__setattr__
        slot(self, "_raw_value", state["_raw_value"])
        slot(self, "_var_metadata", state["_var_metadata"])
        slot(self, "_trace_state", current_trace())
        slot(self, "_frozen", None)
        slot(self, "_home", None)

    # ------------------------------------------------------------ standing for the value
    def __jax_array__(self):
        return self.get_value()

    def __getattr__(self, name: str) -> Any:
        if name in Variable.__slots__:
            raise AttributeError(f"{type(self).__name__} has no {name} yet: its __init__ did not run.")
        metadata = self._var_metadata
        if name in metadata:
            return metadata[name]
        return getattr(self.get_value(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("value", "raw_value", "_raw_value", "_trace_state", "_var_metadata", "_frozen", "_home"):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"Cannot set attribute {name} of a {type(self).__name__}: metadata are set by "
                                 f"variable.set_metadata({name}=...), the value by variable[...] = ...")  # fmt: skip

    def __getitem__(self, key) -> Any:
        return self.get_value(index=key)

    def __setitem__(self, key, value) -> None:
        self.set_value(value, index=key)

    def __delitem__(self, key) -> None:
        value = self.get_value()
        del value[key]  # type: ignore[attr-defined]
        self.set_value(value)

    def __call__(self, *args, **kwargs) -> Any:
        return self.get_value()(*args, **kwargs)  # type: ignore[operator]

    def __len__(self) -> int:
        return len(self.get_value())  # type: ignore[arg-type]

    def __iter__(self):
        return iter(self.get_value())  # type: ignore[call-overload]

    def __contains__(self, item) -> bool:
        return item in self.get_value()  # type: ignore[operator]

    def __bool__(self) -> bool:
        return bool(self.get_value())

    def __eq__(self, other):
        return self.get_value() == _value_of(other)

    def __batiste_repr__(self) -> Layout:
        items = [("value", self._raw_value), *self.get_metadata(exclude_required=True).items()]
        items += [(name, True) for name in ("hijax", "ref") if self._var_metadata.get(name)]
        return Layout(type(self).__name__, items, kind=type(self).__name__)

    def __repr__(self) -> str:
        return represent(self)

    def __treescope_repr__(self, path, subtree_renderer):
        return treescope_form(self, path, subtree_renderer)


Variable.__hash__ = None  # type: ignore[assignment]


def _same_type(old, new) -> bool:
    """Whether a whole-value write may simply replace the array: it would neither broadcast nor cast."""
    arrays = isinstance(old, jax.Array) and isinstance(new, jax.Array)
    return arrays and old.shape == new.shape and old.dtype == new.dtype and not is_ref(new)


def _is_arraylike(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, jax.ShapeDtypeStruct)


def _fitted(value, ref, index):
    """`value` broadcast and cast to the part of the Ref that it is written into, as `at[index].set` does."""
    shape = ref.shape
    if index is not Ellipsis:
        shape = jax.eval_shape(lambda x: x[index], jax.ShapeDtypeStruct(shape, ref.dtype)).shape
    if getattr(value, "dtype", None) != ref.dtype:
        value = jnp.asarray(value, ref.dtype)
    return value if value.shape == shape else jnp.broadcast_to(value, shape)


def _as_ref(x):
    return x if is_ref(x) else jax.new_ref(jnp.asarray(x))


def _warn_old(what: str, instead: str) -> None:
    warnings.warn(f"{what} of a Variable is deprecated: use {instead}.", DeprecationWarning, stacklevel=3)


def _value_of(x):
    return x.get_value() if isinstance(x, Variable) else x


def _path_of(variable: Variable):
    return variable._home.path() if variable._home is not None else variable


def _forward(name: str, function: Callable) -> None:
    def method(self, *args):
        return function(self.get_value(), *map(_value_of, args))

    def reflected(self, other):
        return function(_value_of(other), self.get_value())

    method.__name__ = f"__{name}__"
    setattr(Variable, method.__name__, method)
    if name in _BINARY and name not in ("lt", "le", "gt", "ge", "ne"):
        reflected.__name__ = f"__r{name}__"
        setattr(Variable, reflected.__name__, reflected)
        setattr(Variable, f"__i{name}__", _no_inplace)


def _no_inplace(self, other):
    raise NotImplementedError(
        "In-place operations on the Variable itself would rebind its name: write `variable[...] += x`."
    )


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "lshift", "rshift", "and", "or", "xor",
           "lt", "le", "gt", "ge", "ne")  # fmt: skip
for _name in _BINARY:
    _forward(_name, getattr(operator, f"__{_name}__"))
for _name in ("neg", "pos", "abs", "invert", "index"):
    _forward(_name, getattr(operator, f"__{_name}__"))
for _name, _function in {"int": int, "float": float, "complex": complex, "round": round, "divmod": divmod,
                         "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}.items():  # fmt: skip
    _forward(_name, _function)
Variable.__rdivmod__ = lambda self, other: divmod(_value_of(other), self.get_value())  # type: ignore[attr-defined]


# ---------------------------------------------------------------- Variables as JAX pytrees
_VALUE_KEY = jax.tree_util.GetAttrKey("value")


def _written(variable: Variable, raw: jax.Array, index: Any, value: Any) -> jax.Array:
    try:
        return raw.at[index].set(value)
    except ValueError as error:
        part = jax.eval_shape(lambda raw: raw[index], raw).shape
        raise ShapeError(f"cannot write into a {type(variable).__name__}", at=variable, got=jnp.shape(value),
                         expected=f"what broadcasts to {part}", fix="reshape it, or set_value(...) it as a whole",
                         ) from error  # fmt: skip


def _flatten(variable: Variable):
    if recorders:
        note_read(variable)
    _last_flattened[0] = variable._trace_state
    if variable._home is not None:
        variable._home.delivered()
    return (variable._raw_value,), frozen_metadata(variable)


def _flatten_with_keys(variable: Variable):
    children, frozen = _flatten(variable)
    return ((_VALUE_KEY, children[0]),), frozen


def _register_pytree(cls: type) -> None:
    def unflatten(frozen: Frozen, children):
        variable = cls._new(children[0], dict(frozen.items), frozen)
        trace = variable._trace_state
        last = _last_flattened[0]
        if trace != AT_REST and trace != last and is_inside(trace, last):  # a copy, which may not go back
            object.__setattr__(variable, "_home", Home(cls.__name__))
        return variable

    jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, unflatten, _flatten)


_last_flattened: list[Any] = [AT_REST]  # the trace level of the Variable that was flattened last


_register_pytree(Variable)


# ---------------------------------------------------------------- kinds and their names
_types_by_name: dict[str, type[Variable]] = {}


def register_variable_name(name: str, typ: Any = MISSING, *, overwrite: bool = False):
    """Registers the pair of a collection name and a Variable type; without `typ` it is a decorator.

    Raises:
        ValueError: the name belongs to another type and `overwrite` is not set.
    """
    if typ is MISSING:
        return lambda cls: register_variable_name(name, cls, overwrite=overwrite)
    if name in _types_by_name and not overwrite:
        raise ValueError(
            f"Name {name} already mapped to type {_types_by_name[name].__name__}: choose another, "
            "or pass overwrite=True."
        )
    _types_by_name[name] = typ
    return typ


def variable_type_from_name(name: str, /, *, base: type[Variable] = Variable, allow_register: bool = False):
    """The Variable type of a collection name; with `allow_register` an unknown name gets a new subclass of `base`."""
    if name not in _types_by_name:
        if not allow_register:
            raise ValueError(f"no Variable type goes by the name '{name}': it is not registered. Register one with "
                             "register_variable_name(), or pass allow_register=True.")  # fmt: skip
        register_variable_name(name, VariableMeta(name, (base,), {"__slots__": ()}))
    return _types_by_name[name]


def variable_name_from_type(typ: type[Variable], /, *, allow_register: bool = False) -> str:
    """The collection name of a Variable type; with `allow_register` an unknown type gets its class name."""
    for name, known in _types_by_name.items():
        if known is typ:
            return name
    if not allow_register:
        raise ValueError(f"{typ.__name__} has no collection name: it is not registered. Register one with "
                         "register_variable_name(), or pass allow_register=True.")  # fmt: skip
    name = typ.__name__
    if name in _types_by_name:
        raise ValueError(f"Name {name} already mapped to type {_types_by_name[name]}.")
    register_variable_name(name, typ)
    return name


class Param(Variable[A], collection="params"):
    """A value that is trained."""

    __slots__ = ()


class BatchStat(Variable[A], collection="batch_stats"):
    """A running statistic, such as the mean of a BatchNorm."""

    __slots__ = ()


class Cache(Variable[A], collection="cache"):
    """A value kept from call to call, such as the keys and values of autoregressive decoding."""

    __slots__ = ()


class Intermediate(Variable[A], collection="intermediates"):
    """A value recorded on the way by `sow`."""

    __slots__ = ()


class Perturbation(Intermediate[A], collection="perturbations"):
    """A zero added to an intermediate, so that a gradient with respect to the intermediate can be taken."""

    __slots__ = ()
