# SPDX-License-Identifier: Apache-2.0
"""vjp, jvp, value_and_grad and custom_vjp of functions of scopes.

Updates of variables come back beside what is differentiated. Cotangents and tangents of variables are nested dicts, as
`scope.variables()` gives them; those of a tree of scopes are a tree of such dicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from batiste.graph.errors import AutodiffError
from batiste.transforms.tangents import DIFF, zero_tangent

from ..filters import in_filter
from .call import LiftedCall


def _call(name: str, fn: Callable[..., Any], scopes: Any, diff: Any, variables: Any, rngs: Any) -> LiftedCall:
    """The passage of a call where the collections `diff` are differentiated."""
    return LiftedCall(name, fn, scopes, into=variables, out=variables, rngs=rngs, all_labels=(DIFF, None),
                      labels=lambda col: DIFF if in_filter(diff, col) else None)  # fmt: skip


class _Places:
    """Where the differentiated variables of a call stand in trees of dicts."""

    def __init__(self, call: LiftedCall):
        self.structure = call.structure
        self.paths = [_names(call.crossing.paths[n]) for n in call.crossing.order[0]]

    def tree(self, values: Sequence[Any]) -> Any:
        """Flat values as a tree of dicts for each scope."""
        trees: list[dict[str, Any]] = [{} for _ in range(self.structure.num_leaves)]
        for (number, *names), value in zip(self.paths, values):
            tree = trees[number]
            for name in names[:-1]:
                tree = tree.setdefault(name, {})
            tree[names[-1]] = value
        return self.structure.unflatten(trees)

    def flat(self, tree: Any, like: Sequence[Any]) -> list[Any]:
        """The inverse of `tree`; what is missing is zero."""
        trees = self.structure.flatten_up_to(tree)
        return [_found(trees[number], names, x) for (number, *names), x in zip(self.paths, like)]


def _names(path: tuple) -> tuple:
    """(number of the scope, collection, *names) of a path inside the views."""
    _, number, *steps = path
    *above, _, col, name = steps
    return number, col, *above[1::2], name


def _found(tree: Any, names: Sequence[str], like: Any) -> Any:
    for name in names:
        tree = None if tree is None else tree.get(name)
    return jax.tree.map(zero_tangent, like) if tree is None else tree


# ---------------------------------------------------------------- vjp, jvp
def vjp(
    fn: Callable[..., Any],
    scope: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    vjp_variables: Any = "params",
    variables: Any = True,
    rngs: Any = True,
) -> Any:
    """`(y, g)` with y = fn(scopes, *primals), and g from the cotangent of y to `(of variables, *of primals)`.

    Args:
        has_aux: `fn` returns `(y, aux)`, and `aux` comes third.
        reduce_axes: accepted and ignored.
        vjp_variables: the collections that get a cotangent.
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
    """
    call = _call("vjp", fn, scope, vjp_variables, variables, rngs)
    diff, rest = call.enter()

    def values(diff: list[Any], *primals: Any) -> tuple[Any, Any]:
        out, back = call.run((diff, rest), *primals)
        y, aux = _pair(out, "vjp") if has_aux else (out, None)
        return y, (aux, back)

    y, pullback, (aux, back) = jax.vjp(values, diff, *primals, has_aux=True)
    call.leave(back)
    cotangents = jax.tree_util.Partial(functools.partial(_cotangents, _Places(call)), pullback)
    return (y, cotangents, aux) if has_aux else (y, cotangents)


def _cotangents(places: _Places, pullback: Callable[..., Any], cotangent: Any) -> tuple[Any, ...]:
    variables, *primals = pullback(cotangent)
    return places.tree(variables), *primals


def value_and_grad(
    fn: Callable[..., Any],
    scope: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    variables: Any = True,
    rngs: Any = True,
) -> Any:
    """`(y, dy/dprimals)` with y = fn(scopes, *primals), summed if it is an array; `(y, aux, …)` with `has_aux`.

    The gradient of variables is what `vjp` is for.

    Args:
        has_aux: `fn` returns `(y, aux)`.
        reduce_axes: accepted and ignored.
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
    """
    y, pullback, *aux = vjp(fn, scope, *primals, has_aux=has_aux, vjp_variables=False, variables=variables, rngs=rngs)
    _, *gradients = pullback(jax.tree.map(jnp.ones_like, y))
    return y, *aux, tuple(gradients)


def jvp(
    fn: Callable[..., Any],
    scope: Any,
    primals: Any,
    tangents: Any,
    variable_tangents: Any,
    variables: Any = True,
    rngs: Any = True,
) -> tuple[Any, Any]:
    """`(y, t)` with y = fn(scopes, *primals), and t its tangent.

    Args:
        tangents: of the primals.
        variable_tangents: of the variables; those it leaves out are zero.
        variables: the collections that are passed on.
        rngs: the streams that are passed on.
    """
    trees = jax.tree.structure(scope, is_leaf=lambda x: hasattr(x, "frame")).flatten_up_to(variable_tangents)
    call = _call("jvp", fn, scope, {col for tree in trees for col in tree}, variables, rngs)
    diff, rest = call.enter()
    given = _Places(call).flat(variable_tangents, diff)

    def values(diff: list[Any], primals: tuple) -> tuple[Any, Any]:
        return call.run((diff, rest), *primals)

    y, tangent, back = jax.jvp(values, (diff, tuple(primals)), (given, tuple(tangents)), has_aux=True)
    call.leave(back)
    return y, tangent


# ---------------------------------------------------------------- custom_vjp
def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: Any = "params",
    nondiff_argnums: Any = (),
) -> Callable[..., Any]:
    """fn(scopes, *args) with a backward rule of its own.

    Args:
        forward_fn: takes what `fn` takes; returns its result and what the backward pass needs.
        backward_fn: takes the arguments of `nondiff_argnums`, what the backward pass needs and the cotangent of the
            result; returns `(of variables, *of the other arguments)`.
        grad_vars: the collections that get a cotangent.
        nondiff_argnums: arguments that are no arrays; the scopes are number 0.
    """
    static = tuple(n + 1 for n in ((nondiff_argnums,) if isinstance(nondiff_argnums, int) else nondiff_argnums))

    def inner(scopes: Any, *args: Any) -> Any:
        call = _call("custom_vjp", fn, scopes, grad_vars, True, True)
        groups = call.enter()
        places, (diff, _) = _Places(call), groups

        def forward(diff: list[Any], rest: list[Any], *args: Any) -> tuple[Any, Any]:
            out, back = call.run_other(forward_fn, (diff, rest), *args)
            y, residuals = _pair(out, "custom_vjp")
            return (y, back), residuals

        def backward(*args: Any) -> tuple[Any, ...]:
            *nondiff, residuals, (cotangent, _) = args
            variables, *others = backward_fn(*nondiff, residuals, cotangent)
            return places.flat(variables, diff), None, *others

        f = jax.custom_vjp(lambda *args: call.run(args[:2], *args[2:]), nondiff_argnums=static)
        f.defvjp(forward, backward)
        out, back = f(*groups, *args)
        call.leave(back)
        return out

    return inner


def _pair(out: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise AutodiffError(f"{name} wants a function that returns a pair", got=type(out).__name__)
    return tuple(out)
