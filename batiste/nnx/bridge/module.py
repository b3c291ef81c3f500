# SPDX-License-Identifier: Apache-2.0
"""Modules that are both: objects with Linen's `setup`, `compact`, `init` and `apply`.

    unbound module --init/apply: a copy, bound to a Scope--> attributes are Variables and submodules

A submodule is bound when it becomes an attribute, or in a compact method when it is made. The variables that `apply`
is given wait as `ModuleState`s under the names of the submodules to come.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeGuard, TypeVar, dataclass_transform

import jax

from batiste.core.frozen_dict import FrozenDict
from batiste.graph import Pytree, Rngs, RngState, State, Variable, clone, variable_type_from_name
from batiste.graph import module as graph_module
from batiste.graph.errors import ArgumentError
from batiste.graph.pytree import PytreeMeta, data, has_data, register_data_type, sorted_names
from batiste.linen.boxes import is_axis_metadata

from .variables import HashableDict, give, linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars, to_nnx_var

F = TypeVar("F", bound=Callable[..., Any])
OWN = ("scope", "attr_priorities")
CONTAINERS = (list, tuple, Mapping)


# ---------------------------------------------------------------- what is running
@dataclasses.dataclass
class ModuleStackEntry:
    """A bound module whose method is running.

    Args:
        in_compact: whether the method is compact.
        type_counter: how many submodules of each type the method has made.
    """

    module: Module
    in_compact: bool
    type_counter: defaultdict[type, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    in_setup: bool = dataclasses.field(default=False, init=False, repr=False)


@dataclasses.dataclass
class ModuleContext(threading.local):
    """The bound modules whose methods are running in this thread, innermost last; None where a call begins anew."""

    module_stack: list[ModuleStackEntry | None] = dataclasses.field(default_factory=lambda: [None])


MODULE_CONTEXT = ModuleContext()


def current_context() -> ModuleStackEntry | None:
    """What is known of the method that is running."""
    return MODULE_CONTEXT.module_stack[-1]


def current_module() -> Module | None:
    """The bound module whose method is running."""
    entry = current_context()
    return None if entry is None else entry.module


class _Running:
    """`with _Running(entry)`: the entry is the innermost."""

    __slots__ = ("entry",)

    def __init__(self, entry: ModuleStackEntry | None):
        self.entry = entry

    def __enter__(self) -> None:
        MODULE_CONTEXT.module_stack.append(self.entry)

    def __exit__(self, *_: object) -> None:
        MODULE_CONTEXT.module_stack.pop()


def compact(f: F) -> F:
    """Lets parameters, variables and submodules be made in the body of the method, where they are used."""
    f._bridge_compact = True  # type: ignore[attr-defined]
    return f


def _pushed(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def method(self: Module, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None:
            return f(self, *args, **kwargs)
        with _Running(ModuleStackEntry(self, hasattr(f, "_bridge_compact"))):
            return f(self, *args, **kwargs)

    method._bridge_pushed = True  # type: ignore[attr-defined]
    return method


# ---------------------------------------------------------------- attributes
class AttrPriority(enum.IntEnum):
    """Which of an object's attributes comes first, when an object is reached by several of them."""

    HIGH = 0
    INIT_PARENT = 20
    DEFAULT = 50
    LOW = 100


def _get_priority(k: str, attr_priorities: Mapping[str, AttrPriority]) -> AttrPriority:
    return attr_priorities.get(k, AttrPriority.DEFAULT)


@register_data_type
class ModuleState(State):
    """Variables of a submodule that is not made yet."""


class Scope(Pytree):
    """What the modules of one call share.

    Args:
        rngs: the streams.
        mutable: the collections that may be written.
    """

    def __init__(self, rngs: Rngs, mutable: Any):
        self.rngs = rngs
        self.mutable = tuple(mutable) if isinstance(mutable, (list, set)) else mutable
        self.initializing = False

    def copy(self) -> Scope:
        """Another scope, with streams of its own."""
        new = Scope(self.rngs.fork(), self.mutable)
        new.initializing = self.initializing
        return new


class _HasSetup(Protocol):
    def setup(self) -> None: ...


def has_setup(x: Any) -> TypeGuard[_HasSetup]:
    """Whether an object has a method `setup`."""
    return hasattr(x, "setup")


class ModuleBase:
    """What type checkers know of a bridge module's attributes."""

    scope: Scope | None
    attr_priorities: Mapping[str, AttrPriority]


class ModuleMeta(PytreeMeta):
    """Makes a module a part of the one that is running: by its `name`, or in a compact method by a made-up one."""

    def __call__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        name, free = kwargs.get("name"), "parent" in kwargs
        if kwargs.get("parent") is not None:
            raise ArgumentError(f"'parent' can only be set to None, got {type(kwargs['parent']).__name__}",
                                fix="leave it out: a module finds its parent by itself")  # fmt: skip
        known = inspect.signature(cls.__init__).parameters
        module = super().__call__(
            *args, **{k: v for k, v in kwargs.items() if k in known or k not in ("name", "parent")}
        )
        around = current_context()
        if around is not None and not free and (around.in_compact or name is not None):
            name = _auto_submodule_name(around, type(module)) if name is None else name
            around.module.set_attr_priority(name, AttrPriority.INIT_PARENT)
            setattr(around.module, name, module)
        return module

    def _pytree_meta_construct(cls, self: Any, *args: Any, **kwargs: Any) -> None:
        vars(self).update(scope=None, attr_priorities=HashableDict())
        self._pytree__nodes.update(scope=True, attr_priorities=False)
        self.__init__(*args, **kwargs)


def _auto_submodule_name(parent_ctx: ModuleStackEntry, cls: type) -> str:
    """`Type_0`, `Type_1`, … in the order in which the method makes them."""
    number = parent_ctx.type_counter[cls]
    parent_ctx.type_counter[cls] += 1
    return f"{cls.__name__}_{number}"


# ---------------------------------------------------------------- the module
@dataclass_transform()
class Module(graph_module.Module, ModuleBase, metaclass=ModuleMeta):
    """Base of modules that are both. Subclasses are dataclasses of settings, unless they define `__init__`.

    >>> class Dense(Module):
    ...     features: int
    ...     @compact
    ...     def __call__(self, x):
    ...         w = self.param("w", jax.nn.initializers.ones, (x.shape[-1], self.features))
    ...         return x @ w
    >>> variables = Dense(2).init(0, jax.numpy.ones((1, 3)))
    >>> Dense(2).apply(variables, jax.numpy.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)
    """

    _takes_new_parts = ModuleState

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(repr=False, eq=False)(cls)
        for name, value in list(vars(cls).items()):
            public = name == "__call__" or not name.startswith("__")
            if public and inspect.isfunction(value) and not hasattr(value, "_bridge_pushed"):
                setattr(cls, name, _pushed(value))

    def _setattr(self, name: str, value: Any) -> None:
        old = vars(self).get(name)
        if self.scope is not None and old is not value and name not in OWN:
            if isinstance(old, State):
                give(value, old)
            elif isinstance(old, Pytree) and isinstance(value, Pytree):
                give(value, _as_dicts(old, set()))
        super()._setattr(name, data(value) if isinstance(value, CONTAINERS) and has_data(value) else value)
        if self.scope is not None and name not in OWN:
            for module in _modules_in(value):
                _bind_module(self, module)

    def set_attr_priority(self, name: str, value: AttrPriority) -> None:
        """Says which place the attribute has among those that lead to the same object."""
        self.attr_priorities = HashableDict({**self.attr_priorities, name: value})

    # ------------------------------------------------------------ variables and streams
    def is_initializing(self) -> bool:
        """Whether this call is an `init`."""
        return self.scope is not None and self.scope.initializing

    def make_rng(self, name: str = "default") -> jax.Array:
        """The next key of a random stream.

        Raises:
            ArgumentError: the module is unbound.
            RngError: there is no such stream, nor `default`.
        """
        if self.scope is None:
            raise ArgumentError("Can't use RNGs on unbound modules", at=type(self).__name__, fix="use init or apply")
        return self.scope.rngs[name]()

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True,
              **init_kwargs: Any) -> Variable:  # fmt: skip
        """The parameter `name`; `init_fn(key, *init_args)` makes its value."""

        def first() -> Any:
            return init_fn(self.make_rng("params"), *init_args, **init_kwargs)

        return self._variable("params", name, first, "Parameters")

    def variable(self, col: str, name: str, init_fn: Callable[..., Any] | None = None, *init_args: Any,
                 unbox: bool = True, **init_kwargs: Any) -> Variable:  # fmt: skip
        """The variable `name` of collection `col`; `init_fn(*init_args)` makes its first value."""
        first = None if init_fn is None else functools.partial(init_fn, *init_args, **init_kwargs)
        return self._variable(col, name, first, "Variables")

    def _variable(self, col: str, name: str, first: Callable[[], Any] | None, plural: str) -> Variable:
        if not _may_make(self):
            raise ArgumentError(
                f"{plural} must be initialized in `setup()` or in a method wrapped in `@compact`",
                at=type(self).__name__, fix="move it into setup(), or decorate the method with @compact",
            )  # fmt: skip
        variable = vars(self).get(name)
        if not isinstance(variable, Variable):
            if first is None:
                raise ArgumentError(f"the variable {name!r} of collection {col!r} does not exist",
                                    at=type(self).__name__, fix="give an init_fn")  # fmt: skip
            value = first()
            variable = to_nnx_var(col, value) if is_axis_metadata(value) else _new_variable(col, value)
            setattr(self, name, variable)
        return variable

    def _get_variables(self) -> dict[str, Any]:
        return nnx_attrs_to_linen_vars(_as_dicts(self, set()))

    @property
    def variables(self) -> Mapping[str, Any]:
        """The variables of this module and of those below it, by collection."""
        return FrozenDict(self._get_variables())

    # ------------------------------------------------------------ from and to variables
    def apply(self, variables: Mapping[str, Mapping[str, Any]], *args: Any, rngs: Any = None,
              method: Callable[..., Any] | str = "__call__", mutable: Any = False, _initialize: bool = False,
              **kwargs: Any) -> Any:  # fmt: skip
        """The result of a method; with `mutable`, also the variables after it.

        Args:
            variables: what `init` returned.
            rngs: streams, keys by name, or one key or seed for the stream `default`.
            method: a method or its name.
            mutable: the collections that may be written.
        """
        scope = Scope(_streams(rngs), mutable)
        scope.initializing = _initialize
        with _Running(None):
            module = clone(self)
            give(module, linen_vars_to_nnx_attrs(variables))
            _enter(module, scope)
            f = getattr(type(module), method) if isinstance(method, str) else _get_unbound_fn(method)
            y = f(module, *args, **kwargs)
        return y if mutable is False else (y, module._get_variables())

    def init(self, rngs: Any = None, *args: Any, method: Callable[..., Any] | str = "__call__",
             **kwargs: Any) -> dict[str, Any]:  # fmt: skip
        """The variables that a method makes. Arguments as in `apply`."""
        return self.init_with_output(rngs, *args, method=method, **kwargs)[1]

    def init_with_output(self, rngs: Any = None, *args: Any, method: Callable[..., Any] | str = "__call__",
                         mutable: Any = False, **kwargs: Any) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """The result of a method, and the variables that it made. Arguments as in `apply`."""
        del mutable  # all collections may be written while they are made
        return self.apply({}, *args, rngs=rngs, method=method, mutable=True, _initialize=True, **kwargs)


def _may_make(module: Module) -> bool:
    """Whether the module's `setup`, or a compact method of it, is running in this call."""
    for entry in reversed(MODULE_CONTEXT.module_stack):
        if entry is None:
            break
        if entry.module is module and (entry.in_compact or entry.in_setup):
            return True
    return False


def _new_variable(col: str, value: Any) -> Variable:
    kind = variable_type_from_name(col, allow_register=True)
    return value if isinstance(value, kind) else kind(value)


def _streams(rngs: Any) -> Rngs:
    if isinstance(rngs, Rngs):
        return rngs
    if rngs is None:
        return Rngs()
    return Rngs(**rngs) if isinstance(rngs, Mapping) else Rngs(rngs)


def _get_unbound_fn(method_or_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a module, from a method of one or a function."""
    return getattr(method_or_fn, "__func__", method_or_fn)


def _as_dicts(x: Any, seen: set[int]) -> dict[Any, Any]:
    """The Variables below an object or container as nested dicts, each where it is met first."""
    found: dict[Any, Any] = {}
    for name, value in _parts(x):
        if id(value) in seen or isinstance(value, RngState):
            continue
        if isinstance(value, Variable):
            seen.add(id(value))
            found[name] = value
        elif isinstance(value, (Pytree, Mapping, list, tuple)):
            seen.add(id(value))
            if below := _as_dicts(value, seen):
                found[name] = below
    return found


def _parts(x: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of an object or container, those of the highest priority first."""
    if isinstance(x, Module):
        names = sorted(set(vars(x)) - set(OWN), key=lambda name: (_get_priority(name, x.attr_priorities), name))
        yield from ((name, vars(x)[name]) for name in names)
    elif isinstance(x, Pytree):
        yield from ((int(k) if x._pytree__has_int_keys and k.isdigit() else k, vars(x)[k]) for k in sorted_names(x))
    else:
        yield from x.items() if isinstance(x, Mapping) else enumerate(x)


def _bind_module(parent: Module, module: Module) -> Module:
    """Lets `module` live in the scope of `parent`."""
    if parent.scope is not None:
        _enter(module, parent.scope)
    return module


def _enter(module: Module, scope: Scope) -> None:
    """Binds a module and those among its attributes, then runs its `setup`."""
    module.scope = scope
    for name, value in list(vars(module).items()):
        for part in _modules_in(value) if name not in OWN else ():
            _enter(part, scope)
    _maybe_call_setup(module)


def _modules_in(value: Any) -> Iterator[Module]:
    """The unbound modules that a value is, or holds."""
    if isinstance(value, Module):
        if value.scope is None:
            yield value
    elif isinstance(value, (Pytree, *CONTAINERS)):
        for _, part in _parts(value):
            yield from _modules_in(part)


def _maybe_call_setup(module: Module) -> None:
    if not has_setup(module):
        return
    entry = ModuleStackEntry(module, False)  # type: ignore[arg-type]
    entry.in_setup = True
    with _Running(entry):
        inspect.unwrap(_get_unbound_fn(module.setup))(module)
