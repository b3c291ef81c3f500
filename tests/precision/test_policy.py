# SPDX-License-Identifier: Apache-2.0
"""Policies: computed in one dtype, kept in another, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.precision import Policy, policy

MIXED = policy("bfloat16")


class Model(nnx.Module):
    """A layer, a parameter used by hand, a norm, a router, statistics and a stack."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.by_hand = nnx.Param(jnp.ones((8, 8)) / 8)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.router = nnx.Linear(8, 2, rngs=rngs)
        self.blocks = nnx.Stack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.norm(self.first(x) @ self.by_hand)
        return self.dropout(self.blocks(x)), self.router(x)


X = jax.random.normal(jax.random.key(1), (5, 4))


def test_computed_in_one_dtype_kept_in_another() -> None:
    model = Model()
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    y, routes = MIXED(model)(MIXED.cast(X))
    assert (y.dtype, routes.dtype) == (jnp.bfloat16, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Param))
    assert model.first.dtype is None


def test_what_the_model_writes_is_written_into_the_model() -> None:
    model = Model()
    MIXED(model)(X)
    assert (model.norm.mean[...] != 0).any() and model.norm.mean.dtype == jnp.float32
    assert model.dropout.rngs.count[...] == 1


def test_training_under_a_policy() -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y, routes = MIXED.result(MIXED(model)(X))
            return (y**2).mean() + (routes**2).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value, gradients

    value, gradients = step(model, optimizer)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert [step(model, optimizer)[0] for _ in range(5)][-1] < value
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}


def test_shared_parameters_stay_shared_and_gradients_add_up() -> None:
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
            self.b = self.a

    gradients = nnx.grad(lambda m: (lambda p: p.a(p.b(jnp.ones((1, 3)))).sum())(MIXED(m)).astype(jnp.float32))(Tied())
    assert MIXED(model := Tied()).a is not model.a
    np.testing.assert_allclose(
        gradients["a"]["kernel"][...], nnx.grad(lambda m: m.a(m.b(jnp.ones((1, 3)))).sum())(Tied())["a"]["kernel"][...],
        rtol=0.05, atol=0.02,
    )  # fmt: skip


def test_in_a_wrapped_function_the_call_of_the_model_casts_and_nothing_else() -> None:
    seen = []

    class Watched(Model):
        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            seen.append((x.dtype, type(self.first).__name__))
            return super().__call__(x)

    def loss(model: Model, x: jax.Array) -> tuple[jax.Array, ...]:
        assert isinstance(model, Watched)
        y, routes = model(x)
        return x, y, routes

    model = Watched()
    assert [y.dtype for y in Policy(compute=jnp.float16).wrap(loss)(model, X)] == [jnp.float32] * 3
    assert seen == [(jnp.float16, "Linear")]
    assert type(model) is Watched


def test_storing_in_another_dtype_and_back() -> None:
    model = Model()
    Policy(param=jnp.bfloat16).store(model)
    assert (model.first.kernel.dtype, model.norm.scale.dtype) == (jnp.bfloat16, jnp.float32)
    policy("float32").store(model)
    assert model.first.kernel.dtype == jnp.float32


def test_patterns_name_paths_and_classes() -> None:
    model = Model()
    kept = Policy(keep=("blocks/layers", "BatchNorm")).kept(model)
    assert kept == {("norm",), ("blocks", "layers")}
    assert Policy(keep=("Module",)).kept(model) >= {(), ("first",), ("blocks", "layers")}


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"unknown policy.*'half'.*float32, bfloat16"):
        policy("half")
    with pytest.raises(ArgumentError, match=r"compute is a float dtype.*int8"):
        Policy(compute=jnp.int8)
    with pytest.raises(ArgumentError, match=r"keep is a tuple"):
        Policy(keep="*Norm")  # type: ignore[arg-type]
