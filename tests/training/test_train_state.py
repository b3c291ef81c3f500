# SPDX-License-Identifier: Apache-2.0
"""TrainState, EarlyStopping, learning rates, loss scales, batches by device and prefetching."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste.serialization import from_bytes, to_bytes
from batiste.training import common_utils, lr_schedule
from batiste.training.dynamic_scale import DynamicScale
from batiste.training.early_stopping import EarlyStopping
from batiste.training.prefetch_iterator import PrefetchIterator
from batiste.training.train_state import TrainState

# ---------------------------------------------------------------- TrainState


def quadratic(params: Any) -> jax.Array:
    return jnp.sum(params["w"] ** 2)


def test_a_step_under_jit_moves_parameters_and_step() -> None:
    state = TrainState.create(apply_fn=quadratic, params={"w": jnp.ones(2)}, tx=optax.sgd(0.25, momentum=0.5))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(state.apply_fn)(state.params))

    state = step(state)
    np.testing.assert_allclose(state.params["w"], 0.5)
    assert state.step == 1
    np.testing.assert_allclose(step(state).params["w"], 0.5 - 0.25 * (2 * 0.5 + 0.5 * 2.0))


def test_fields_of_a_subclass_and_fields_given_with_the_gradients() -> None:
    class WithStatistics(TrainState):
        statistics: Any

    state = WithStatistics.create(apply_fn=None, params={"w": 1.0}, tx=optax.sgd(0.5), statistics=3)
    assert state.apply_gradients(grads={"w": 1.0}, statistics=4).statistics == 4
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        state.apply_gradients(grads={"w": 1.0}, other=4)


def test_parameters_that_are_overwritten_by_their_gradient() -> None:
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.5, momentum=0.9))
    assert jax.tree.structure(state.opt_state[0].trace) == jax.tree.structure({"w": 0})
    grads = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.full(1, 9.0)}}
    after = state.apply_gradients(grads=grads).params
    assert after["params"]["w"].tolist() == [0.5, 0.5] and after["_overwrite_with_gradient"]["scale"].tolist() == [9.0]


def test_bytes_of_a_train_state() -> None:
    empty = TrainState.create(apply_fn=quadratic, params={"w": jnp.ones(2)}, tx=optax.adam(0.1))
    state = empty.apply_gradients(grads={"w": jnp.ones(2)})
    restored = from_bytes(empty, to_bytes(state))
    assert restored.step == 1 and restored.apply_fn is quadratic
    jax.tree.map(np.testing.assert_array_equal, restored, state)


# ---------------------------------------------------------------- EarlyStopping


def test_stops_after_more_than_patience_updates_without_progress() -> None:
    stopping = EarlyStopping(min_delta=0.1, patience=1)
    seen = []
    for metric in (1.0, 0.95, 0.8, 0.8, 0.79, 0.78):
        stopping = stopping.update(metric)
        seen.append((stopping.has_improved, stopping.patience_count, stopping.should_stop))
    improved, counts, stop = zip(*seen)
    assert improved == (True, False, True, False, False, False)
    assert counts == (0, 1, 0, 1, 2, 3)
    assert stop == (False, False, False, False, True, True)
    assert stopping.best_metric == 0.8
    assert stopping.reset() == EarlyStopping(min_delta=0.1, patience=1)


def test_a_metric_that_is_no_number_is_no_progress() -> None:
    assert EarlyStopping(best_metric=1.0).update(float("nan")).should_stop


# ---------------------------------------------------------------- learning rates

RATES = {
    "constant": (lr_schedule.create_constant_learning_rate_schedule(0.5, 10), [0.5, 0.5, 0.5]),
    "warm-up": (lr_schedule.create_constant_learning_rate_schedule(0.5, 10, 2.0), [0.0, 0.25, 0.5]),
    "steps": (lr_schedule.create_stepped_learning_rate_schedule(0.5, 10, [(0.5, 0.5), (1.5, 0.1)]), [0.5, 0.25, 0.05]),
    "cosine": (lr_schedule.create_cosine_learning_rate_schedule(0.5, 10, 2.0), [0.5, 0.25, 0.0]),
    "warm cosine": (lr_schedule.create_cosine_learning_rate_schedule(0.5, 10, 2.0, 4.0), [0.0, 0.0625, 0.0]),
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_by_step_also_under_jit(name) -> None:
    rate, expected = RATES[name]
    for compiled in (rate, jax.jit(rate)):
        np.testing.assert_allclose([compiled(step) for step in (0, 10, 20)], expected, atol=1e-7)


# ---------------------------------------------------------------- DynamicScale


def test_the_scale_grows_after_an_interval_and_shrinks_when_gradients_overflow() -> None:
    scaler = DynamicScale(growth_interval=2, scale=8.0)
    scales, finite = [], []
    for x in (1.0, 1.0, 1.0, jnp.inf, 1.0):
        scaler, ok, loss, grad = scaler.value_and_grad(lambda x: x * x)(x)
        scales.append(float(scaler.scale))
        finite.append(bool(ok))
    assert scales == [8.0, 8.0, 16.0, 8.0, 8.0]
    assert finite == [True, True, True, False, True]
    assert (loss, grad, scaler.fin_steps) == (1.0, 2.0, 1)


def test_half_precision_gradients_that_would_vanish_survive() -> None:
    def loss(x):
        return 1e-4 * (1e-4 * x)

    x = jnp.float16(1)
    assert jax.grad(loss)(x) == 0
    _, finite, _, grad = jax.jit(lambda x: DynamicScale(scale=2.0**12).value_and_grad(loss)(x))(x)
    assert finite and grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, 1e-8, rtol=0.01)


@pytest.mark.parametrize(("least", "after"), [(0.75, 0.75), (None, 0.5)])
def test_the_scale_has_a_least_value(least, after) -> None:
    scaler = DynamicScale(scale=1.0, minimum_scale=least)
    assert scaler.value_and_grad(lambda x: x * x)(jnp.nan).dynamic_scale.scale == after


def test_mapped_gradients_are_averaged_and_overflow_everywhere() -> None:
    step = DynamicScale(scale=8.0).value_and_grad(lambda x: x * x, axis_name="devices")
    result = jax.vmap(step, axis_name="devices")(jnp.array([1.0, 3.0]))
    assert result.grad.tolist() == [4.0, 4.0] and result.aux.tolist() == [1.0, 9.0]
    assert jax.vmap(step, axis_name="devices")(jnp.array([1.0, jnp.inf])).finite.tolist() == [False, False]


def test_auxiliary_values_and_several_arguments() -> None:
    step = DynamicScale().value_and_grad(lambda x, y: (x * y, "aux"), argnums=(0, 1), has_aux=True)
    _, _, (loss, aux), grads = step(2.0, 3.0)
    assert (loss, aux, grads) == (6.0, "aux", (3.0, 2.0))


# ---------------------------------------------------------------- batches by device


def test_shards_keys_and_metrics() -> None:
    devices = jax.local_device_count()
    shards = common_utils.shard({"x": np.arange(2 * devices * 3).reshape(2 * devices, 3)})
    assert shards["x"].shape == (devices, 2, 3)
    assert common_utils.shard_prng_key(jax.random.key(0)).shape == (devices,)
    steps = [jax.pmap(lambda x, step: {"loss": x.sum() * 0 + step}, in_axes=(0, None))(shards["x"], i) for i in (1, 2)]
    metrics = common_utils.get_metrics(steps)
    assert metrics["loss"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="reshape"):
        common_utils.shard(np.zeros((devices + 1, 2)))


def test_one_hot_with_other_values_and_labels_out_of_range() -> None:
    hot = common_utils.onehot(jnp.array([[0, 5]]), 3, on_value=2, off_value=-1)
    assert hot.tolist() == [[[2, -1, -1], [-1, -1, -1]]] and hot.dtype == jnp.float32


# ---------------------------------------------------------------- PrefetchIterator


@pytest.mark.filterwarnings("ignore:PrefetchIterator:DeprecationWarning")
def test_prefetching_keeps_order_errors_and_ends_when_closed() -> None:
    def source():
        yield 1
        raise KeyError("broken")

    assert list(PrefetchIterator(range(5), 2)) == [0, 1, 2, 3, 4]
    items = PrefetchIterator(source())
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            next(items)
    endless = PrefetchIterator(iter(lambda: 1, 2))
    assert next(endless) == 1
    endless.close()
    assert list(endless) == []


@pytest.mark.filterwarnings("ignore:PrefetchIterator:DeprecationWarning")
def test_no_more_is_fetched_than_fits_the_buffer() -> None:
    fetched, third = [], threading.Event()

    def source():
        for i in range(10):
            fetched.append(i)
            if i == 2:
                third.set()
            yield i

    items = PrefetchIterator(source(), 2)
    assert third.wait(5)  # two in the buffer, one in the hand
    assert fetched == [0, 1, 2]
    items.close()


def test_prefetching_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="PrefetchIterator is deprecated"):
        PrefetchIterator([]).close()
