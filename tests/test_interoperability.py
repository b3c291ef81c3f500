# SPDX-License-Identifier: Apache-2.0
"""Models in the hands of other libraries: plain JAX, optax, Orbax, Diffrax, pickle."""

import copy
import pickle

import cloudpickle
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from batiste import nnx


class Field(nnx.Module):
    """dy/dt = tanh(y W1) W2, a small vector field."""

    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, t, y, args=None):
        return self.down(nnx.tanh(self.up(y)))


@pytest.fixture
def field():
    return Field(nnx.Rngs(0))


def test_plain_jax_transforms_take_modules(field):
    y = jnp.arange(6.0).reshape(3, 2)
    expected = field(0.0, y)
    np.testing.assert_allclose(jax.jit(lambda m, y: m(0.0, y))(field, y), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda m, y: m(0.0, y), (None, 0))(field, y), expected, rtol=1e-6)
    doubled = jax.tree.map(lambda x: 2 * x, field)
    assert isinstance(doubled, Field) and doubled.up.kernel is not field.up.kernel
    np.testing.assert_array_equal(doubled.up.kernel, 2 * field.up.kernel)
    grads = jax.grad(lambda m: m(0.0, y).sum())(field)
    assert isinstance(grads, Field) and grads.down.bias.shape == (2,)
    shapes = jax.eval_shape(lambda: Field(nnx.Rngs(0)))
    assert shapes.up.kernel.shape == (2, 8)


def test_optax_takes_modules_and_states(field):
    y = jnp.ones((4, 2))
    loss = lambda m: (m(0.0, y) ** 2).mean()
    tx, model = optax.adamw(1e-2), field
    state = tx.init(model)
    before = loss(model)
    for _ in range(20):
        updates, state = tx.update(jax.grad(loss)(model), state, model)
        model = optax.apply_updates(model, updates)
    assert isinstance(model, Field) and loss(model) < 0.7 * before
    params = nnx.state(field, nnx.Param)
    updates, _ = optax.sgd(0.1).update(jax.tree.map(jnp.ones_like, params), optax.sgd(0.1).init(params))
    np.testing.assert_allclose(updates["up"]["bias"][...], -0.1 * jnp.ones(8), rtol=1e-6)


def test_orbax_saves_and_restores_a_state(field, tmp_path):
    path = tmp_path / "state"
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, nnx.to_pure_dict(nnx.state(field)))
    other = Field(nnx.Rngs(1))
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(path, jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(other))))
    nnx.update(other, restored)
    for a, b in zip(jax.tree.leaves(field), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


def test_diffrax_integrates_and_differentiates_a_module(field):
    def end(field):
        term = diffrax.ODETerm(field)
        return diffrax.diffeqsolve(term, diffrax.Heun(), t0=0, t1=1, dt0=0.1, y0=jnp.ones(2)).ys[-1]

    y = jnp.ones(2)
    for _ in range(10):  # Heun's method by hand, dt = 0.1
        k1 = field(0.0, y)
        y = y + 0.05 * (k1 + field(0.0, y + 0.1 * k1))
    np.testing.assert_allclose(end(field), y, rtol=1e-5)
    grads = jax.grad(lambda f: end(f).sum())(field)
    assert float(jnp.abs(grads.up.kernel[...]).sum()) > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nnx.clone])
def test_a_duplicate_is_equal_and_independent(duplicate):
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    other = duplicate(model)
    assert nnx.graphdef(other) == nnx.graphdef(model)
    x = jnp.ones((4, 2))
    np.testing.assert_array_equal(model(x), other(x))
    model.layers[0].kernel[...] = 0
    assert float(jnp.abs(other.layers[0].kernel[...]).sum()) > 0


def test_cloudpickle_takes_an_object_of_a_local_class():
    class Local(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

    other = cloudpickle.loads(cloudpickle.dumps(Local()))
    np.testing.assert_array_equal(other.w, jnp.ones(2))
