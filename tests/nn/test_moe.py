# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts: its formula, its places, and its experts on different devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from batiste.graph import Rngs
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn.activations import silu
from batiste.nn.moe import Experts, MixtureOfExperts, RouterLoss, load_balance, route
from batiste.nnx.views import capture
from batiste.sharding import collectives, count_collectives, ready_plan, use
from batiste.transforms.autodiff import value_and_grad
from batiste.transforms.compile import jit

X = jax.random.normal(jax.random.key(0), (16, 8, 12))


def mixture(**options):
    return MixtureOfExperts(8, 12, 32, **{"gated": True, "activation": silu, **options}, rngs=Rngs(0))


loss_and_grads = jit(value_and_grad(lambda layer, x: jnp.mean(jnp.square(layer(x)))))


def by_hand(layer, x):
    """Every position by itself, through each expert, weighted."""
    p = jax.nn.softmax(x @ layer.router.kernel[...])
    weights, chosen = jax.lax.top_k(p, layer.top_k)
    weights = weights / weights.sum(-1, keepdims=True)
    each = layer.experts(jnp.broadcast_to(x[None], (8, *x.shape)))
    rows = jax.nn.one_hot(chosen, 8)
    return jnp.einsum("...k,...ke,e...d->...d", weights, rows, each)


@pytest.mark.parametrize("top_k", [1, 3])
def test_with_room_for_all_it_is_the_weighted_sum_of_the_chosen(top_k):
    layer = mixture(top_k=top_k, capacity_factor=8)
    np.testing.assert_allclose(layer(X), by_hand(layer, X), atol=1e-5)


def test_any_leading_dims():
    layer = mixture()
    np.testing.assert_allclose(layer(X.reshape(4, 4, 8, 12)), layer(X).reshape(4, 4, 8, 12), atol=1e-6)
    assert layer(X[0, 0]).shape == (12,)


def test_experts():
    experts = Experts(2, 3, 8, gated=True, activation=silu, rngs=Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    for e in range(2):
        hidden = silu(x[e] @ experts.gate[e]) * (x[e] @ experts.up[e])
        np.testing.assert_allclose(experts(x)[e], hidden @ experts.down[e], atol=1e-5)
    assert Experts(2, 3, 8, rngs=Rngs(0)).gate is None


def test_places_are_given_to_first_choices_first_and_then_in_order():
    p = jnp.array([[[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.0, 0.6, 0.4]]])
    dispatch, combine = route(p, top_k=2, capacity=2)
    taken = [tuple(int(i) for i in place) for place in np.argwhere(dispatch[0])]
    # (position, expert, place): expert 1 has two first choices, and no room for the second choice of position 0
    assert taken == [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1), (2, 2, 0)]
    np.testing.assert_allclose(combine[0].sum(axis=(1, 2)), [0.6, 1.0, 1.0], atol=1e-6)


def test_capacity():
    assert mixture(top_k=2, capacity_factor=1.25).capacity(64) == 20
    assert mixture(top_k=2, capacity_factor=100).capacity(64) == 64


def test_what_the_router_adds_to_the_loss():
    layer = mixture()
    y, losses = capture(layer, RouterLoss)(X)
    np.testing.assert_allclose(y, layer(X))
    logits = X @ layer.router.kernel[...]
    np.testing.assert_allclose(losses["load_balance"].get_value()[0], load_balance(jax.nn.softmax(logits)), rtol=1e-5)
    expected = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    np.testing.assert_allclose(losses["router_z"].get_value()[0], expected, rtol=1e-5)
    one_for_all = jax.nn.one_hot(jnp.zeros((4, 8), int), 8)
    assert float(load_balance(one_for_all)) == 8.0


def test_the_router_is_float32():
    layer = mixture(dtype=jnp.bfloat16)
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.router(X.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("sizes", [dict(expert=8), dict(data=2, expert=2, tensor=2)], ids=["expert", "all"])
def test_experts_on_different_devices(sizes):
    whole = loss_and_grads(mixture(), X)
    plan = ready_plan(**sizes)
    with use(plan):
        layer, x = mixture(), plan.shard_batch(X)
        assert layer.experts.up[...].sharding.spec[0] == "expert"
        assert layer.router.kernel[...].sharding.spec == P()
        compiled = loss_and_grads.lower(layer, x).compile()
        got = compiled(layer, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, whole)
    # tokens to their experts and back, and the cotangents to the experts; x itself needs no gradient
    counts = count_collectives(compiled)
    assert counts.pop("all-to-all") == 3
    assert set(counts) == {"all-reduce"}
    kernels = {shape for c in collectives(compiled) if c.kind != "all-reduce" for shape in c.shapes}
    assert not kernels & {layer.experts.up.shape, layer.experts.down.shape}


def test_what_it_refuses():
    with pytest.raises(ArgumentError, match="wrong top_k: got 9, expected 1 to 8"):
        mixture(top_k=9)
    with pytest.raises(ShapeError, match="wrong last dim"):
        mixture()(jnp.ones((2, 3, 5)))
