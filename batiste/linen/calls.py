# SPDX-License-Identifier: Apache-2.0
"""Functions of a module as functions of its variables: a call binds a copy of the module to a scope of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from batiste.core.frozen_dict import freeze
from batiste.errors import InvalidRngError
from batiste.graph.config import config
from batiste.graph.errors import ArgumentError

from .context import in_module
from .scope import DenyList, in_filter, is_key, root_scope

if TYPE_CHECKING:
    from .module import Module

ALL_BUT_INTERMEDIATES = DenyList("intermediates")


def streams_of(rngs: Any, module: Module, kind: str = "The ``rngs`` argument passed to an apply") -> Mapping[str, Any]:
    """Keys by name; a single key is that of `params`.

    Raises:
        InvalidRngError: not a key, nor a mapping.
        ArgumentError: a mapping of something else.
    """
    if is_key(rngs):
        return {"params": rngs}
    values = list(rngs.values()) if isinstance(rngs, Mapping) else [None]
    if all(map(is_key, values)):
        return rngs
    if not isinstance(rngs, Mapping) or any(isinstance(x, jax.Array) for x in values):
        name = type(module).__name__
        raise InvalidRngError(f"RNGs should be of shape (2,) or PRNGKey in Module {name}, but rngs are: {rngs}")
    problem = f"{kind} function should be a ``jax.PRNGKey`` or a dictionary mapping strings to ``jax.PRNGKey``"
    got = ", ".join(f"{name}: {type(key).__name__}" for name, key in rngs.items())
    raise ArgumentError(problem, got=got, fix='pass {"params": jax.random.key(0)}')


def given_out(variables: dict[str, Any]) -> Any:
    """Variables as they are handed to the user: frozen, where the flag `flax_return_frozendict` says so."""
    return freeze(variables) if config.flax_return_frozendict else variables


def _every_call(module: Module, name: str) -> bool:
    return name == "__call__"


def apply(
    fn: Callable[..., Any], module: Module, mutable: Any = False, capture_intermediates: Any = False
) -> Callable[..., Any]:
    """`f(variables, *args, rngs=None)`, which runs `fn(module, *args)` with them. Arguments as in `Module.apply`."""

    @functools.wraps(fn)
    def call(variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        return _run(
            fn,
            module,
            variables,
            {} if rngs is None else streams_of(rngs, module),
            mutable,
            capture_intermediates,
            {},
            args,
            kwargs,
        )

    return call


def init_with_output(fn: Callable[..., Any], module: Module, mutable: Any = ALL_BUT_INTERMEDIATES,
                     capture_intermediates: Any = False) -> Callable[..., Any]:  # fmt: skip
    """`f(rngs, *args)`, which returns `fn(module, *args)` and the variables that it made."""

    @functools.wraps(fn)
    def call(rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        streams = streams_of(rngs, module, "First argument passed to an init")
        return _run(fn, module, {}, streams, mutable, capture_intermediates, {"initializing": True}, args, kwargs)

    return call


def init(fn: Callable[..., Any], module: Module, mutable: Any = ALL_BUT_INTERMEDIATES,
         capture_intermediates: Any = False) -> Callable[..., Any]:  # fmt: skip
    """`f(rngs, *args)`, which returns the variables that `fn(module, *args)` makes."""
    with_output = init_with_output(fn, module, mutable, capture_intermediates)

    @functools.wraps(fn)
    def call(rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return with_output(rngs, *args, **kwargs)[1]

    return call


def _run(fn: Callable[..., Any], module: Module, variables: Mapping[str, Any], rngs: Mapping[str, Any] | None,
         mutable: Any, capture: Any, flags: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:  # fmt: skip
    if capture:
        flags["capture"] = _every_call if capture is True else capture
        if not in_filter(mutable, "intermediates"):
            mutable = ["intermediates"] if mutable is False else _with_intermediates(mutable)
    scope = root_scope(variables, rngs, mutable, flags)
    try:
        with in_module(None):
            y = fn(module.clone(parent=scope), *args, **kwargs)
    finally:
        scope.invalidate()
    return y if mutable is False else (y, given_out(scope.mutable_variables()))


def _with_intermediates(mutable: Any) -> Any:
    if isinstance(mutable, str):
        return [mutable, "intermediates"]
    if isinstance(mutable, DenyList):
        deny = mutable.deny
        if isinstance(deny, bool):
            return ["intermediates"] if deny else True
        return DenyList([col for col in ([deny] if isinstance(deny, str) else deny) if col != "intermediates"])
    return [*mutable, "intermediates"]


def merge_param(name: str, a: Any, b: Any) -> Any:
    """The one of `a` (of the constructor) and `b` (of the call) that is not None.

    Raises:
        ArgumentError: both are given, or neither.
    """
    if a is None and b is None:
        raise ArgumentError(f'Parameter "{name}" must be passed to the constructor or at call time',
                            fix=f"pass {name}= to one of them")  # fmt: skip
    if a is not None and b is not None:
        raise ArgumentError(f'Parameter "{name}" was passed to the constructor and at call time. Should be passed just '
                            'once',
                            fix=f"take {name}= out of one of them")  # fmt: skip
    return b if a is None else a
