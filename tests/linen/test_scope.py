# SPDX-License-Identifier: Apache-2.0
"""Scopes: filters of collections, keys by path, subtrees opened when they are wanted, and their passage as graphs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import errors
from batiste.graph import merge, split
from batiste.linen.scope import DenyList, Scope, in_filter
from batiste.transforms.remat import remat

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("filter", "expected"),
    [(True, True), (False, False), ("a", True), ("b", False), (["a", "c"], True), ({"b"}, False),
     (DenyList("a"), False), (DenyList(["b"]), True), (DenyList(DenyList("a")), True)],
)  # fmt: skip
def test_filters(filter, expected):
    assert in_filter(filter, "a") is expected


def test_keys_differ_by_path_stream_and_count():
    def keys():
        scope = Scope({}, {"params": KEY, "dropout": jax.random.key(1)})
        streams = [(s, name) for s in (scope, scope.push("a"), scope.push("b")) for name in ("params", "dropout")]
        return [jax.random.key_data(s.make_rng(name)).tolist() for s, name in streams for _ in range(2)]

    assert len({tuple(key) for key in keys()}) == 12
    assert keys() == keys()


def test_a_subtree_is_opened_when_it_is_wanted():
    scope = Scope({"params": {"a": {"b": {"w": 1.0}}, "c": {"w": 2.0}}}, mutable=["params"])
    inner = scope.push("a").push("b")
    inner.put_variable("params", "w", 3.0)
    assert scope.get_variable("params", "a") == {"b": {"w": 3.0}}
    assert scope.variables() == {"params": {"a": {"b": {"w": 3.0}}, "c": {"w": 2.0}}}


def test_a_scope_is_an_object_graph():
    scope = Scope({"params": {"a": {"w": jnp.ones(2)}}, "stats": {"m": jnp.zeros(1)}}, {"params": KEY}, mutable=True)
    scope.push("a").get_variable("params", "w")
    again = merge(*split(scope))
    assert jax.tree.map(jnp.shape, again.variables()) == {"params": {"a": {"w": (2,)}}, "stats": {"m": (1,)}}
    assert again.push("a", reuse=True).frame is again.frame
    np.testing.assert_array_equal(jax.random.key_data(again.make_rng()), jax.random.key_data(scope.make_rng()))


def test_new_variables_scopes_and_counts_come_back_from_a_transform():
    def body(scope, x):
        w = scope.push("dense").param("w", jax.nn.initializers.normal(), (3,))
        return x * w

    plain, mapped = (Scope({}, {"params": KEY}, mutable=True) for _ in range(2))
    expected, got = body(plain, jnp.ones(3)), remat(body)(mapped, jnp.ones(3))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, mapped.variables(), plain.variables())
    assert mapped.frame.counts == plain.frame.counts == {(("dense",), "params"): 1}


def test_a_scope_ends_with_its_call():
    scope = Scope({}, mutable=True)
    scope.invalidate()
    with pytest.raises(errors.InvalidScopeError):
        scope.push("a")


def test_names_are_taken_once():
    scope = Scope({}, mutable=True)
    scope.push("a")
    with pytest.raises(ValueError, match='"a"'):
        scope.push("a")
    assert scope.push(prefix="b").name == "b0"
