# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms of functions of scopes, against Flax: results, variables and later keys, bit for bit."""

from __future__ import annotations

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import lift as flax_lift

from batiste.linen import lift
from batiste.linen.scope import Scope

KEYS = {"params": jax.random.key(7), "dropout": jax.random.key(3)}
X = jax.random.normal(jax.random.key(1), (4, 3))
XS = jax.random.normal(jax.random.key(2), (5, 4, 3))
SPLIT = {"params": True, "dropout": True}
AXES = {"params": 0, "st": 0}


def dense(scope, x):
    kernel = scope.param("w", jax.nn.initializers.lecun_normal(), (x.shape[-1], 3))
    return x @ kernel + scope.param("b", jax.nn.initializers.normal(), (1, 3))


def net(scope, x):
    x = dense(scope.push("d1"), x)
    inner = scope.push("e")
    total = inner.variable("st", "n", lambda: jnp.zeros(()))
    total.value = total.value + x.sum()
    return dense(inner, x) + jax.random.normal(scope.make_rng("dropout"), ())


def with_pullback(result):
    y, pullback = result
    return y, pullback(jnp.ones_like(y))


def nested(lifts, scope, _):
    def layer(scope, x, _):
        mapped = lambda scope, x: lifts.vmap(net, AXES, SPLIT)(scope.push("v"), x)
        return lifts.remat(mapped)(scope.push("r"), x), None

    return lifts.scan(layer, AXES, split_rngs=SPLIT, length=3)(scope.push("a"), XS, None)


CASES = {
    "vmap": lambda L, s, b: L.vmap(net, AXES, SPLIT)(s, XS),
    "vmap_shared": lambda L, s, b: L.vmap(
        lambda s, x: dense(s.push("q"), x), {"params": None}, {"params": False})(s.push("a"), XS),
    "vmap_axis_1": lambda L, s, b: L.vmap(
        net, {"params": 1, "st": 0}, {"params": True, "dropout": False}, in_axes=1, out_axes=1)(s.push("a"), XS),
    "vmap_of_two_scopes": lambda L, s, b: L.vmap(
        lambda two, x: dense(two[0], x) + dense(two[1], x), {"params": 0}, {"params": True})(
        (s.push("a"), s.push("b")), XS),
    "remat": lambda L, s, b: L.remat(net)(s.push("a"), X),
    "scan": lambda L, s, b: L.scan(lambda s, c, x: (net(s, c), x), AXES, split_rngs=SPLIT)(s.push("a"), X, XS),
    "scan_shared": lambda L, s, b: L.scan(
        lambda s, c, x: (net(s, c), x), {"st": 0}, variable_broadcast="params",
        split_rngs={"params": False, "dropout": True}, in_axes=1, out_axes=1)(s.push("a"), X, XS),
    "scan_shared_result": lambda L, s, b: L.scan(
        lambda s, c: (net(s, c), (c, jnp.ones(2))), {"params": 1, "st": 0}, split_rngs=SPLIT, length=3,
        out_axes=(0, b))(s, X),
    "scan_shared_argument": lambda L, s, b: L.scan(
        lambda s, c, x, y: (net(s, c) + y.sum(), x), AXES, split_rngs=SPLIT, in_axes=(0, b))(s, X, XS, X),
    "scan_traced_once": lambda L, s, b: L.scan(
        lambda s, c, x: (net(s, c), x), AXES, split_rngs=SPLIT, check_constancy_invariants=False)(s, X, XS),
    "scan_of_remat_of_vmap": nested,
    "remat_scan": lambda L, s, b: L.remat_scan(net, (2, 3))(s.push("a"), X),
    "cond": lambda L, s, b: L.cond(jnp.zeros((), bool), net, lambda s, x: -net(s, x), s.push("a"), X),
    "switch": lambda L, s, b: L.switch(1, [net, lambda s, x: -net(s, x), net], s.push("a"), X),
    "vjp": lambda L, s, b: with_pullback(L.vjp(net, s.push("a"), X)),
    "vjp_of_two_scopes": lambda L, s, b: with_pullback(
        L.vjp(lambda two, x: dense(two[0], x) + dense(two[1], x), (s.push("a"), s.push("b")), X)),
    "jvp": lambda L, s, b: L.jvp(net, s.push("a"), (X,), (X,), variable_tangents={}),
    "value_and_grad": lambda L, s, b: L.value_and_grad(lambda s, x: net(s, x).sum(), s.push("a"), X),
    "map_variables": lambda L, s, b: L.map_variables(
        net, "st", lambda v: jax.tree.map(lambda x: x * 2, v), lambda v: jax.tree.map(lambda x: x / 2, v),
        init=True, mutable=True)(s.push("a"), X),
    "swap_collection": lambda L, s, b: L.swap_collection(net, "params", "st")(s.push("a"), X),
}  # fmt: skip


AGAIN = ("vmap", "scan_shared", "remat")  # those that are called again with the variables that the first call made


def plain(tree):
    if isinstance(tree, (dict, flax.core.FrozenDict)):
        return {name: plain(x) for name, x in tree.items()}
    return [plain(x) for x in tree] if isinstance(tree, (tuple, list)) else tree


def copied(tree):
    return jax.tree.map(lambda x: x, tree)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_flax(name):
    def run(lifts, cls, broadcast):
        made = cls({}, KEYS, mutable=True)
        first = CASES[name](lifts, made, broadcast)
        variables, key = copied(made.variables()), made.make_rng("params")
        given = cls(copied(variables), KEYS, mutable=["st"])
        second = CASES[name](lifts, given, broadcast) if name in AGAIN else None
        return plain([first, dict(variables), jax.random.key_data(key), second, dict(given.variables())])

    expected, got = run(flax_lift, flax.core.Scope, flax.core.broadcast), run(lift, Scope, lift.broadcast)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
