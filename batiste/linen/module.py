# SPDX-License-Identifier: Apache-2.0
"""Modules of the functional face: settings in a dataclass, whose variables live in a `Scope` during a call.

A module is unbound (settings only) or bound to a scope. `init` and `apply` bind a copy to a fresh scope, run a method,
and hand out the variables. Submodules come from fields, from `setup`, or from the body of a `@compact` method; each is
*attached* to its parent under a name, which gives it the scope of that name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from batiste.core.frozen_dict import FrozenDict
from batiste.errors import (
    ApplyModuleInvalidMethodError,
    AssignSubModuleError,
    CallCompactUnboundModuleError,
    CallShareScopeOnUnboundModuleError,
    CallUnbindOnUnboundModuleError,
    DescriptorAttributeError,
    IncorrectPostInitOverrideError,
    InvalidInstanceModuleError,
    NameInUseError,
    ReservedModuleAttributeError,
    SetAttributeFrozenModuleError,
    SetAttributeInModuleSetupError,
)
from batiste.graph.errors import ArgumentError, CallError

from .abstract import without_values
from .calls import ALL_BUT_INTERMEDIATES, apply, init, init_with_output, streams_of
from .context import InterceptorContext, in_module, intercept_methods, intercepted, running
from .scope import Scope, Variable, root_scope
from .summary import NO_OPTIONS, tabulate

F = TypeVar("F", bound=Callable[..., Any])


class Unspecified:
    """The type of the default of `parent`: the module that is being called."""

    def __repr__(self) -> str:
        return "unspecified"

    def __reduce__(self) -> str:
        return "unspecified"  # copies are the one object


unspecified = Unspecified()


# ---------------------------------------------------------------- marks on methods


def compact(fun: F) -> F:
    """Lets submodules and variables be made in the body of the method, where they are used."""
    fun.compact = True  # type: ignore[attr-defined]
    return fun


def compact_name_scope(fun: F) -> F:
    """As `compact`, for methods beside the compact one: what the body makes is in a scope of the method's name."""
    fun.compact = True  # type: ignore[attr-defined]
    fun.compact_name_scope = True  # type: ignore[attr-defined]
    return fun


def nowrap(fun: F) -> F:
    """Leaves a method as it is: calling it neither runs `setup` nor makes the module the parent of new ones."""
    fun.nowrap = True  # type: ignore[attr-defined]
    return fun


def _wrapped(fun: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fun)
    def method(self, *args, **kwargs):
        return self._call_wrapped_method(fun, args, kwargs)

    method.wrapped = True  # type: ignore[attr-defined]
    return method


def _is_method(name: str, value: Any) -> bool:
    if not inspect.isfunction(value) or hasattr(value, "wrapped") or hasattr(value, "nowrap"):
        return False
    return name in ("__call__", "setup") or not (name.startswith("__") and name.endswith("__"))


# ---------------------------------------------------------------- the module


@dataclasses.dataclass
class _State:
    """What a module remembers beside its settings."""

    in_setup: bool = False
    compact_depth: int = 0
    setup_begun: bool = False
    names_made: dict[str, int] = dataclasses.field(default_factory=dict)
    names_taken: set[str] = dataclasses.field(default_factory=set)  # by the last run of the compact method
    children: dict[str, Module] = dataclasses.field(default_factory=dict)
    adopted: dict[int, tuple[Module, Module]] = dataclasses.field(default_factory=dict)  # shared by all of one binding


@dataclass_transform()
class Module:
    """Base of all modules of the functional face. Subclasses are dataclasses of settings.

    >>> class MLP(Module):
    ...     features: int
    ...     @compact
    ...     def __call__(self, x):
    ...         w = self.param("w", jax.nn.initializers.ones, (x.shape[-1], self.features))
    ...         return x @ w
    >>> variables = MLP(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> MLP(2).apply(variables, jnp.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)
    """

    name: str | None
    parent: Any
    scope: Scope | None = None
    preserve_adopted_names: ClassVar[bool] = False  # modules that come in through fields keep names of their own
    _state: _State

    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        hints = inspect.get_annotations(cls)
        if reserved := {k: v for k, v in hints.items() if k in ("name", "parent")}:
            raise ReservedModuleAttributeError(reserved)
        cls.__annotations__ = {**hints, "parent": "Any", "name": "str | None"}
        cls.parent = dataclasses.field(default=unspecified, repr=False, kw_only=True)
        cls.name = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
        defined = set(vars(cls))
        dataclasses.dataclass(unsafe_hash="__hash__" not in defined, repr=False, kw_only=kw_only)(cls)
        if "__hash__" not in defined:
            cls.__hash__ = _hash_unbound(cls.__hash__)  # type: ignore[method-assign]
        fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
        fields.update({name: fields.pop(name) for name in ("parent", "name")})  # they come last
        for name, value in list(vars(cls).items()):
            if _is_method(name, value) and name not in hints:
                setattr(cls, name, _wrapped(value))

    # ------------------------------------------------------------ coming into being
    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        parent = running.modules[-1] if isinstance(self.parent, Unspecified) else self.parent
        put("parent", parent)
        put("_state", _State())
        if parent is None:
            return
        if isinstance(parent, Scope):
            put("scope", parent)
            self._adopt_fields()
        elif isinstance(parent, Module):
            if not parent._initialization_allowed:
                raise AssignSubModuleError(type(self).__name__)
            if self.name is None and parent._state.compact_depth:
                kind = type(self).__name__
                number = parent._state.names_made.get(kind, 0)
                parent._state.names_made[kind] = number + 1
                put("name", f"{kind}_{number}")
            if self.name is not None:
                self._attach(parent, self.name)
        else:
            raise ArgumentError("parent must be None, Module or Scope", got=type(parent).__name__,
                                fix="leave it out: a module finds its parent by itself")  # fmt: skip

    @property
    def _initialization_allowed(self) -> bool:
        return self._state.in_setup or self._state.compact_depth > 0

    def _attach(self, parent: Module, name: str) -> None:
        """Becomes the part `name` of `parent`, with the scope of that name."""
        put = functools.partial(object.__setattr__, self)
        put("name", name)
        put("parent", parent)
        self._state.adopted = parent._state.adopted
        if parent.scope is not None:
            if parent.scope.name_reserved(name):
                raise NameInUseError("submodule", name, type(parent).__name__)
            put("scope", parent.scope.push(name))
        parent._state.children[name] = self
        if self.scope is not None:
            self._adopt_fields()

    def _adopt_fields(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = vars(self).get(field.name)
            if field.name not in ("parent", "name") and isinstance(value, (Module, list, tuple, Mapping)):
                object.__setattr__(self, field.name, self._adopt(field.name, value))

    def _adopt(self, name: str, value: Any) -> Any:
        """`value` with the modules in it attached to this one; containers become immutable."""
        if isinstance(value, Module):
            return self._adopt_module(name, value)
        if isinstance(value, (list, tuple)):
            parts = [self._adopt(f"{name}_{i}", x) for i, x in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, (dict, FrozenDict)):
            return FrozenDict({k: self._adopt(f"{name}_{k}", x) for k, x in value.items()})
        return value

    def _adopt_module(self, name: str, module: Module) -> Module:
        if module.parent is None:  # made outside: a copy of it joins, the same one wherever it is met
            _, known = self._state.adopted.get(id(module), (None, None))
            if known is None:
                if self.preserve_adopted_names and module.name is not None:
                    name = module.name
                known = module.clone(parent=None, name=name)
                self._state.adopted[id(module)] = (module, known)
                known._attach(self, name)
            return known
        if module.name is None and module.scope is None:  # made in `setup`
            module._attach(self, name)
        return module

    # ------------------------------------------------------------ attributes
    def __setattr__(self, name: str, value: Any) -> None:
        state = vars(self).get("_state")
        if state is None or (self.scope is None and not state.in_setup):
            object.__setattr__(self, name, value)
            return
        if not state.in_setup:
            raise SetAttributeFrozenModuleError(type(self).__name__, name, value)
        field = self.__dataclass_fields__.get(name)  # type: ignore[attr-defined]
        if field is not None and field.init:
            raise SetAttributeInModuleSetupError
        object.__setattr__(self, name, self._adopt(name, value))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and "_state" in vars(self):
            if hasattr(inspect.getattr_static(type(self), name, None), "__get__"):
                raise DescriptorAttributeError
            self._try_setup()
            if name in vars(self):
                return vars(self)[name]
        raise AttributeError(
            f'"{type(self).__name__}" object has no attribute "{name}". If "{name}" is defined in \'.setup()\', '
            "remember these fields are only accessible from inside 'init' or 'apply'."
        )

    def __dir__(self) -> list[str]:
        self._try_setup()
        return sorted({*object.__dir__(self), *vars(self)})

    def __repr__(self) -> str:
        lines = [
            f"{f.name} = {_shown(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.repr and f.name not in ("parent", "name")
        ]
        if self.name is not None:
            lines.append(f"name = {self.name!r}")
        children = [f"{name} = {child!r}" for name, child in self._state.children.items()]
        text = ["# attributes", *lines] * bool(lines) + ["# children", *children] * bool(children)
        indented = "\n".join(text).replace("\n", "\n    ")
        return f"{type(self).__name__}(\n    {indented}\n)" if text else f"{type(self).__name__}()"

    # ------------------------------------------------------------ calling
    def setup(self) -> None:
        """Makes submodules and variables as attributes; runs by itself before the first use of a bound module."""

    def _try_setup(self) -> None:
        state = vars(self)["_state"]
        if self.scope is None or state.setup_begun:
            return
        state.setup_begun = state.in_setup = True
        try:
            if type(self).setup is not Module.setup:
                self.setup()
        finally:
            state.in_setup = False

    def _call_wrapped_method(self, fun: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a method: after `setup`, as the parent of what is made, past all interceptors."""
        if "_state" not in vars(self):
            raise IncorrectPostInitOverrideError
        name = fun.__name__
        is_compact = hasattr(fun, "compact")
        if is_compact and self.scope is None:
            raise CallCompactUnboundModuleError
        self._try_setup()
        with in_module(self), self._compact(fun) if is_compact else contextlib.nullcontext(), self._named(name):
            if running.interceptors:
                bound = functools.partial(fun, self)
                y = intercepted(fun, InterceptorContext(self, name, bound))(*args, **kwargs)
            else:
                y = fun(self, *args, **kwargs)
            if self.scope is not None and (wanted := self.scope.get_flag("capture")) and wanted(self, name):
                self.sow("intermediates", name, y)
        return y

    @contextlib.contextmanager
    def _compact(self, fun: Callable[..., Any]) -> Iterator[None]:
        """While a compact method runs: names are counted from the start, and those of its last run are free."""
        state, scope = self._state, self.scope
        own_scope = hasattr(fun, "compact_name_scope")
        if own_scope:
            object.__setattr__(self, "scope", scope.push(fun.__name__, reuse=True).rewound())  # type: ignore[union-attr]
        outermost = own_scope or not state.compact_depth
        made = state.names_made
        if outermost:
            state.names_made = {}
            if not own_scope:
                for name in state.names_taken:
                    self.scope.reserved.pop(name, None)  # type: ignore[union-attr]
        before = set(self.scope.reserved)  # type: ignore[union-attr]
        state.compact_depth += 1
        try:
            yield
        finally:
            state.compact_depth -= 1
            if outermost:
                state.names_made = made
                if not own_scope:
                    state.names_taken = set(self.scope.reserved) - before  # type: ignore[union-attr]
            object.__setattr__(self, "scope", scope if own_scope else self.scope)

    def _named(self, method: str) -> contextlib.AbstractContextManager[Any]:
        if not running.named:
            return contextlib.nullcontext()
        name = self.name or type(self).__name__
        return jax.named_scope(name if method == "__call__" else f"{name}.{method}")

    # ------------------------------------------------------------ copies
    def clone(
        self, *, parent: Any = None, _deep_clone: Any = False, _reset_names: bool = False, **updates: Any
    ) -> Self:
        """The same module with other settings, unbound or under another parent."""
        copies: dict[int, Module] = {}

        def unbound(value: Any) -> Any:
            if isinstance(value, Module):
                if value.parent is None:
                    return value
                if id(value) not in copies:
                    copies[id(value)] = value.clone(name=None, _reset_names=_reset_names)
                return copies[id(value)]
            if isinstance(value, (list, tuple)):
                parts = [unbound(x) for x in value]
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            if isinstance(value, (dict, FrozenDict)):
                return type(value)({k: unbound(x) for k, x in value.items()})
            return value

        keep = (lambda x: x) if isinstance(parent, (Module, Unspecified)) else unbound
        settings = {f.name: keep(vars(self)[f.name]) for f in dataclasses.fields(self)  # type: ignore[arg-type]
                    if f.init and f.name != "parent"}  # fmt: skip
        if _reset_names:
            settings["name"] = None
        return type(self)(**{**settings, **updates, "parent": parent})

    def copy(self, *, parent: Any = unspecified, name: str | None = None, **updates: Any) -> Self:
        """A copy under the module that is being called, with other settings."""
        return self.clone(parent=parent, name=name, **updates)

    # ------------------------------------------------------------ variables and streams
    def _bound(self, problem: str) -> Scope:
        if self.scope is None:
            raise ArgumentError(f"{problem} on unbound modules", at=type(self).__name__,
                                fix="use it inside init() or apply(), or bind the module first")  # fmt: skip
        return self.scope

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the root to this module."""
        return self._bound("Can't access module paths").path

    @property
    def variables(self) -> Mapping[str, Mapping[str, Any]]:
        """The variables of this module and of those below it."""
        return self._bound("Can't access variables").variables()

    def _new_name(self, kind: str, plural: str, name: str, col: str) -> Scope:
        scope = self._bound(f"Can't create {plural.lower()}")
        if not self._initialization_allowed:
            problem = f"{plural} must be initialized in `setup()` or in a method wrapped in `@compact`"
            raise ArgumentError(problem, at=scope.path_text,
                                fix="move it into setup(), or decorate the method with @compact")  # fmt: skip
        if scope.name_reserved(name, col):
            raise NameInUseError(kind, name, type(self).__name__)
        return scope

    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> Any:
        """The parameter `name`; `init_fn(key, *init_args)` makes it."""
        scope = self._new_name("param", "Parameters", name, "params")
        return scope.param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)

    def variable(self, col: str, name: str, init_fn: Callable[..., Any] | None = None, *init_args: Any,
                 unbox: bool = True, **init_kwargs: Any) -> Variable:  # fmt: skip
        """The variable `name` of collection `col`; `init_fn(*init_args)` gives its first value."""
        scope = self._new_name("variable", "Variables", name, col)
        return scope.variable(col, name, init_fn, *init_args, unbox=unbox, **init_kwargs)

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """The value of a variable, or `default`."""
        return self._bound("Can't access variables").get_variable(col, name, default)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Writes a variable, or makes it."""
        self._bound("Can't access variables").put_variable(col, name, value)

    def has_variable(self, col: str, name: str) -> bool:
        """Whether the variable exists."""
        return self._bound("Can't access variables").has_variable(col, name)

    def is_mutable_collection(self, col: str) -> bool:
        """Whether the collection may be written in this call."""
        return self._bound("Can't check mutability").is_mutable_collection(col)

    def is_initializing(self) -> bool:
        """Whether this call is an `init`."""
        return self._bound("Can't check if running under init()").get_flag("initializing", False)

    def has_rng(self, name: str) -> bool:
        """Whether the call has a random stream of this name."""
        return self._bound("Can't query for RNGs").has_rng(name)

    def make_rng(self, name: str = "params") -> jax.Array:
        """The next key of a random stream; `params` stands in for one that is missing."""
        return self._bound("Can't use RNGs").make_rng(name)

    def sow(self, col: str, name: str, value: Any, reduce_fn: Callable[..., Any] = lambda xs, x: xs + (x,),
            init_fn: Callable[[], Any] = lambda: ()) -> bool:  # fmt: skip
        """Adds `value` to a variable, if its collection may be written; says whether.

        Args:
            reduce_fn: `reduce_fn(what there is, value)` is stored; by default values are gathered in a tuple.
            init_fn: what there is at first.
        """
        scope = self._bound("Can't store variables")
        if not scope.is_mutable_collection(col):
            return False
        if scope.has_variable(col, name):
            seen = scope.get_variable(col, name)
        else:
            scope.reserve(name, col)
            seen = init_fn()
        scope.put_variable(col, name, reduce_fn(seen, value))
        return True

    def perturb(self, name: str, value: Any, collection: str = "perturbations") -> Any:
        """value + the variable `name`, which is zero: its gradient is that of `value`."""
        scope = self._bound("Can't store variables")
        if not scope.has_variable(collection, name):
            if not scope.is_mutable_collection(collection):
                if scope.is_collection_empty(collection):
                    return value
                problem = f"Perturbation collection {collection} present, but missing perturbation variable {name}"
                raise ArgumentError(problem, at=scope.path_text,
                                    fix="initialise the model anew, or leave the collection out")  # fmt: skip
            scope.reserve(name, collection)
            scope.put_variable(collection, name, jax.tree.map(jnp.zeros_like, value))
        return jax.tree.map(jnp.add, value, scope.get_variable(collection, name))

    # ------------------------------------------------------------ from and to variables
    def apply(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, method: Any = None,
              mutable: Any = False, capture_intermediates: Any = False, **kwargs: Any) -> Any:  # fmt: skip
        """The result of a method; with `mutable`, also the collections that may have changed.

        Args:
            variables: what `init` returned.
            rngs: keys by the name of their stream; a single key is that of `params`.
            method: a method, its name, or a function of the module; by default `__call__`.
            mutable: the collections that may be written: a name, several, True, or a `DenyList`.
            capture_intermediates: keep the results of all `__call__`s, or those that `f(module, method name)` chooses,
                in the collection `intermediates`.
        """
        call = apply(_method_of(self, method), self, mutable, capture_intermediates)
        return call(variables, *args, **kwargs, rngs=rngs)

    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, mutable: Any = ALL_BUT_INTERMEDIATES,
                         capture_intermediates: Any = False, **kwargs: Any) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """The result of a method, and the variables that it made. Arguments as in `apply`."""
        call = init_with_output(_method_of(self, method), self, mutable, capture_intermediates)
        return call(rngs, *args, **kwargs)

    def init(self, rngs: Any, *args: Any, method: Any = None, mutable: Any = ALL_BUT_INTERMEDIATES,
             capture_intermediates: Any = False, **kwargs: Any) -> dict[str, Any]:  # fmt: skip
        """The variables that a method makes. Arguments as in `apply`."""
        return init(_method_of(self, method), self, mutable, capture_intermediates)(rngs, *args, **kwargs)

    def module_paths(self, rngs: Any, *args: Any, show_repeated: bool = False, mutable: Any = ALL_BUT_INTERMEDIATES,
                     **kwargs: Any) -> dict[str, Module]:  # fmt: skip
        """The modules that `init` calls, by their paths; one that is called by two names stands under the first.

        Args:
            show_repeated: it stands under both.
        """
        found: dict[str, Module] = {}

        def note(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
            module = context.module
            if show_repeated or all(module is not other for other in found.values()):
                found.setdefault("/".join(module.path), module)
            return call(*args, **kwargs)

        with intercept_methods(note):
            jax.eval_shape(lambda: self.init(rngs, *args, mutable=mutable, **kwargs))
        with in_module(None):
            return {path: module.clone(_reset_names=True) for path, module in found.items()}

    def tabulate(self, rngs: Any, *args: Any, depth: int | None = None, show_repeated: bool = False,
                 mutable: Any = ALL_BUT_INTERMEDIATES, console_kwargs: Mapping[str, Any] | None = None,
                 table_kwargs: Mapping[str, Any] = NO_OPTIONS, column_kwargs: Mapping[str, Any] = NO_OPTIONS,
                 compute_flops: bool = False, compute_vjp_flops: bool = False, **kwargs: Any) -> str:  # fmt: skip
        """A table of the calls that `init` makes and of the variables, as text. Arguments as in `nn.tabulate`."""
        table = tabulate(self, rngs, depth, show_repeated, mutable, console_kwargs, table_kwargs, column_kwargs,
                         compute_flops, compute_vjp_flops, **kwargs)  # fmt: skip
        return table(*args)

    def lazy_init(self, rngs: Any, *args: Any, method: Any = None, mutable: Any = ALL_BUT_INTERMEDIATES,
                  **kwargs: Any) -> dict[str, Any]:  # fmt: skip
        """As `init`, for arguments of which only shape and dtype are known (`jax.ShapeDtypeStruct`).

        Raises:
            LazyInitError: a variable depends on the values of such an argument.
        """
        return without_values(functools.partial(self.init, method=method, mutable=mutable))(rngs, *args, **kwargs)

    def bind(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, mutable: Any = False) -> Self:
        """The module with variables, for looking into it: its methods can be called as they are."""
        del args
        if not isinstance(self, Module):
            raise InvalidInstanceModuleError
        with in_module(None):
            return self.clone(parent=root_scope(variables, None if rngs is None else streams_of(rngs, self), mutable))

    def unbind(self) -> tuple[Self, Mapping[str, Mapping[str, Any]]]:
        """The module without variables, and its variables."""
        if self.scope is None:
            raise CallUnbindOnUnboundModuleError
        with in_module(None):
            return self.clone(_reset_names=True), self.variables


def _method_of(module: Any, method: Any) -> Callable[..., Any]:
    """A function of a module: from None, a name, a method, or a function.

    Raises:
        InvalidInstanceModuleError: `module` is none.
        ApplyModuleInvalidMethodError: `method` cannot be called on a module.
    """
    if not isinstance(module, Module):
        raise InvalidInstanceModuleError
    if "_state" not in vars(module):
        raise IncorrectPostInitOverrideError
    if method is None or isinstance(method, str):
        name = method or "__call__"
        own = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
        method = (
            own
            if inspect.isfunction(own)
            else module.__getattr__(name)
            if name == "__call__"
            else getattr(module, name)
        )
        if not callable(method):
            raise CallError(
                f"'{type(module).__name__}.{name}' must be a callable", got=type(method), fix="name a method"
            )
    method = getattr(method, "__func__", method)
    if not callable(method) or (inspect.isfunction(method) and not inspect.signature(method).parameters):
        raise ApplyModuleInvalidMethodError(method)
    return method


def _hash_unbound(hash_of_fields: Callable[[Any], int]) -> Callable[[Any], int]:
    def __hash__(self: Any) -> int:
        if self.scope is not None:
            raise TypeError("Can't call __hash__ on modules that hold variables.")
        return hash_of_fields(self)

    return __hash__


def _shown(value: Any) -> str:
    if isinstance(value, Module):
        return repr(value)
    return value.__name__ if hasattr(value, "__name__") else repr(value)


def share_scope(module: Module, other: Module, /) -> None:
    """Lets two modules keep their variables in one scope: that of the one which stands higher in the model.

    Raises:
        CallShareScopeOnUnboundModuleError: `module` is unbound.
    """
    if module.scope is None:
        raise CallShareScopeOnUnboundModuleError
    above = other.scope is not None and module.scope.path[: len(other.scope.path)] == other.scope.path
    moved, target = (module, other.scope) if above else (other, module.scope)
    old = moved.scope
    if old is not None and target.children.get(old.name) is old:  # type: ignore[union-attr]
        del target.children[old.name]  # type: ignore[union-attr]
        target.reserved.pop(old.name, None)  # type: ignore[union-attr]
    _move(moved, target)  # type: ignore[arg-type]


def _move(module: Module, scope: Scope) -> None:
    """Puts a module, and the parts that it has, into another scope."""
    object.__setattr__(module, "scope", scope)
    for name, child in module._state.children.items():
        _move(child, scope.push(name))
