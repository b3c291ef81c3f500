# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: the formula, what is trained, and what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn import initializers

NORMAL = initializers.normal(1.0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(3, 4, rngs=rngs)
        self.down = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_the_formula():
    layer, x = nnx.LoRA(3, 2, 4, b_initializer=NORMAL, rngs=nnx.Rngs(0)), normal(5, 3)
    assert_close(layer(x), x @ np.asarray(layer.lora_a) @ np.asarray(layer.lora_b))
    assert isinstance(layer.lora_a, nnx.LoRAParam)


def test_around_a_layer_it_changes_nothing_at_first():
    linear, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), normal(5, 3)
    layer = nnx.LoRA(3, 2, 4, base_module=linear, rngs=nnx.Rngs(1))
    assert layer.base_module is linear
    assert_close(layer(x), linear(x))
    assert_close(layer(x, out_sharding=None), linear(x))


def test_the_linear_layer_has_linear_s_parameters_and_one_adapter():
    linear, layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    assert_close(layer.kernel[...], linear.kernel[...])
    layer.lora.lora_b[...] = normal(2, 4)
    x = normal(5, 3)
    assert_close(layer(x), linear(x) + x @ np.asarray(layer.lora.lora_a) @ np.asarray(layer.lora.lora_b))


def test_only_adapters_are_trained():
    model, x = Model(nnx.Rngs(0)), normal(5, 3)
    model.up = nnx.LoRA(3, 2, 4, base_module=model.up, rngs=nnx.Rngs(1))
    before = np.asarray(model.up.base_module.kernel)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    gradients = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert {path for path, _ in nnx.to_flat_state(gradients)} == {("up", "lora_a"), ("up", "lora_b")}
    optimizer.update(model, gradients)
    np.testing.assert_array_equal(model.up.base_module.kernel[...], before)
    assert np.any(model.up.lora_b[...])


def test_another_kind_and_metadata():
    class Delta(nnx.Param):
        pass

    layer = nnx.LoRA(3, 2, 4, lora_param_type=Delta, a_metadata={"a": 1}, b_metadata={"b": 2}, rngs=nnx.Rngs(0))
    assert (type(layer.lora_a), layer.lora_a.a, layer.lora_b.b) == (Delta, 1, 2)


def test_dtypes():
    layer = nnx.LoRALinear(3, 4, lora_rank=2, lora_dtype=jnp.bfloat16, lora_param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert (layer.kernel.dtype, layer.lora.lora_a.dtype) == (jnp.float32, jnp.bfloat16)
    assert nnx.LoRA(3, 2, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(normal(5, 3)).dtype == jnp.bfloat16


def test_refused():
    with pytest.raises(ShapeError, match="in_features=4"):
        nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0))(normal(5, 4))
    with pytest.raises(ArgumentError, match="must be callable"):
        nnx.LoRA(3, 2, 4, base_module=nnx.Dict(), rngs=nnx.Rngs(0))(normal(5, 3))
