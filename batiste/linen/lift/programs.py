# SPDX-License-Identifier: Apache-2.0
"""jit and remat of functions of scopes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .call import LiftedCall


def jit(
    fn: Callable[..., Any],
    variables: Any = True,
    rngs: Any = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
) -> Callable[..., Any]:
    """fn(scopes, *args), compiled. Scopes with variables of the same names and types share a program.

    Inside, the keys are new ones, which the path of each scope has gone into: the program does not depend on it.

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
        static_argnums, donate_argnums: as for `jax.jit`; the scopes are number 0.
    """
    static = tuple(n for n in _as_tuple(static_argnums) if n > 0)
    donated = _as_tuple(donate_argnums)
    options: dict[str, Any] = dict(static_argnums=static, static_argnames=static_argnames, donate_argnums=donated)
    options |= {name: x for name, x in (("device", device), ("backend", backend)) if x is not None}
    programs: dict[Any, Callable[..., Any]] = {}

    def inner(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        keep = (lambda label: True) if 0 in donated else None  # what is given away comes back
        call = LiftedCall("jit", fn, scopes, into=variables, out=variables, rngs=rngs, keep=keep, folded=True)
        groups = call.enter()
        key = call.structure, call.crossing.key()
        if key not in programs:
            programs[key] = jax.jit(_program(call.without_objects()), **options)
        out, groups, note = programs[key](groups, *args, **kwargs)
        call.leave(groups, note)
        return out

    return inner


def _program(call: LiftedCall) -> Callable[..., Any]:
    @functools.wraps(call.fn, updated=())
    def run(groups: Any, *args: Any, **kwargs: Any) -> Any:
        out, groups = call.run(groups, *args, **kwargs)
        return out, groups, call.note

    del run.__wrapped__  # its signature is not that of `fn`
    return run


def _as_tuple(numbers: int | Iterable[int]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else tuple(numbers)


def remat(
    fn: Callable[..., Any],
    variables: Any = True,
    rngs: Any = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """fn(scopes, *args), whose intermediate values are computed again in the backward pass instead of being kept.

    Args:
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
        concrete: accepted and ignored.
        static_argnums: which of `args` are no arrays.
        policy: what is kept all the same: one of `jax.checkpoint_policies`.
    """
    static = tuple(n + 1 for n in _as_tuple(static_argnums))

    def inner(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        call = LiftedCall("remat", fn, scopes, into=variables, out=variables, rngs=rngs)
        run = jax.checkpoint(call.run, prevent_cse=prevent_cse, static_argnums=static, policy=policy)
        out, groups = run(call.enter(), *args, **kwargs)
        call.leave(groups)
        return out

    return inner


checkpoint = remat
