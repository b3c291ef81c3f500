# SPDX-License-Identifier: Apache-2.0
"""Methods of the functional face's modules: the marks on them, and what runs around each call."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from batiste.errors import (
    ApplyModuleInvalidMethodError,
    CallCompactUnboundModuleError,
    CallSetupUnboundModuleError,
    IncorrectPostInitOverrideError,
    InvalidInstanceModuleError,
)
from batiste.graph.errors import CallError

from .context import InterceptorContext, in_module, intercepted, running
from .parts import Part

if TYPE_CHECKING:
    from .module import Module

F = TypeVar("F", bound=Callable[..., Any])


# ---------------------------------------------------------------- marks
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


# ---------------------------------------------------------------- around a call
def wrapped(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The method `fun` with all that has to happen around a call of it."""

    @functools.wraps(fun)
    def method(self, *args, **kwargs):
        return self._call_wrapped_method(fun, args, kwargs)

    method.wrapped = True  # type: ignore[attr-defined]
    return method


def is_to_be_wrapped(name: str, value: Any) -> bool:
    """Whether the attribute of a class is a method that `wrapped` is for."""
    if not inspect.isfunction(value) or hasattr(value, "wrapped") or hasattr(value, "nowrap"):
        return False
    return name in ("__call__", "setup") or not (name.startswith("__") and name.endswith("__"))


def run_method(module: Module, fun: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs a method: after `setup`, as the parent of what is made, past all interceptors."""
    if "_state" not in vars(module):
        raise IncorrectPostInitOverrideError
    name = fun.__name__
    is_compact = hasattr(fun, "compact")
    if module.scope is None and (is_compact or name == "setup"):
        raise CallCompactUnboundModuleError if is_compact else CallSetupUnboundModuleError
    module._try_setup()
    with in_module(module), _compactly(module, fun) if is_compact else contextlib.nullcontext(), _named(module, name):
        if running.interceptors:
            bound = functools.partial(fun, module)
            y = intercepted(fun, InterceptorContext(module, name, bound))(*args, **kwargs)
        else:
            y = fun(module, *args, **kwargs)
        if module.scope is not None and (wanted := module.scope.get_flag("capture")) and wanted(module, name):
            module.sow("intermediates", name, y)
    return y


@contextlib.contextmanager
def _compactly(module: Part, fun: Callable[..., Any]) -> Iterator[None]:
    """While a compact method runs: names are counted from the start, and those of its last run are free."""
    state, scope = module._state, module.scope
    own_scope = hasattr(fun, "compact_name_scope")
    if own_scope:
        object.__setattr__(module, "scope", scope.push(fun.__name__, reuse=True).rewound())  # type: ignore[union-attr]
    outermost = own_scope or not state.compact_depth
    made = state.names_made
    if outermost:
        state.names_made = {}
        if not own_scope:
            for name in state.names_taken:
                module.scope.reserved.pop(name, None)  # type: ignore[union-attr]
    before = set(module.scope.reserved)  # type: ignore[union-attr]
    state.compact_depth += 1
    try:
        yield
    finally:
        state.compact_depth -= 1
        if outermost:
            state.names_made = made
            if not own_scope:
                state.names_taken = set(module.scope.reserved) - before  # type: ignore[union-attr]
        object.__setattr__(module, "scope", scope if own_scope else module.scope)


def _named(module: Part, method: str) -> contextlib.AbstractContextManager[Any]:
    if not running.named:
        return contextlib.nullcontext()
    name = module.name or type(module).__name__
    return jax.named_scope(name if method == "__call__" else f"{name}.{method}")


# ---------------------------------------------------------------- choosing a method
def function_of(module: Any, method: Any) -> Callable[..., Any]:
    """A function of a module: from None, the name of a method or of a submodule, a method, or a function.

    Raises:
        InvalidInstanceModuleError: `module` is none.
        ApplyModuleInvalidMethodError: `method` cannot be called on a module.
    """
    if not isinstance(module, Part):
        raise InvalidInstanceModuleError
    if "_state" not in vars(module):
        raise IncorrectPostInitOverrideError
    if method is None or isinstance(method, str):
        method = _found(module, method or "__call__")
    method = getattr(method, "__func__", method)
    if not callable(method) or (inspect.isfunction(method) and not inspect.signature(method).parameters):
        raise ApplyModuleInvalidMethodError(method)
    return method


def _found(module: Part, name: str) -> Callable[..., Any]:
    own = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
    if inspect.isfunction(own):
        return own
    found = getattr(module, name) if name != "__call__" else module.__getattr__(name)  # type: ignore[attr-defined]
    if isinstance(found, Part):

        def call_part(module: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, name)(*args, **kwargs)

        return call_part
    if not callable(found):
        problem = f"'{type(module).__name__}.{name}' must be a callable"
        raise CallError(problem, got=type(found), fix="name a method")
    return found
