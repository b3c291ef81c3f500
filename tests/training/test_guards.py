# SPDX-License-Identifier: Apache-2.0
"""Guards: what is not finite or spikes never gets into the model, and a skipped batch leaves no trace."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.training import Guard, NonFiniteError, TrainStep, train_step
from batiste.training.step import Extras
from tests.training.test_step import ADAM, X, Y, assert_same, pair, values

CLEAN = jnp.float32(1)
SEEDS = range(5 if os.environ.get("BATISTE_FAULTS") == "long" else 1)
PLACES = ("batch", "loss", "gradient", "parameter", "optimizer", "schedule")


@jax.custom_vjp
def poisoned_backwards(x: jax.Array, by: jax.Array) -> jax.Array:
    """x; the gradient is multiplied by `by`."""
    return x


poisoned_backwards.defvjp(lambda x, by: (x, by), lambda by, ct: (ct * by, jnp.zeros_like(by)))


def loss(model: Any, batch: Any) -> Any:
    x, y, in_loss, in_gradient = batch
    error = poisoned_backwards(model(x), in_gradient) - y
    return (error**2).mean() * in_loss


@functools.cache
def schedule(value: str, at: int) -> Any:
    return optax.adam(lambda count: jnp.where(count == at, float(value), 1e-2))


@functools.cache
def compiled(policy: Any) -> TrainStep:
    """One program for many cases; each puts a new guard into it."""
    return train_step(loss, guard=Guard(policy, every=1, patience=100))


class Poison:
    """Batches, models and optimizers with one value that is not finite, in one place."""

    def __init__(self, place: str, value: float, at: int, spot: tuple[int, int] = (1, 1)):
        self.place, self.value, self.at, self.spot = place, jnp.float32(value), at, spot

    def optimizer(self) -> Any:
        return schedule(str(self.value), self.at) if self.place == "schedule" else ADAM

    def batch(self, n: int) -> Any:
        """The n-th batch."""
        here = n == self.at
        rng = np.random.default_rng(n)
        x = rng.normal(size=X.shape).astype(np.float32)
        if here and self.place == "batch":
            x[self.spot] = self.value
        multiply = {place: self.value if here and self.place == place else CLEAN for place in ("loss", "gradient")}
        return x, Y, multiply["loss"], multiply["gradient"]

    def strike(self, n: int, model: Any, optimizer: Any) -> None:
        """What no batch can do: writes into the state before the n-th step."""
        if n == self.at and self.place == "parameter":
            model.first.kernel[...] = model.first.kernel[...].at[self.spot].set(self.value)
        if n == self.at and self.place == "optimizer":
            moment = optimizer.opt_state[0].mu["first"]["kernel"]
            moment[...] = moment[...].at[self.spot].set(self.value)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("policy", ["skip", "rollback", "raise"])
def test_what_is_not_finite_is_caught_at_its_step(policy: Any, place: str, value: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    at = 3 if place == "schedule" else int(rng.integers(1, 5))  # of a schedule it is part of the program
    poison = Poison(place, value, at, (int(rng.integers(X.shape[1])), int(rng.integers(X.shape[1]))))
    model, optimizer = pair(tx=poison.optimizer())
    step = compiled(policy)
    step.extras = Extras(Guard(policy, every=1, patience=100), None, None)
    lasting = place in {"rollback": ("schedule",)}.get(policy, ("parameter", "optimizer"))
    for n in range(6):
        poison.strike(n, model, optimizer)
        before = values(model, optimizer)
        metrics = step(model, optimizer, poison.batch(n))
        assert bool(metrics["verdict"]) == (n == at or (n > at and lasting))
        if n == at and place in ("batch", "loss", "gradient"):
            assert_same(values(model, optimizer), before)
    sound = all(np.isfinite(x).all() for x in values(model, optimizer) if x.dtype.kind == "f")
    assert sound == (policy == "rollback" or place not in ("parameter", "optimizer"))
    assert step.guard is not None
    if policy == "raise":
        with pytest.raises(NonFiniteError, match="skipped"):
            step.guard.check()
        before = values(model, optimizer)
        step(model, optimizer, poison.batch(9))
        assert_same(values(model, optimizer), before)
    else:
        step.guard.check()
        assert step.guard.counts()["rollbacks"] == (policy == "rollback") * (6 - at if lasting else 1)


@pytest.mark.parametrize("place", ["batch", "loss", "gradient"])
def test_a_run_that_skips_a_batch_is_the_run_without_it(place: str) -> None:
    poison = Poison(place, np.nan, 2)
    (one, a), (two, b) = pair(), pair()
    step = compiled("skip")
    step.extras = Extras(Guard("skip", every=1, patience=100), None, None)
    for n in range(5):
        step(one, a, poison.batch(n))
    for n in (0, 1, 3, 4):
        step(two, b, poison.batch(n))
    assert_same(values(one, a), values(two, b))


def test_a_number_that_an_update_would_make_infinite_stays_what_it_was() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.array([[1.0, 2.0], [3.0, 3e38]])
    optimizer = nnx.Optimizer(model, optax.sgd(2e38), wrt=nnx.Param)
    step = train_step(lambda model, batch: -(model.kernel[1, 1] + 1e-38 * model.bias[...].sum()))
    metrics = step(model, optimizer, None)
    assert metrics["verdict"] == 0
    np.testing.assert_array_equal(model.kernel[...], jnp.array([[1.0, 2.0], [3.0, 3e38]]))
    np.testing.assert_allclose(model.bias[...], [2.0, 2.0], rtol=1e-5)


def test_patience_with_a_broken_run_ends() -> None:
    poison = Poison("parameter", np.nan, 0)
    model, optimizer = pair()
    step = train_step(loss, guard=Guard("skip", patience=3))
    poison.strike(0, model, optimizer)
    halts = [bool(step(model, optimizer, poison.batch(n))["halted"]) for n in range(5)]
    assert halts == [False, False, True, True, True]
    assert step.guard is not None
    with pytest.raises(NonFiniteError):
        step.guard.check()
    step.guard.go_on()
    step.guard.check()


def noisy_loss(model: Any, batch: Any) -> Any:
    """A loss of about one, times the batch."""
    return batch[0] * (1 + 0.1 * batch[1] + 0 * model.last.bias[...].sum()) + batch[0] * model.last.bias[...].sum()


@pytest.mark.parametrize("policy", ["skip", "clip", "rollback", "raise"])
def test_spikes_are_found_and_noise_is_not(policy: Any) -> None:
    rng = np.random.default_rng(0)
    model, optimizer = pair(tx=optax.sgd(0.0))
    guard = Guard("skip", policy, window=50)
    step = train_step(noisy_loss, guard=guard)
    spikes = {300, 400, 650}
    found = set()
    for n in range(700):
        metrics = step(model, optimizer, (jnp.float32(10 if n in spikes else 1), jnp.float32(rng.normal())))
        if int(metrics["verdict"]):
            found.add(n)
        if policy == "raise" and n in spikes:
            guard.go_on()
    assert found == spikes
    assert guard.counts()["spikes"] == 3
    assert guard.counts()["clipped"] == (3 if policy == "clip" else 0)
    assert guard.counts()["skipped"] == (0 if policy == "clip" else 3)


def test_a_new_level_is_accepted_after_some_patience() -> None:
    model, optimizer = pair(tx=optax.sgd(0.0))
    step = train_step(noisy_loss, guard=Guard("skip", "skip", window=10, patience=5))
    verdicts = [
        int(step(model, optimizer, (jnp.float32(1 if n < 20 else 10), jnp.float32(0)))["verdict"]) for n in range(40)
    ]
    assert sum(verdicts[:20]) == 0
    assert [n for n, v in enumerate(verdicts) if v] == [20, 21, 22, 23, 24]


def test_a_guard_may_be_switched_off() -> None:
    model, optimizer = pair()
    step = train_step(loss, guard=None)
    metrics = step(model, optimizer, Poison("batch", np.nan, 0).batch(0))
    assert "verdict" not in metrics
    assert not np.isfinite(nnx.as_pure(nnx.state(model, nnx.Param))["last"]["bias"]).all()
