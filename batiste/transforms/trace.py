# SPDX-License-Identifier: Apache-2.0
"""Tracing functions of live objects without running them: shapes, jaxprs, and runtime checks turned into values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import checkify as jax_checkify

from batiste.graph.boundary import Boundary, Crossing, Mode
from batiste.graph.errors import ArgumentError
from batiste.graph.flatten import ANY, flatten_graph
from batiste.graph.variable import MISSING, Variable
from batiste.sharding import sharded_struct

from .arguments import by_position, refuse_sharing, static_places
from .compile import refuse_bound_method


def _run(f: Callable, crossing: Crossing) -> Callable:
    """The function of flat values, which hands its note out; JAX's messages call it `f`."""

    @functools.wraps(f)
    def run(*groups):
        return crossing.run(groups), crossing.note

    return run


def eval_shape(
    f: Callable, *args: Any, graph: bool | None = None, graph_updates: bool | None = None, **kwargs: Any
) -> Any:
    """f(x) with a `ShapeDtypeStruct` for every array, computed without arithmetic; `args` stay as they are.

    With a mesh in context the structs carry the shardings that the Variables' metadata ask for.
    """
    mode = Mode.of("eval_shape", graph, graph_updates)
    refuse_bound_method(f, "eval_shape")
    call, xs = by_position(f, args, kwargs)
    refuse_sharing(xs, mode)
    boundary = Boundary(call, mode, keep=lambda label: True)
    entry = boundary.enter(xs)
    out = boundary.leave_aside(*jax.eval_shape(_run(f, boundary.crossing), *entry))
    for x in flatten_graph(out).leaves:
        if isinstance(x, Variable) and not (x.get_metadata().get("mesh") or jax.sharding.get_abstract_mesh()).empty:
            x.set_raw_value(sharded_struct(x).get_raw_value())
    return out


# ---------------------------------------------------------------- make_jaxpr
def make_jaxpr(
    f: Any = MISSING,
    *,
    graph: bool | None = None,
    graph_updates: bool | None = None,
    static_argnums: int | Sequence[int] = (),
) -> Any:
    """The function that gives the jaxpr of `f` for its arguments: from the arrays in them to the arrays in the result.

    Raises:
        ArgumentError: with `graph_updates=True`, which is the default.
    """
    if f is MISSING:
        return functools.partial(make_jaxpr, graph=graph, graph_updates=graph_updates, static_argnums=static_argnums)
    mode = Mode.of("make_jaxpr", graph, graph_updates)
    if mode.live:
        raise ArgumentError(
            "nnx.make_jaxpr does not support graph_updates=True: a jaxpr has no place for changes of structure",
            fix="pass graph_updates=False or graph=False",
        )
    refuse_bound_method(f, "make_jaxpr")
    static = static_places(f, static_argnums)

    @functools.wraps(f)
    def jaxpr_of(*args: Any, **kwargs: Any) -> Any:
        call, xs = by_position(f, args, kwargs, static(args, kwargs))
        refuse_sharing(xs, mode)
        boundary = Boundary(call, mode, ANY)
        boundary.enter(xs, labels=(None, ANY))
        crossing = boundary.crossing

        @functools.wraps(f)
        def run(values):
            inside, opened = crossing.open(values)
            return crossing.close(values, opened, call(*inside))[1]

        return jax.make_jaxpr(run)(boundary.flat.values())

    return jaxpr_of


# ---------------------------------------------------------------- checkify
def checkify(
    f: Callable,
    errors: frozenset = jax_checkify.user_checks,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable:
    """`(error, f(x))`: runtime checks inside `f` become a value, to be thrown with `error.throw()`.

    Args:
        errors: the checks that are switched on, from `jax.experimental.checkify`.
    """
    mode = Mode.of("checkify", graph, graph_updates)
    refuse_bound_method(f, "checkify")

    @functools.wraps(f)
    def checked(*args: Any, **kwargs: Any) -> tuple[jax_checkify.Error, Any]:
        call, xs = by_position(f, args, kwargs)
        boundary = Boundary(call, mode)
        groups = boundary.enter(xs)
        error, (groups, note) = jax_checkify.checkify(_run(f, boundary.crossing), errors=errors)(*groups)
        return error, boundary.leave(groups, note)

    return checked
