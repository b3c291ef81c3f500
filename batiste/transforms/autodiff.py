# SPDX-License-Identifier: Apache-2.0
"""Derivatives of functions of live objects: grad, value_and_grad, vjp, jvp.

Updates that the function makes to Variables come back as well, outside of what is differentiated.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from batiste.graph.boundary import Boundary, Crossing, Mode, Note, is_root
from batiste.graph.errors import AutodiffError
from batiste.graph.flatten import ANY
from batiste.graph.jaxcompat import is_ref
from batiste.graph.structure import show_path
from batiste.graph.variable import MISSING, Param

from .arguments import bound, by_position
from .compile import refuse_bound_method, refuse_rules
from .tangents import DIFF, REST, DiffState, Likeness, Output, specs_of, zero_tangent

__all__ = ["DiffState", "grad", "jvp", "value_and_grad", "vjp"]


def _enter(f: Callable, mode: Mode, args: tuple, specs: Sequence[Any]) -> tuple[Boundary, list[Any], list[Any]]:
    """`(boundary, differentiated values, the other values)` of a call."""
    boundary = Boundary(f, mode, ANY)
    diff, rest, _ = boundary.enter(args, specs=specs, labels=(DIFF, REST, ANY))
    return boundary, diff, rest


def _refuse_refs(crossing: Crossing, diff: Sequence[Any]) -> None:
    """A backward pass has no place for the gradient of something that is written while it runs.

    Raises:
        AutodiffError: a `jax.Ref` is to be differentiated.
    """
    for n, x in zip(crossing.order[0], diff):
        if is_ref(x):
            raise AutodiffError(
                f"nnx.{crossing.mode.name} cannot differentiate a Variable with ref=True",
                at=show_path(crossing.paths[n]),
                fix="choose the other Variables with nnx.DiffState, or pass this one in an argument of its own",
            )


def _call(
    crossing: Crossing, diff: Sequence[Any], rest: Sequence[Any], has_aux: bool
) -> tuple[Any, tuple[list[Any], ...], Note]:
    """`(result, what comes back by label, note)` of the function at these values."""
    before = crossing.ungroup((diff, rest))
    args, opened = crossing.open(before)
    out = crossing.f(*args)
    out = _pair(out, crossing.mode.name) if has_aux else out
    groups = crossing.close(before, opened, out)
    assert crossing.note is not None
    return out, groups, crossing.note


def _pair(out: Any, name: str) -> tuple[Any, Any]:
    """What a function with auxiliary data returned."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        got = f"{len(out)} values" if isinstance(out, (tuple, list)) else type(out).__name__
        raise AutodiffError(
            f"nnx.{name} with has_aux=True cannot unpack the result", got=got, expected="a pair (value, auxiliary data)"
        )
    return tuple(out)


# ---------------------------------------------------------------- grad
def _chosen(argnums: Any, args: tuple, mode: Mode) -> dict[int, Any]:
    """How each differentiated argument is labelled, by number.

    Raises:
        AutodiffError: an argument is named twice, or is not there.
    """
    chosen: dict[int, Any] = {}
    for entry in argnums if isinstance(argnums, (tuple, list)) else (argnums,):
        number = entry.argnum if isinstance(entry, DiffState) else operator.index(entry)
        n = number + len(args) if number < 0 else number
        if not 0 <= n < len(args):
            raise AutodiffError(
                f"differentiating with respect to argnums={number} requires at least {max(number + 1, -number)} "
                f"positional arguments to be passed by the caller, but got only {len(args)} positional arguments"
            )
        if n in chosen:
            raise AutodiffError(
                f"argnum {number} is repeated in argnums", fix="give one DiffState with both filters: (f1, f2)"
            )
        chosen[n] = entry if isinstance(entry, DiffState) else DiffState(n, Param) if mode.live else DIFF
    if not chosen:
        raise AutodiffError("argnums is empty", expected="the number of at least one argument")
    return chosen


def _differentiate(
    f: Callable, name: str, argnums: Any, has_aux: bool, graph: Any, graph_updates: Any, **options: Any
) -> Callable:
    """`(f(...), gradients)` as a function of the arguments of `f`."""
    mode = Mode.of(name, graph, graph_updates)
    refuse_bound_method(f, name)
    refuse_rules(mode, argnums=argnums)
    single = not isinstance(argnums, (tuple, list))

    def both(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = bound(f, args, kwargs)
        chosen = _chosen(argnums, args, mode)
        call, xs = by_position(f, args, kwargs)
        boundary, diff, rest = _enter(call, mode, xs, specs_of(xs, chosen))
        crossing = boundary.crossing
        _refuse_refs(crossing, diff)

        @functools.wraps(f)
        def loss(diff: list[Any]) -> Any:
            out, groups, note = _call(crossing, diff, rest, has_aux)
            value = out[0] if has_aux else out
            if is_root(value):
                raise AutodiffError(
                    "Gradient only defined for scalar-output functions",
                    got=f"a {type(value).__name__}",
                    fix="return the value of the Variable: v[...]",
                )
            return value, (groups, note)

        (_, (groups, note)), gradients = jax.value_and_grad(loss, has_aux=True, **options)(diff)
        shown = Likeness(crossing.walked, mode).show(_spread(crossing, gradients))
        found = tuple(shown[n] for n in chosen)
        return boundary.leave(groups, note), found[0] if single else found

    return both


def value_and_grad(
    f: Any = MISSING,
    *,
    argnums: int | DiffState | Sequence[int | DiffState] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`(f(x), df/dx)`: like `grad`, with the value."""
    options = dict(holomorphic=holomorphic, allow_int=allow_int, reduce_axes=reduce_axes)
    if f is MISSING:
        return functools.partial(
            value_and_grad, argnums=argnums, has_aux=has_aux, graph=graph, graph_updates=graph_updates, **options
        )
    both = _differentiate(f, "value_and_grad", argnums, has_aux, graph, graph_updates, **options)
    return functools.wraps(f)(both)


def grad(
    f: Any = MISSING,
    *,
    argnums: int | DiffState | Sequence[int | DiffState] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """df/dx of a function that returns a scalar (with `has_aux`: a scalar and something else).

    The gradient of a module is a State of its Params, or of what `DiffState(argnum, filter)` chooses; with
    `graph=False` or `graph_updates=False` it is a module of the same type. Updates of Variables are kept.

    Args:
        argnums: which arguments `x` stands for; several give a tuple.
        holomorphic, allow_int: as for `jax.grad`.

    Raises:
        AliasError: one Variable is both differentiated and not.
        AutodiffError: `argnums` names an argument twice, or one that is not there.

    >>> from batiste.graph import Module, Param
    >>> class Square(Module):
    ...     def __init__(self):
    ...         self.x = Param(jax.numpy.array(3.0))
    >>> float(grad(lambda m: m.x**2)(Square()).x[...])
    6.0
    """
    options = dict(holomorphic=holomorphic, allow_int=allow_int, reduce_axes=reduce_axes)
    if f is MISSING:
        return functools.partial(
            grad, argnums=argnums, has_aux=has_aux, graph=graph, graph_updates=graph_updates, **options
        )
    both = _differentiate(f, "grad", argnums, has_aux, graph, graph_updates, **options)

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, found = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


# ---------------------------------------------------------------- vjp
def vjp(
    f: Any = MISSING,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`(f(x), g)` where g maps a cotangent of f(x) to a tuple of cotangents of x.

    Called without `primals` it returns the function of them. What belongs to a module looks as `grad` shows it. With
    `has_aux`, `f` returns a pair, and its second half comes third.

    >>> out, pullback = vjp(lambda x: x**2, 3.0)
    >>> float(pullback(1.0)[0])
    6.0
    """
    options = dict(has_aux=has_aux, reduce_axes=reduce_axes, graph=graph, graph_updates=graph_updates)
    if f is MISSING:
        return functools.partial(vjp, **options)
    if not primals:
        return functools.wraps(f)(functools.partial(vjp, f, **options))
    mode = Mode.of("vjp", graph, graph_updates)
    refuse_bound_method(f, "vjp")
    chosen = {n: DiffState(n, Param) if mode.live else DIFF for n in range(len(primals))}
    boundary, diff, rest = _enter(f, mode, primals, specs_of(primals, chosen))
    crossing = boundary.crossing
    _refuse_refs(crossing, diff)
    values = functools.wraps(f)(functools.partial(_outputs, crossing, rest, has_aux))
    out, pullback, (others, note) = jax.vjp(values, diff, has_aux=True, reduce_axes=reduce_axes)
    output = Output.of(note, mode, has_aux)

    def cotangents(cotangent: Any) -> tuple[Any, ...]:
        given = output.read(cotangent, "the argument to a VJP function")
        (found,) = pullback([zero_tangent(x) if ct is None else ct for x, ct in zip(out, given)])
        return Likeness(crossing.walked, mode).show(_spread(crossing, found))

    result = boundary.leave(_with_outputs(others, out), note)
    return (result[0], cotangents, result[1]) if has_aux else (result, cotangents)


def _outputs(crossing: Crossing, rest: Sequence[Any], has_aux: bool, diff: list[Any]) -> tuple[list[Any], Any]:
    """The flat result of the function; beside it the auxiliary data, the updates and the note."""
    _, (changed, others, out), note = _call(crossing, diff, rest, has_aux)
    count = sum(Output.of(note, crossing.mode, has_aux).sent)
    return out[:count], ((changed, others, out[count:]), note)


def _with_outputs(groups: tuple[list[Any], ...], out: list[Any]) -> tuple[list[Any], ...]:
    """All that comes back, by label."""
    changed, others, aux = groups
    return changed, others, [*out, *aux]


def _spread(crossing: Crossing, diff: Sequence[Any]) -> list[Any]:
    """One value per entry leaf; None for those that are not differentiated."""
    values: list[Any] = [None] * len(crossing.numbers)
    for n, x in zip(crossing.order[0], diff):
        values[n] = x
    return values


# ---------------------------------------------------------------- jvp
def jvp(
    f: Any = MISSING,
    primals: Any = MISSING,
    tangents: Any = MISSING,
    *,
    has_aux: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`(f(x), df/dx . t)`.

    Called without `primals` it returns the function of them. The tangent of a module is a module of the same type or a
    State; what it leaves out is zero. With `has_aux`, `f` returns a pair, and its second half comes third.

    >>> value, tangent = jvp(lambda x: x**2, (3.0,), (1.0,))
    >>> float(tangent)
    6.0
    """
    options = dict(has_aux=has_aux, graph=graph, graph_updates=graph_updates)
    if f is MISSING:
        return functools.partial(jvp, **options)
    if primals is MISSING or tangents is MISSING:
        return functools.wraps(f)(functools.partial(jvp, f, **options))
    mode = Mode.of("jvp", graph, graph_updates)
    refuse_bound_method(f, "jvp")
    if not isinstance(primals, (tuple, list)) or type(primals) is not type(tangents) or len(primals) != len(tangents):
        raise AutodiffError(
            "primal and tangent arguments to nnx.jvp must be tuples or lists with the same tree structure",
            got=f"{_kind(primals)} and {_kind(tangents)}",
        )
    boundary, diff, rest = _enter(f, mode, tuple(primals), [DIFF] * len(jax.tree.leaves(primals, is_leaf=is_root)))
    crossing = boundary.crossing
    given = Likeness(crossing.walked, mode).read(tuple(tangents), "the tangent argument to nnx.jvp")
    given = [zero_tangent(x) if given[n] is None else given[n] for n, x in zip(crossing.order[0], diff)]
    values = functools.wraps(f)(functools.partial(_outputs, crossing, rest, has_aux))
    out, out_tangents, (others, note) = jax.jvp(values, (diff,), (given,), has_aux=True)
    result = boundary.leave(_with_outputs(others, out), note)
    tangent = Output.of(note, mode, has_aux).show(out_tangents)
    return (result[0], tangent, result[1]) if has_aux else (result, tangent)


def _kind(x: Any) -> str:
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else type(x).__name__
