# SPDX-License-Identifier: Apache-2.0
"""train_step: what it does is what the same parts do by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, CallError
from batiste.training import EMA, Guard, LossScale, Trainable, train_step

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
ADAM = optax.adam(1e-2)
Y = (X[:, :1] > 0).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def loss(model: Any, batch: Any) -> Any:
    error = model(batch[0]) - batch[1]
    return (error**2).mean(), {"mae": jnp.abs(error).mean()}


def pair(wrt: Any = nnx.Param, tx: Any = None) -> tuple[Net, nnx.Optimizer]:
    model = Net()
    return model, nnx.Optimizer(model, tx or ADAM, wrt=wrt)


def values(*objects: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves([nnx.as_pure(nnx.state(x)) for x in objects])
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_step_is_a_gradient_and_an_update() -> None:
    step, (model, optimizer) = train_step(loss), pair()
    got = [step(model, optimizer, (X, Y)) for _ in range(3)]

    @nnx.jit
    def by_hand(model: Net, optimizer: nnx.Optimizer) -> jax.Array:
        (value, _), gradients = nnx.value_and_grad(loss, has_aux=True)(model, (X, Y))
        optimizer.update(model, gradients)
        return value

    other = pair()
    wanted = [by_hand(*other) for _ in range(3)]
    np.testing.assert_allclose([m["loss"] for m in got], wanted, rtol=1e-6)
    for a, b in zip(values(model, optimizer), values(*other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert set(got[0]) == {"loss", "grad_norm", "mae", "verdict", "halted"}


def test_gradients_are_clipped_to_a_global_norm() -> None:
    model, optimizer = pair(tx=optax.sgd(1.0))
    before = values(nnx.state(model, nnx.Param))
    norm = float(train_step(loss, clip=0.01)(model, optimizer, (X, Y))["grad_norm"])
    moved = [a - b for a, b in zip(values(nnx.state(model, nnx.Param)), before)]
    assert norm > 0.01
    assert np.sqrt(sum((d**2).sum() for d in moved)) == pytest.approx(0.01, rel=1e-2)


def test_parts_of_a_batch_give_the_gradient_of_the_batch() -> None:
    def plain(model: Any, batch: Any) -> Any:
        return ((model.last(jnp.tanh(model.first(batch[0]))) - batch[1]) ** 2).mean()

    (one, a), (two, b) = pair(), pair()
    losses = train_step(plain)(one, a, (X, Y))["loss"], train_step(plain, parts=4)(two, b, (X, Y))["loss"]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for x, y in zip(values(one), values(two)):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_one_selector_freezes_for_the_gradient_and_for_the_optimizer() -> None:
    model, optimizer = pair(wrt=Trainable("last/*"))
    before = nnx.clone(model)
    train_step(loss)(model, optimizer, (X, Y))
    assert (model.last.kernel[...] != before.last.kernel[...]).any()
    np.testing.assert_array_equal(model.first.kernel[...], before.first.kernel[...])
    assert {path[-2] for path, _ in nnx.to_flat_state(nnx.state(optimizer, nnx.optimizer.OptVariable))} == {"last"}


def test_the_average_follows_the_model() -> None:
    model, optimizer = pair()
    step = train_step(loss, ema=EMA(model, 0.5, only=nnx.Param))
    old = np.asarray(model.last.kernel[...])
    step(model, optimizer, (X, Y))
    assert step.ema is not None
    np.testing.assert_allclose(step.ema.params["last"]["kernel"][...], (old + model.last.kernel[...]) / 2, rtol=1e-6)


def test_half_precision_brings_a_scale_that_leaves_out_what_overflows() -> None:
    model, optimizer = pair()
    step = train_step(loss, policy="float16", scale=LossScale(2.0**40, interval=3))
    before = values(nnx.state(model))
    first = step(model, optimizer, (X, Y))
    assert_same(values(nnx.state(model)), before)
    assert float(first["loss_scale"]) == 2.0**39
    assert int(first["verdict"]) == 0, "too large a scale is no mistake of the model"
    for _ in range(40):
        metrics = step(model, optimizer, (X, Y))
    assert int(optimizer.step[...]) > 5
    assert model.first.kernel.dtype == jnp.float32
    assert np.isfinite(metrics["loss"]) and float(metrics["loss_scale"]) < 2.0**30


def test_buffers_are_given_away_but_only_those_that_nobody_else_has() -> None:
    key = jax.random.key(0)
    model = nnx.Sequential(nnx.Linear(4, 1, rngs=nnx.Rngs(params=key)), nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=key)))
    copy, optimizer = nnx.clone(model), nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    ema = EMA(model, 0.9, only=nnx.Param)
    step = train_step(lambda m, b: (m(b) ** 2).mean(), ema=ema)
    for _ in range(3):
        step(model, optimizer, X)
    assert not key.is_deleted()
    assert np.isfinite(copy.layers[0].kernel[...]).all()
    held = model.layers[0].kernel.get_value()
    step(model, optimizer, X)
    assert held.is_deleted()
    kept = model.layers[0].kernel.get_value()
    train_step(lambda m, b: (m(b) ** 2).mean(), donate=False)(model, optimizer, X)
    assert not kept.is_deleted()


def test_a_step_is_compiled_once() -> None:
    step, (model, optimizer) = train_step(loss, guard=Guard("rollback")), pair()
    for _ in range(3):
        step(model, optimizer, (X, Y))
    assert len(step.compiled.programs) == 1
    assert next(iter(step.compiled.programs.values()))._cache_size() == 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: train_step(loss, clip=0.0), "above zero"),
        (lambda: train_step(loss, parts=0), "at least one part"),
        (lambda: Guard("ignore"), "expected skip, rollback, raise, off"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(made: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        made()


def test_what_is_no_loss_and_what_is_no_model_are_refused() -> None:
    model, optimizer = pair()
    with pytest.raises(CallError, match="a loss returns a number"):
        train_step(lambda m, b: m(b))(model, optimizer, X)
    with pytest.raises(CallError, match="live objects"):
        train_step(loss)({"kernel": X}, optimizer, (X, Y))
