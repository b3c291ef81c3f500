# SPDX-License-Identifier: Apache-2.0
"""Modules of the functional face: settings in a dataclass, whose variables live in a `Scope` during a call.

A module is unbound (settings only) or bound to a scope. `init` and `apply` bind a copy to a fresh scope, run a method,
and hand out the variables. Submodules come from fields, from `setup`, or from the body of a `@compact` method; each is
*attached* to its parent under a name, which gives it the scope of that name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, dataclass_transform

import jax

from batiste.errors import (
    CallUnbindOnUnboundModuleError,
    DescriptorAttributeError,
    InvalidInstanceModuleError,
    ReservedModuleAttributeError,
    SetAttributeFrozenModuleError,
    SetAttributeInModuleSetupError,
)
from batiste.traceback_util import api_boundary

from .abstract import without_values
from .bound import Bound
from .calls import ALL_BUT_INTERMEDIATES, apply, init, init_with_output, merge_param, streams_of
from .context import (
    InterceptorContext,
    disable_named_call,
    enable_named_call,
    in_module,
    intercept_methods,
    override_named_call,
)
from .context import running as _context
from .methods import compact, compact_name_scope, function_of, is_to_be_wrapped, nowrap, run_method
from .methods import wrapped as _wrapped
from .parts import Part, share_scope, unspecified
from .parts import _State as _State
from .scope import root_scope
from .summary import NO_OPTIONS, tabulate

__all__ = [
    "InterceptorContext", "Module", "apply", "compact", "compact_name_scope", "disable_named_call", "enable_named_call",
    "init", "init_with_output", "intercept_methods", "merge_param", "nowrap", "override_named_call", "share_scope",
    "_context",
]  # fmt: skip


@dataclass_transform()
class Module(Bound):
    """Base of all modules of the functional face. Subclasses are dataclasses of settings.

    >>> import jax.numpy as jnp
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

    _compact_name_scope_methods: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        hints = inspect.get_annotations(cls)
        if reserved := {k: v for k, v in hints.items() if k in ("name", "parent")}:
            raise ReservedModuleAttributeError(reserved)
        cls.__annotations__ = {**hints, "parent": Any, "name": str | None}  # no text: it is looked up in a module
        cls.parent = dataclasses.field(default=unspecified, repr=False, kw_only=True)
        cls.name = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
        defined = set(vars(cls))
        dataclasses.dataclass(unsafe_hash="__hash__" not in defined, repr=False, kw_only=kw_only)(cls)
        del cls.parent  # type: ignore[misc]  # the default of the field would hide the property
        if "__hash__" not in defined:
            cls.__hash__ = _hash_unbound(cls.__hash__)  # type: ignore[method-assign]
        fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
        fields.update({name: fields.pop(name) for name in ("parent", "name")})  # they come last
        for name, value in list(vars(cls).items()):
            if is_to_be_wrapped(name, value) and name not in hints:
                setattr(cls, name, _wrapped(value))
        named = (name for name in dir(cls) if hasattr(inspect.getattr_static(cls, name), "compact_name_scope"))
        cls._compact_name_scope_methods = tuple(named)

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
        children = [f"{name} = {child!r}" for name, child in self._state.children.items()]
        text = ["# attributes", *lines] * bool(lines) + ["# children", *children] * bool(children)
        indented = "\n".join(text).replace("\n", "\n    ")
        return f"{type(self).__name__}(\n    {indented}\n)" if text else f"{type(self).__name__}()"

    # ------------------------------------------------------------ calling
    def setup(self) -> None:
        """Makes submodules and variables as attributes; runs by itself before the first use of a bound module."""

    def _try_setup(self) -> None:
        state = vars(self)["_state"]
        if self.scope is None or state.setup_called:
            return
        state.setup_called = state.in_setup = True
        try:
            if type(self).setup is not Module.setup:
                self.setup()
        finally:
            state.in_setup = False

    def _call_wrapped_method(self, fun: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a method, with all that has to happen around it."""
        return run_method(self, fun, args, kwargs)

    # ------------------------------------------------------------ from and to variables
    @api_boundary
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
        call = apply(function_of(self, method), self, mutable, capture_intermediates)
        return call(variables, *args, **kwargs, rngs=rngs)

    @api_boundary
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, mutable: Any = ALL_BUT_INTERMEDIATES,
                         capture_intermediates: Any = False, **kwargs: Any) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """The result of a method, and the variables that it made. Arguments as in `apply`."""
        call = init_with_output(function_of(self, method), self, mutable, capture_intermediates)
        return call(rngs, *args, **kwargs)

    @api_boundary
    def init(self, rngs: Any, *args: Any, method: Any = None, mutable: Any = ALL_BUT_INTERMEDIATES,
             capture_intermediates: Any = False, **kwargs: Any) -> dict[str, Any]:  # fmt: skip
        """The variables that a method makes. Arguments as in `apply`."""
        return init(function_of(self, method), self, mutable, capture_intermediates)(rngs, *args, **kwargs)

    @api_boundary
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

    @api_boundary
    def tabulate(self, rngs: Any, *args: Any, depth: int | None = None, show_repeated: bool = False,
                 mutable: Any = ALL_BUT_INTERMEDIATES, console_kwargs: Mapping[str, Any] | None = None,
                 table_kwargs: Mapping[str, Any] = NO_OPTIONS, column_kwargs: Mapping[str, Any] = NO_OPTIONS,
                 compute_flops: bool = False, compute_vjp_flops: bool = False, **kwargs: Any) -> str:  # fmt: skip
        """A table of the calls that `init` makes and of the variables, as text. Arguments as in `nn.tabulate`."""
        table = tabulate(self, rngs, depth, show_repeated, mutable, console_kwargs, table_kwargs, column_kwargs,
                         compute_flops, compute_vjp_flops, **kwargs)  # fmt: skip
        return table(*args)

    @api_boundary
    def lazy_init(self, rngs: Any, *args: Any, method: Any = None, mutable: Any = ALL_BUT_INTERMEDIATES,
                  **kwargs: Any) -> dict[str, Any]:  # fmt: skip
        """As `init`, for arguments of which only shape and dtype are known (`jax.ShapeDtypeStruct`).

        Raises:
            LazyInitError: a variable depends on the values of such an argument.
        """
        return without_values(functools.partial(self.init, method=method, mutable=mutable))(rngs, *args, **kwargs)

    @api_boundary
    def bind(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, mutable: Any = False) -> Self:
        """The module with variables, for looking into it: its methods can be called as they are."""
        del args
        if not isinstance(self, Module):
            raise InvalidInstanceModuleError
        with in_module(None):
            return self.clone(parent=root_scope(variables, None if rngs is None else streams_of(rngs, self), mutable))

    @api_boundary
    def unbind(self) -> tuple[Self, Mapping[str, Mapping[str, Any]]]:
        """The module without variables, and its variables."""
        if self.scope is None:
            raise CallUnbindOnUnboundModuleError
        with in_module(None):
            return self.clone(_reset_names=True), self.variables


def _hash_unbound(hash_of_fields: Callable[[Any], int]) -> Callable[[Any], int]:
    def __hash__(self: Any) -> int:
        if self.scope is not None:
            raise TypeError("Can't call __hash__ on modules that hold variables.")
        return hash_of_fields(self)

    return __hash__


def _shown(value: Any) -> str:
    if isinstance(value, Part):
        return repr(value)
    return value.__name__ if hasattr(value, "__name__") else repr(value)
