# SPDX-License-Identifier: Apache-2.0
"""accumulated: a batch in parts gives what the whole batch gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.training.accumulate import accumulated

X, Y = jax.random.normal(jax.random.key(0), (12, 4)), jax.random.normal(jax.random.key(1), (12, 1))
WEIGHTS = (jnp.arange(12) % 5 > 0).astype(jnp.float32)


class Model(nnx.Module):
    def __init__(self, **settings: Any):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 8, rngs=rngs, **settings)
        self.norm = nnx.BatchNorm(8, rngs=rngs, momentum=0.5)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jax.nn.tanh(self.first(x)))


def mean_loss(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    return ((model(x) - y) ** 2).mean()


def total_loss(model: Model, x: jax.Array, y: jax.Array, weights: jax.Array) -> Any:
    return (((model(x) - y)[:, 0] ** 2) * weights).sum(), weights.sum()


def assert_close(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3, 12])
def test_parts_give_the_gradients_of_the_whole(parts: int) -> None:
    got = nnx.jit(accumulated(mean_loss, parts))(Model(), X, Y)
    assert_close(got, nnx.value_and_grad(mean_loss)(Model(), X, Y))


def test_weights_count_over_the_whole_batch() -> None:
    got = nnx.jit(accumulated(total_loss, 4, weighted=True))(Model(), X, Y, WEIGHTS)

    def whole(model):
        total, weight = total_loss(model, X, Y, WEIGHTS)
        return total / weight

    assert_close(got, nnx.value_and_grad(whole)(Model()))


def test_state_goes_from_part_to_part_and_aux_is_stacked() -> None:
    def loss(model, x):
        y = model.dropout(model.norm(model.first(x)))
        return y.mean(), y.shape

    model, by_hand = Model(), Model()
    (value, shapes), _ = nnx.jit(accumulated(lambda m, x: (loss(m, x)[0], m.norm.mean[...]), 3, has_aux=True))(model, X)
    for i in range(3):
        loss(by_hand, X[i::3])
    assert value.shape == () and shapes.shape == (3, 8)
    np.testing.assert_allclose(model.norm.mean, by_hand.norm.mean, rtol=1e-6)
    assert model.dropout.rngs.count[...] == 3


def test_sums_are_float32_and_gradients_have_the_dtype_of_the_parameters() -> None:
    model = Model(param_dtype=jnp.bfloat16)
    _, gradients = accumulated(mean_loss, 4, wrt=nnx.PathContains("kernel"))(model, X, Y)
    assert [x.dtype for x in jax.tree.leaves(gradients)] == [jnp.bfloat16] * 2
    assert "f32[4,8]" in str(jax.make_jaxpr(nnx.jit(accumulated(mean_loss, 4)))(model, X, Y)).replace("float32", "f32")


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="at least one part"):
        accumulated(mean_loss, 0)
    with pytest.raises(ShapeError, match=r"5 parts do not divide.*\(12, 4\)"):
        accumulated(mean_loss, 5)(Model(), X, Y)
