# SPDX-License-Identifier: Apache-2.0
"""Taps: names for values inside a model, by which `capture` hands them out and `patch` replaces them.

A tap is a JAX primitive of its own that computes nothing. `capture` and `patch` trace the function and go through its
jaxpr and those inside it (jit, scan, while, cond, remat), where they rewrite what holds taps.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from batiste.graph import Variable
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.jaxcompat import key_name, scan_inputs

from .calls import evaluate, flat_function, open_call

__all__ = ["capture", "patch", "tap"]

GRADIENT = ":grad"  # stands behind the name of a tap whose value is the gradient

# ---------------------------------------------------------------- the primitive

tap_p = jex.Primitive("tap")
tap_p.def_impl(lambda x, *, name: x)
tap_p.def_abstract_eval(lambda x, *, name: x)
mlir.register_lowering(tap_p, lambda _, x, *, name: [x])


def _batched(args: tuple, dims: tuple, *, name: str) -> tuple[Any, int]:
    return tap_p.bind(jnp.moveaxis(args[0], dims[0], 0), name=name), 0  # the batch comes first in what is captured


def _jvp(primals: tuple, tangents: tuple, *, name: str) -> tuple[Any, Any]:
    (tangent,) = tangents
    out = tangent if type(tangent) is ad.Zero else tangent_tap_p.bind(tangent, name=name)
    return tap_p.bind(primals[0], name=name), out


batching.primitive_batchers[tap_p] = _batched
ad.primitive_jvps[tap_p] = _jvp

tangent_tap_p = jex.Primitive("tangent_tap")  # transposed, it is a tap of the gradient
tangent_tap_p.def_impl(lambda x, *, name: x)
tangent_tap_p.def_abstract_eval(lambda x, *, name: x)
mlir.register_lowering(tangent_tap_p, lambda _, x, *, name: [x])
batching.defvectorized(tangent_tap_p)
ad.deflinear2(
    tangent_tap_p,
    lambda ct, _, *, name: [ct if type(ct) is ad.Zero else tap_p.bind(ct, name=name + GRADIENT)],
)


def tap(x: Any, name: str) -> Any:
    """x, under a name by which `capture` and `patch` find it; a compiled program is the same with and without it.

    Go on with what it returns: a tap whose result nobody uses is removed with the rest of what nobody uses. The leaves
    of a tree are named `name/path`. Under `vmap` the tap sees all of the batch, along the first axis.

    >>> from batiste.debug import capture, tap
    >>> def f(x):
    ...     h = tap(jnp.sin(x), "h")
    ...     return 2 * h
    >>> out, taps = capture(f)(0.5)
    >>> float(out) == 2 * float(taps["h"])
    True

    Raises:
        ArgumentError: the name is empty, or no text.
    """
    if not isinstance(name, str) or not name or name.endswith(GRADIENT):
        raise ArgumentError("a tap needs a name", got=repr(name), expected=f"a text that does not end in {GRADIENT!r}",
                            fix='write tap(x, "name")')  # fmt: skip
    x = x[...] if isinstance(x, Variable) else x
    named = lambda path, leaf: tap_p.bind(jnp.asarray(leaf), name="/".join([name, *(str(key_name(k)) for k in path)]))
    return jax.tree_util.tree_map_with_path(named, x)


# ---------------------------------------------------------------- the public half

Select = str | Iterable[str] | Callable[[str], bool] | None


def capture(fn: Callable, select: Select = None) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """`(fn(*args), {name: value})`: the values at the taps in `fn`, and of the gradients that `fn` computes there.

    Inside a scan a value has a leading axis, one entry per iteration; of a while loop it is that of the last
    iteration; of a branch that was not taken it is NaN (zero for whole numbers). A name that is met again becomes
    `name#1`, `name#2`, ...; the gradient of the loss by a tapped value is `name:grad`. Taps that `remat` computes
    once more in the backward pass count once. A function with a rule of its own for gradients (`custom_vjp`) that holds
    a tap is captured by what it computes: take gradients inside `fn`, not of what `capture` returns.

    Args:
        fn: a function, also of live objects; a module, or one of its methods.
        select: which taps: a pattern (`"block*"`), several patterns, or a predicate on the name; None means all.

    >>> f = lambda x: jnp.sum(tap(x, "x") ** 2)
    >>> _, taps = capture(jax.grad(f))(jnp.ones(2))
    >>> {name: value.tolist() for name, value in taps.items()}
    {'x': [1.0, 1.0], 'x:grad': [2.0, 2.0]}

    Raises:
        ArgumentError: a tap stands in an operation that cannot hand it out, or `select` matches none.
    """
    chosen = _chooser(select)

    @functools.wraps(fn, updated=())
    def captured(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        out, run = _run(fn, args, kwargs, lambda name: None, chosen, "capture")
        if select is not None and not run.found:
            raise _unknown("no tap was selected", repr(select), run.met)
        return out, run.found

    return captured


def patch(fn: Callable, replace: Mapping[str, Any]) -> Callable:
    """`fn` with other values at some taps: `{name: value}` or `{name: function of the value}`.

    Inside a loop the replacement is made in each iteration. A value is broadcast to the shape of the one it replaces,
    and gets its dtype. `name` speaks of all taps of that name, `name#1` of the second one alone, and `name:grad` of
    the gradient that comes back there.

    >>> f = lambda x: tap(x, "x") + 1
    >>> float(patch(f, {"x": 10.0})(1.0)), float(patch(f, {"x": lambda x: -x})(1.0))
    (11.0, 0.0)

    Raises:
        ArgumentError: no tap has such a name.
        ShapeError: the value does not fit.
    """

    @functools.wraps(fn, updated=())
    def patched(*args: Any, **kwargs: Any) -> Any:
        out, run = _run(fn, args, kwargs, replace.get, lambda name: False, "patch")
        for name in replace:
            if name not in run.met and name.partition("#")[0] not in run.met:
                raise _unknown("no tap was replaced", repr(name), run.met)
        return out

    return patched


def _chooser(select: Select) -> Callable[[str], bool]:
    if select is None:
        return lambda name: True
    if callable(select):
        return select
    patterns = [select] if isinstance(select, str) else list(select)
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _unknown(problem: str, got: str, met: Iterable[str]) -> ArgumentError:
    return ArgumentError(problem, got=got, expected=f"one of {sorted(met)}" if met else "a tap, and there is none",
                         fix="use what tap(x, name) returns, and the name that it was given")  # fmt: skip


def _run(fn: Callable, args: tuple, kwargs: dict[str, Any], replacement: Callable, chosen: Callable, name: str):
    boundary, groups = open_call(fn, args, kwargs, name)
    jaxpr, shape = jax.make_jaxpr(flat_function(boundary), return_shape=True)(*groups)
    run = Rewrite(replacement, chosen)
    values, found = run.closed(jaxpr, jax.tree.leaves(groups))
    run.found = found
    out, note = jax.tree.unflatten(jax.tree.structure(shape), values)
    return boundary.leave(out, note), run


# ---------------------------------------------------------------- the interpreter

Found = dict[str, Any]


def has_taps(jaxpr: Any) -> bool:
    """Whether a tap stands in the jaxpr or in one inside it."""
    return any(
        eqn.primitive is tap_p or any(map(has_taps, jex.jaxprs_in_params(eqn.params)))
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


class Rewrite:
    """Evaluates jaxprs: replaces the values of taps, and hands those out that are chosen.

    Args:
        replacement: gives what stands for a tap: a value, a function, or None.
        chosen: whether the value of a tap is handed out.
    """

    def __init__(self, replacement: Callable[[str], Any], chosen: Callable[[str], bool]):
        self.replacement, self.chosen = replacement, chosen
        self.met: dict[str, int] = {}  # how often each name was met
        self.again = 0  # how deep we are in what remat computes once more
        self.repeated: dict[str, int] = {}
        self.found: Found = {}

    def closed(self, jaxpr: Any, values: Iterable[Any]) -> tuple[list[Any], Found]:
        return self.evaluate(jaxpr.jaxpr, jaxpr.consts, values)

    def evaluate(self, jaxpr: Any, consts: Iterable[Any], values: Iterable[Any]) -> tuple[list[Any], Found]:
        """The results of a jaxpr, and the values at its taps."""
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values)))
        read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
        found: Found = {}
        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack) or "tapped"):
                outputs, more = self.equation(eqn, inputs)
            env.update(zip(eqn.outvars, outputs))
            found |= more
        return [read(v) for v in jaxpr.outvars], found

    def equation(self, eqn: Any, inputs: list[Any]) -> tuple[list[Any], Found]:
        if eqn.primitive is tap_p:
            return self.tap(eqn.params["name"], inputs[0])
        if any(map(has_taps, jex.jaxprs_in_params(eqn.params))):
            rewrite = REWRITES.get(eqn.primitive.name)
            if rewrite is None:
                raise ArgumentError(f"a tap stands inside {eqn.primitive.name}, which cannot hand values out",
                                    fix="tap what goes in or comes out of it")  # fmt: skip
            return rewrite(self, eqn.params, inputs)
        return evaluate(eqn, inputs), {}

    def tap(self, name: str, x: Any) -> tuple[list[Any], Found]:
        counts = self.repeated if self.again and not name.endswith(GRADIENT) else self.met
        n = counts[name] = counts.get(name, -1) + 1
        numbered = f"{name}#{n}" if n else name
        instead = self.replacement(numbered) if n else None
        instead = self.replacement(name) if instead is None else instead
        if instead is not None:
            x = jnp.asarray(x)
            x = _fitting(instead(x) if callable(instead) else instead, x, name)
        kept = counts is self.met and self.chosen(numbered)
        return [x], {numbered: x} if kept else {}


def _fitting(value: Any, x: Any, name: str) -> Any:
    value = jnp.asarray(value, x.dtype)
    try:
        return jnp.broadcast_to(value, x.shape)
    except ValueError:
        raise ShapeError(
            "the value that replaces a tap has another shape",
            at=name,
            got=value.shape,
            expected=x.shape,
            fix="give an array of that shape, or a function of the value",
        ) from None


# ---------------------------------------------------------------- the operations that hold jaxprs


def _call(run: Rewrite, params: dict[str, Any], inputs: list[Any]):
    name = "call_jaxpr" if "call_jaxpr" in params else "jaxpr" if "jaxpr" in params else "fun_jaxpr"
    jaxpr = params[name]
    return run.evaluate(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), inputs)


def _jit(run: Rewrite, params: dict[str, Any], inputs: list[Any]):
    def inner(*values):
        return run.closed(params["jaxpr"], values)

    inner.__name__ = params["name"]
    return jax.jit(inner, inline=params["inline"])(*inputs)


def _remat(run: Rewrite, params: dict[str, Any], inputs: list[Any]):
    """What was not differentiated stays a checkpoint; in a backward pass the forward taps are met once more."""
    inner = lambda *values: run.evaluate(params["jaxpr"], (), values)
    if params["differentiated"]:
        run.again += 1
        run.repeated = {} if run.again == 1 else run.repeated
    try:
        return jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*inputs)
    finally:
        run.again -= params["differentiated"]


def _scan(run: Rewrite, params: dict[str, Any], inputs: list[Any]):
    n, carried = scan_inputs(params)
    m = n + carried
    consts, carry, xs = inputs[:n], inputs[n:m], inputs[m:]

    def body(carry, x):
        out, found = run.closed(params["jaxpr"], (*consts, *carry, *x))
        return out[: m - n], (out[m - n :], found)

    carry, (ys, found) = _once(run, jax.lax.scan)(
        body, carry, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys], found


def _while(run: Rewrite, params: dict[str, Any], inputs: list[Any]):
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    body = lambda carry: run.closed(params["body_jaxpr"], (*inputs[n:m], *carry))
    _, shapes = _unmoved(run, lambda: jax.eval_shape(body, inputs[m:]))
    empty = jax.tree.map(lambda s: _empty(s), shapes)
    return _once(run, jax.lax.while_loop)(
        lambda carry: jex.jaxpr_as_fun(params["cond_jaxpr"])(*inputs[:n], *carry[0])[0],
        lambda carry: body(carry[0]),
        (inputs[m:], empty),
    )


def _cond(run: Rewrite, params: dict[str, Any], inputs: list[Any]):
    index, *values = inputs
    branches = [lambda *xs, jaxpr=jaxpr: run.closed(jaxpr, xs) for jaxpr in params["branches"]]
    before = dict(run.met)
    shapes = [_unmoved(run, lambda b=b: jax.eval_shape(b, *values)[1]) for b in branches]
    union = {name: s for shape in shapes for name, s in shape.items()}

    def whole(branch):
        def taken(*xs):
            run.met = dict(before)  # the branches are one another's alternatives: they share names
            out, found = branch(*xs)
            after.append(run.met)
            return out, {name: found.get(name, _empty(s)) for name, s in union.items()}

        return taken

    after: list[dict[str, int]] = []
    out = jax.lax.switch(index.astype(jnp.int32), [whole(b) for b in branches], *values)
    run.met = {name: max(met.get(name, -1) for met in after) for name in dict.fromkeys(k for met in after for k in met)}
    return out


def _unmoved(run: Rewrite, look: Callable) -> Any:
    """What `look()` gives, with the counts of names as they were."""
    before = dict(run.met), dict(run.repeated)
    try:
        return look()
    finally:
        run.met, run.repeated = before


def _once(run: Rewrite, loop: Callable) -> Callable:
    """A loop whose body JAX may trace several times: each time the counts of names begin anew."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = dict(run.met), dict(run.repeated)

        def anew(function):
            def traced(*xs):
                run.met, run.repeated = dict(before[0]), dict(before[1])
                return function(*xs)

            return traced

        return loop(*(anew(a) if callable(a) else a for a in args), **kwargs)

    return call


def _empty(s: Any) -> Any:
    return jnp.full(s.shape, jnp.nan if jnp.issubdtype(s.dtype, jnp.inexact) else 0, s.dtype)


REWRITES: dict[str, Callable] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "custom_vjp_call_jaxpr": _call,
    "checkpoint": _remat,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
