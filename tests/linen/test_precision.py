# SPDX-License-Identifier: Apache-2.0
"""Policies on the functional face: what holds for every layer, and for modules that were written without a dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen as nn
from batiste.linen.precision import mixed
from batiste.precision import Policy, policy

X = jax.random.normal(jax.random.key(1), (2, 6, 8))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 6, 4))
KEY = jax.random.key(0)

LAYERS = {
    "Dense": (nn.Dense(4), X),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1)), X),
    "Einsum": (nn.Einsum((8, 2, 4), "btd,dhk->bthk"), X),
    "Conv": (nn.Conv(4, (3, 3)), IMAGE),
    "ConvTranspose": (nn.ConvTranspose(4, (3, 3)), IMAGE),
    "Embed": (nn.Embed(7, 4), jnp.array([0, 6])),
    "LayerNorm": (nn.LayerNorm(), X),
    "RMSNorm": (nn.RMSNorm(), X),
    "GroupNorm": (nn.GroupNorm(4), X),
    "BatchNorm": (nn.BatchNorm(use_running_average=True), X),
    "PReLU": (nn.PReLU(), X),
    "attention": (nn.MultiHeadDotProductAttention(2), X),
    "normalised attention": (nn.MultiHeadDotProductAttention(2, normalize_qk=True), X),
    "GRU": (nn.RNN(nn.GRUCell(4)), X),
    "LSTM": (nn.RNN(nn.OptimizedLSTMCell(4)), X),
    "mapped": (nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4), X),
    "recomputed": (nn.remat(nn.Dense)(4), X),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_narrow_and_keeps_wide(name: str) -> None:
    layer, x = LAYERS[name]
    half = policy("bfloat16")
    model = mixed(layer, half)
    variables = model.init(KEY, x)

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any, apply: Any, x: Any) -> Any:
            y = apply({**variables, "params": params}, x)
            return (y.astype(jnp.float32) ** 2).mean(), y

        grad = jax.grad(loss, has_aux=True)
        return grad(params, model.apply, half.cast(x)), grad(params, layer.apply, x)

    (ours, y), (exact, z) = gradients(variables["params"])
    assert (y.dtype, z.dtype) == (jnp.bfloat16, jnp.float32)
    assert {g.dtype for g in jax.tree.leaves((ours, variables["params"]))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y.astype(jnp.float32), z, rtol=0.04, atol=0.04 * float(jnp.abs(z).max()))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(exact))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05 * largest), ours, exact)


class Model(nn.Module):
    """Parameters made by hand, in `setup` and in a call; a norm, a router with a part, statistics."""

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (1, 1, 8))
        self.router = nn.Sequential([nn.Dense(4), nn.Dense(2)])
        self.norm = nn.BatchNorm(use_running_average=False)

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x * self.scale) @ self.param("by_hand", nn.initializers.normal(), (8, 8))
        return self.norm(x), self.router(x)


def test_a_module_that_was_written_without_a_dtype() -> None:
    model, half = mixed(Model(), "bfloat16"), policy("bfloat16")
    variables = model.init(KEY, X)
    before = jax.tree.map(jnp.copy, variables)
    (y, routes), written = model.apply(variables, half.cast(X), mutable=["batch_stats"])
    assert (y.dtype, routes.dtype) == (jnp.bfloat16, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(written)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_parameters_are_kept_in_the_dtype_of_the_policy() -> None:
    params = mixed(Model(), Policy(param=jnp.bfloat16)).init(KEY, X)["params"]
    assert params["first"]["kernel"].dtype == params["by_hand"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves((params["router"], params["norm"]))} == {jnp.dtype("float32")}


def test_products_in_8_bits_but_for_kept_modules() -> None:
    model = mixed(Model(), "fp8")
    variables = model.init(KEY, X)
    text = str(jax.make_jaxpr(lambda v, x: model.apply(v, x, mutable=True))(variables, X.astype(jnp.bfloat16)))
    assert text.count("f8_e4m3fn[2,6,8]") and "f8_e4m3fn[8,4]" not in text


def test_the_module_computes_as_before_when_it_is_used_by_itself() -> None:
    layer = nn.Dense(4)
    variables = layer.init(KEY, X)
    y = layer.apply(variables, X)
    mixed(layer, "bfloat16").apply(variables, X)
    np.testing.assert_array_equal(layer.apply(variables, X), y)
    assert layer.dtype is None
