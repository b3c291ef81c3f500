# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms of functions of scopes: results as by hand, updates, what is seen inside, and misuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import errors
from batiste.core import apply, init
from batiste.linen import lift
from batiste.linen.lift.loops import DependentError
from batiste.linen.scope import Scope
from batiste.transforms.axes import In, Out

KEY = jax.random.key(0)
W = jnp.arange(3.0)
X = jnp.arange(3.0) + 1


def product(scope, x):
    return scope.get_variable("params", "w") * x


def scope_of(mutable=False):
    return Scope({"params": {"w": W}, "st": {"n": jnp.zeros(())}}, {"params": KEY}, mutable=mutable)


BY_HAND = {
    "vmap": (lambda s: lift.vmap(product, {"params": 0}, {})(s, X), W * X),
    "scan": (
        lambda s: lift.scan(lambda s, c, x: (c + product(s, x), c), {"params": 0})(s, 0.0, X)[0], (W * X).sum()),
    "remat": (lambda s: lift.remat(product)(s, X), W * X),
    "jit": (lambda s: lift.jit(product)(s, X), W * X),
    "cond": (lambda s: lift.cond(True, product, lambda s, x: -product(s, x), s, X), W * X),
    "switch": (lambda s: lift.switch(1, [product, lambda s, x: -product(s, x)], s, X), -W * X),
    "while_loop": (
        lambda s: lift.while_loop(lambda s, c: c[0] < 3, lambda s, c: (c[0] + 1, c[1] + product(s, X)), s,
                                  (0, jnp.zeros(3)))[1], 3 * W * X),
    "vjp": (lambda s: lift.vjp(product, s, X)[1](jnp.ones(3))[0]["params"]["w"], X),
    "jvp": (lambda s: lift.jvp(product, s, (X,), (X,), {"params": {"w": W}})[1], 2 * W * X),
    "value_and_grad": (lambda s: lift.value_and_grad(product, s, X)[1][0], W),
    "map_variables": (
        lambda s: lift.map_variables(product, "params", lambda v: jax.tree.map(jnp.square, v))(s, X), W**2 * X),
    "custom_vjp": (lambda s: jax.grad(lambda x: lift.custom_vjp(
        product, lambda s, x: (product(s, x), x), lambda x, ct: ({}, 7 * x))(s, x).sum())(X), 7 * X),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_the_result_is_that_of_the_transform_by_hand(name):
    call, expected = BY_HAND[name]
    np.testing.assert_allclose(call(scope_of()), expected, rtol=1e-6)


def count(scope, *_):
    scope.put_variable("st", "n", scope.get_variable("st", "n") + 1)
    return 0.0


UPDATES = {
    "remat": lambda s: lift.remat(count)(s),
    "jit": lambda s: lift.jit(count)(s),
    "vjp": lambda s: lift.vjp(count, s, 1.0),
    "cond": lambda s: lift.cond(True, count, lambda s: 0.0, s),
    "vmap": lambda s: lift.vmap(count, {"st": None}, {}, axis_size=2)(s),
    "scan": lambda s: lift.scan(lambda s, c: (c, count(s)), variable_broadcast="st", length=3)(s, 0.0),
    "map_variables": lambda s: lift.map_variables(count, "params")(s),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_come_back_where_they_may(name):
    scope = scope_of(mutable=["st"])
    UPDATES[name](scope)
    assert float(scope.get_variable("st", "n")) == 1
    with pytest.raises(errors.ModifyScopeVariableError):
        UPDATES[name](scope_of())


def test_what_is_carried_goes_round():
    scope = scope_of(mutable=["st"])
    lift.scan(lambda s, c: (c, count(s)), variable_carry="st", length=4)(scope, 0.0)
    assert float(scope.get_variable("st", "n")) == 4
    lift.while_loop(lambda s, c: c < 3, lambda s, c: c + 1 + int(count(s)), scope, 0, carry_variables="st")
    assert float(scope.get_variable("st", "n")) == 7


def test_what_is_shared_must_not_depend_on_the_iteration():
    body = lambda s, c, x: (c, s.put_variable("st", "n", x))
    with pytest.raises(DependentError, match="data dependency on the scan body"):
        lift.scan(body, variable_broadcast="st")(scope_of(mutable=True), 0.0, X)


def test_collections_that_are_not_lifted_are_not_seen():
    lift.vmap(lambda s: s.get_variable("params", "w") is None or 1 / 0, {"st": None}, {}, axis_size=2)(scope_of())
    with pytest.raises(errors.InvalidRngError):
        lift.vmap(lambda s: s.make_rng(), {}, {}, axis_size=2)(scope_of())


def test_axes_that_go_one_way():
    def body(scope):
        assert not scope.is_mutable_collection("params") and not scope.has_variable("st", "n")
        scope.put_variable("st", "m", scope.get_variable("params", "w").sum())

    scope = scope_of(mutable=True)
    lift.vmap(body, {"params": In(0), "st": Out(0)}, {})(scope)
    np.testing.assert_array_equal(scope.get_variable("st", "m"), W)


def test_a_program_is_shared_by_scopes_that_differ_in_their_path():
    traces = []

    @lift.jit
    def draw(scope):
        traces.append(scope.path)
        return scope.make_rng("params")

    scope = Scope({}, {"params": KEY})
    a, b = draw(scope.push("a")), draw(scope.push("b"))
    assert len(traces) == 1
    assert (jax.random.key_data(a) != jax.random.key_data(b)).any()


def test_a_scope_from_outside_is_of_another_trace():
    def body(scope, outer):
        return outer.put_variable("st", "n", 1.0)

    scope = scope_of(mutable=True)
    with pytest.raises(errors.JaxTransformError):
        lift.remat(lambda inner: body(inner, scope))(scope)


def test_functions_of_scopes_as_functions_of_variables():
    def dense(scope, x):
        return lift.vmap(lambda s, x: x * s.param("w", jax.nn.initializers.ones, ()), {"params": 0},
                         {"params": True})(scope, x)  # fmt: skip

    y, variables = init(dense)(KEY, X)
    np.testing.assert_array_equal(apply(dense)(variables, X), y)
    assert variables["params"]["w"].shape == (3,)
