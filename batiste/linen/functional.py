# SPDX-License-Identifier: Apache-2.0
"""Functions of a scope as functions of variables: apply, init, lazy_init and bind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from batiste.errors import InvalidRngError

from .abstract import without_values
from .keys import LazyRng, is_key
from .scope import Scope, root_scope


class _KeyError(InvalidRngError, ValueError):
    """What should be a key, or keys by the name of their stream, is none."""


def _streams(rngs: Any, what: str) -> dict[str, Any]:
    keys = {"params": rngs} if isinstance(rngs, LazyRng) or not isinstance(rngs, Mapping) else dict(rngs)
    if not all(map(is_key, keys.values())):
        raise _KeyError(f"{what} function should be a ``jax.PRNGKey`` or a dictionary mapping strings to "
                        f"``jax.PRNGKey``, but is: {rngs!r}")  # fmt: skip
    return keys


def bind(
    variables: Any, rngs: Mapping[str, Any] | None = None, mutable: Any = False, flags: Mapping[str, Any] | None = None
) -> Scope:
    """A scope around variables. Use it with `with bind(...).temporary() as scope`, which ends the call.

    >>> bind({"params": {"w": 2.0}}).get_variable("params", "w")
    2.0
    """
    return root_scope(variables, rngs, mutable, flags)


def apply(fn: Callable[..., Any], mutable: Any = False, flags: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """`f(variables, *args, rngs=None)`, which runs `fn(scope, *args)` with them.

    Args:
        mutable: the collections that may be written; if there are any, they are returned beside the result.
        flags: settings of the call, for `scope.get_flag`.
    """

    @functools.wraps(fn)
    def call(variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        keys = {} if rngs is None else _streams(rngs, "The ``rngs`` argument passed to an apply")
        with bind(variables, keys, mutable, flags).temporary() as scope:
            y = fn(scope, *args, **kwargs)
            return y if mutable is False else (y, scope.mutable_variables())

    return call


def init(fn: Callable[..., Any], mutable: Any = True, flags: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """`f(rngs, *args)`, which returns the result of `fn(scope, *args)` and the variables that it made.

    Args:
        mutable: the collections that may be made.
        flags: settings of the call, for `scope.get_flag`; `initializing` is set.
    """
    run = apply(fn, mutable, {**(flags or {}), "initializing": True})

    @functools.wraps(fn)
    def call(rngs: Any, *args: Any, **kwargs: Any) -> Any:
        return run({}, *args, rngs=_streams(rngs, "First argument passed to an init"), **kwargs)

    return call


def lazy_init(
    fn: Callable[..., Any], mutable: Any = True, flags: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`f(rngs, *args)`, which returns the variables that `fn(scope, *args)` makes; shapes may stand for arrays.

    Raises:
        LazyInitError: they depend on more than shapes.
    """
    run = init(fn, mutable, flags)
    return without_values(lambda rngs, *args, **kwargs: run(rngs, *args, **kwargs)[1])
