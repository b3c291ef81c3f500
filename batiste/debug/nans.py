# SPDX-License-Identifier: Apache-2.0
"""Finding the first operation that made a NaN or an infinity, by running a function again one operation at a time.

A function is traced into a jaxpr, whose equations are then computed one after another. What holds jaxprs of its own
(jit, scan, while, cond, remat) and is long is computed as a whole first, and only opened when that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from batiste.graph.jaxcompat import scan_inputs

from .calls import Around, Places, arguments, evaluate, flat_function, open_call, part_types

__all__ = ["NonFinite", "why_nan"]


@dataclass
class NonFinite:
    """Where a value went non-finite first, on the way to a non-finite result.

    Args:
        what: `nan` or `inf`.
        order: how many operations were looked at before.
        operation: the JAX operation; None where the value came in non-finite and nothing was done with it.
        module: the path and type of the part that it was done in, or None outside of parts.
        source: the user's own `file:line (function)`.
        inside: the library's `file:line (function)`, where the operation stands in one of its layers.
        argument: the path of the argument (a parameter, a batch) that came in non-finite, or whose values went into
            the operation.
        came_in: whether that argument was non-finite already.
        iterations: the loop iterations around it, outermost first.
        backward: whether the operation belongs to a gradient.
        count, size, index: how many entries of the result are non-finite, of how many; the first one of them.
    """

    what: str
    order: int
    operation: str | None = None
    module: str | None = None
    source: str | None = None
    inside: str | None = None
    argument: str | None = None
    came_in: bool = False
    iterations: tuple[str, ...] = ()
    backward: bool = False
    count: int = 0
    size: int = 0
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        made = f"{self.what} was in `{self.argument}` before the call" if self.came_in else f"{self.what} first appears"
        lines = [f"{made}: {self.count} of {self.size} entries, the first at {list(self.index)}"]
        facts = {
            "module": self.module,
            "operation": self.operation and self.operation + " (in the backward pass)" * self.backward,
            "parameter": None if self.came_in else self.argument,
            "iteration": ", ".join(self.iterations),
            "line": self.source,
            "inside": self.inside,
        }
        return "\n".join(lines + [f"  {name:<9} {fact}" for name, fact in facts.items() if fact])


def why_nan(fn: Callable, *args: Any, **kwargs: Any) -> NonFinite | None:
    """The first operation that made a NaN or an infinity which reached the result of `fn(*args)`, or what `fn` wrote.

    Runs `fn` again, one operation at a time, also inside jit, scan, while, cond, remat and vmap; `args` stay as they
    are. Values that come to nothing, such as the branch that a `where` does not take, are passed over. None means
    that all results are finite.

    Args:
        fn: a function, also of live objects, such as a training step; a module, or one of its methods.

    >>> from batiste import nnx
    >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    >>> found = why_nan(lambda model, x: jnp.log(model(x) * 0), model, jnp.ones((1, 2)))
    >>> found.what, found.operation
    ('inf', 'log')
    >>> why_nan(model, jnp.ones((1, 2))) is None
    True
    """
    boundary, groups = open_call(fn, args, kwargs, "why_nan")
    places = Places()
    with places.noted(part_types(fn, args, kwargs)):
        jaxpr = jax.make_jaxpr(flat_function(boundary))(*groups)
    search = Search(places)
    values = [search.came_in(x, path, n) for n, (path, x) in enumerate(arguments(fn, boundary, groups))]
    outputs = search.closed(jaxpr, values, TOP)
    return first([x.origin for x in outputs])


def first(found: Iterable[NonFinite | None]) -> NonFinite | None:
    return min((x for x in found if x is not None), key=lambda x: x.order, default=None)


# ---------------------------------------------------------------- values that know where they come from


@dataclass
class Watched:
    """A value; where it went non-finite, if it is; the argument that it is, perhaps cast or in another shape."""

    value: Any
    origin: NonFinite | None = None
    argument: str | None = None
    bad: str | None = None


def trouble(x: Any) -> str | None:
    """`nan`, `inf` or None."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    lib, x = (np, np.asarray(x)) if x.size < 1 << 20 else (jnp, x)  # a small value is looked at without a compilation
    if lib.isfinite(x).all():
        return None
    return "nan" if lib.isnan(x).any() else "inf"


def _spots(x: Any, what: str) -> dict[str, Any]:
    x = np.asarray(x)
    wrong = np.isnan(x) if what == "nan" else ~np.isfinite(x)
    return dict(count=int(wrong.sum()), size=wrong.size, index=tuple(int(i) for i in np.argwhere(wrong)[0]))


# ---------------------------------------------------------------- the search


LONG = 200  # equations; below, compiling them together takes longer than running them apart
TOP = Around()


def _length(jaxpr: Any) -> int:
    return len(jaxpr.eqns) + sum(_length(inner) for eqn in jaxpr.eqns for inner in jex.jaxprs_in_params(eqn.params))


@dataclass
class Search:
    """Computes jaxprs on watched values."""

    places: Places
    count: int = 0
    compiled: dict[int, tuple[Any, Callable]] = field(default_factory=dict)

    def came_in(self, x: Any, argument: str, n: int) -> Watched:
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        what = trouble(x)
        if what is None:
            return Watched(x, None, argument)
        found = NonFinite(what, n - 1_000_000, argument=argument, came_in=True, **_spots(x, what))
        return Watched(x, found, argument, what)

    def whole(self, jaxpr: Any, inputs: Sequence[Watched]) -> list[Any]:
        """The results of a closed jaxpr, computed at once."""
        key = id(getattr(jaxpr, "jaxpr", jaxpr))
        if key not in self.compiled:
            self.compiled[key] = (
                jaxpr,
                jax.jit(jex.jaxpr_as_fun(jaxpr)),
            )  # the jaxpr is kept, so that its id stays its own
        return self.compiled[key][1](*(x.value for x in inputs))

    def closed(self, jaxpr: Any, inputs: Sequence[Watched], around: Around) -> list[Watched]:
        """The results of a closed jaxpr: at once if it is long and they are finite, else one equation after another."""
        if around is not TOP and _length(jaxpr.jaxpr) > LONG:
            outputs = self.whole(jaxpr, inputs)
            if not any(map(trouble, outputs)):
                return [Watched(x) for x in outputs]
        env: dict[Any, Watched] = dict(zip(jaxpr.jaxpr.invars, inputs))
        env.update((v, Watched(x)) for v, x in zip(jaxpr.jaxpr.constvars, jaxpr.consts))
        read = lambda v: Watched(v.val) if isinstance(v, jex.Literal) else env[v]
        for eqn in jaxpr.jaxpr.eqns:
            env.update(zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars], around)))
        return [replace(x, bad=trouble(x.value)) for x in map(read, jaxpr.jaxpr.outvars)]

    def equation(self, eqn: Any, inputs: list[Watched], around: Around) -> list[Watched]:
        self.count += 1
        here = around.at(eqn, self.places)
        opened = OPENED.get(eqn.primitive.name)
        for x in inputs:  # the first part that reads a bad argument is the one to name
            if opened is None and x.origin is not None and x.origin.came_in and x.origin.operation is None:
                _fill(x.origin, eqn, here)
        if opened is not None:
            outputs = opened(self, eqn.params, inputs, here)
        else:
            outputs = [Watched(x) for x in evaluate(eqn, [x.value for x in inputs])]
        argument = inputs[0].argument if len(inputs) == 1 else None
        return [self.traced(x, eqn, inputs, here, argument) for x in outputs]

    def traced(self, x: Watched, eqn: Any, inputs: list[Watched], here: Around, argument: str | None) -> Watched:
        """The result of an equation, with its origin: that of what went in non-finite, else the equation."""
        x.bad, x.argument = trouble(x.value), argument
        if x.bad is None:
            x.origin = None
        elif x.origin is None:
            nans = [y.origin for y in inputs if y.bad == "nan"]
            x.origin = first(nans if x.bad == "nan" and any(nans) else [y.origin for y in inputs if y.bad])
        if x.bad is not None and x.origin is None:
            x.origin = NonFinite(x.bad, self.count, **_spots(x.value, x.bad))
            x.origin.argument = next((y.argument for y in reversed(inputs) if y.argument), None)
            _fill(x.origin, eqn, here)
        return x


def _fill(found: NonFinite, eqn: Any, here: Around) -> None:
    found.operation = eqn.primitive.name
    for name, value in asdict(here).items():
        setattr(found, name, value)


# ---------------------------------------------------------------- what holds jaxprs of its own


def _call(search: Search, params: dict[str, Any], inputs: list[Watched], here: Around) -> list[Watched]:
    jaxpr = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
    return search.closed(jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ()), inputs, here)


def _scan(search: Search, params: dict[str, Any], inputs: list[Watched], here: Around) -> list[Watched]:
    (n, carried), length = scan_inputs(params), params["length"]
    m = n + carried
    consts, carry, xs = inputs[:n], inputs[n:m], inputs[m:]
    rows: list[list[Watched]] = []
    for i in reversed(range(length)) if params["reverse"] else range(length):
        now = [_row(x, i) for x in xs]
        out = search.closed(params["jaxpr"], [*consts, *carry, *now], here.iteration(f"{i} of {length}"))
        carry, ys = out[: m - n], out[m - n :]
        rows.append(ys)
    rows = rows[::-1] if params["reverse"] else rows
    stacked = [Watched(jnp.stack([x.value for x in ys]), first([x.origin for x in ys])) for ys in zip(*rows)]
    return [*carry, *stacked]


def _row(x: Watched, i: int) -> Watched:
    bad = trouble(x.value[i])
    return Watched(x.value[i], x.origin if bad else None, x.argument, bad)


def _while(search: Search, params: dict[str, Any], inputs: list[Watched], here: Around) -> list[Watched]:
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry, i = inputs[m:], 0
    while (go := search.whole(params["cond_jaxpr"], [*inputs[:n], *carry])[0]).any():
        new = search.closed(params["body_jaxpr"], [*inputs[n:m], *carry], here.iteration(str(i)))
        carry, i = [_kept(go, x, y) for x, y in zip(new, carry)], i + 1
    return carry


def _kept(go: jax.Array, new: Watched, old: Watched) -> Watched:
    """What a `vmap` over a while loop leaves alone where the loop has ended."""
    if not go.ndim:
        return new
    value = jax.lax.select(jnp.broadcast_to(jnp.expand_dims(go, range(go.ndim, new.value.ndim)), new.value.shape),
                           new.value, old.value)  # fmt: skip
    return Watched(value, new.origin or old.origin, None, trouble(value))


def _cond(search: Search, params: dict[str, Any], inputs: list[Watched], here: Around) -> list[Watched]:
    index, *values = inputs
    chosen = min(max(int(index.value), 0), len(params["branches"]) - 1)
    return search.closed(params["branches"][chosen], values, here)


OPENED: dict[str, Callable[..., list[Watched]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "checkpoint": _call,
    "remat2": _call,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
