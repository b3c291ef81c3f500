# SPDX-License-Identifier: Apache-2.0
"""Training in float16: the loss is scaled, and a step whose gradients overflow is left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.training.step import train_step

X = jax.random.normal(jax.random.key(0), (8, 4))


def small_loss(model, x):
    """Gradients near 1e-7, which float16 rounds to nothing or almost."""
    return (model(x).astype(jnp.float32) ** 2).mean() * 1e-6


def trained(steps: int, x: jax.Array = X):
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    step = train_step(small_loss, policy="float16")
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    metrics = [jax.device_get(step(model, optimizer, x)) for _ in range(steps)]
    return model, metrics


def test_small_gradients_are_not_lost() -> None:
    exact = nnx.grad(small_loss)(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), X)
    norm = float(optax.tree.norm(nnx.to_pure_dict(exact)))
    _, (metrics,) = trained(1)
    assert abs(float(metrics["grad_norm"]) / norm - 1) < 0.01
    assert metrics["loss_scale"] == 2.0**15


def test_a_step_that_overflows_is_left_out_and_halves_the_scale() -> None:
    model, metrics = trained(1, x=X.at[0, 0].set(jnp.inf))
    np.testing.assert_array_equal(model.kernel[...], nnx.Linear(4, 4, rngs=nnx.Rngs(0)).kernel[...])
    assert metrics[0]["loss_scale"] == 2.0**14
    assert model.kernel.dtype == jnp.float32
