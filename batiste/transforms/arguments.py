# SPDX-License-Identifier: Apache-2.0
"""The arguments of a call, as transforms want them: all by position, static ones filled in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from batiste.graph.boundary import Mode
from batiste.graph.flatten import flatten_graph

from .compile import Arguments


def static_places(f: Callable, argnums: int | Iterable[int]) -> Callable[[tuple, dict[str, Any]], frozenset[int]]:
    """Tells of a call which of `(*args, *kwargs.values())` are static."""
    if argnums == ():
        return lambda args, kwargs: frozenset()
    arguments = Arguments(f, argnums, None, None, None)
    return lambda args, kwargs: (
        arguments.static_numbers.intersection(range(len(args)))
        | {len(args) + i for i, name in enumerate(kwargs) if name in arguments.static_names}
    )


def by_position(f: Callable, args: tuple, kwargs: dict[str, Any], static: Iterable[int] = ()) -> tuple[Callable, tuple]:
    """`(g, xs)` with `g(*xs) == f(*args, **kwargs)`: keyword arguments come behind, those at `static` are filled in."""
    if not kwargs and not static:
        return f, args
    whole, count = (*args, *kwargs.values()), len(args)
    moving = [i for i in range(len(whole)) if i not in set(static)]

    def call(*xs):
        values = list(whole)
        for i, x in zip(moving, xs):
            values[i] = x
        return f(*values[:count], **dict(zip(kwargs, values[count:])))

    return call, tuple(whole[i] for i in moving)


def bound(f: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same call with as many arguments by position as can be."""
    if not kwargs:
        return args, kwargs
    try:
        arguments = inspect.signature(f).bind(*args, **kwargs)
    except ValueError:  # a builtin has no signature
        return args, kwargs
    return arguments.args, arguments.kwargs


def refuse_sharing(xs: tuple, mode: Mode) -> None:
    """Where the structure of the arguments is that of something outside, each object stands at one place.

    Raises:
        AliasError: one stands at two, and the objects are not live.
    """
    if not mode.live:
        flatten_graph(xs, graph=False, what=mode.name)
