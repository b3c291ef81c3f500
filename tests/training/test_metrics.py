# SPDX-License-Identifier: Apache-2.0
"""Metrics: formulas against NumPy on whole data sets, masks, resets, transforms and wrong input."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.training.metrics import Accuracy, Average, Metric, MetricState, MultiMetric, Statistics, Welford

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=shape).astype(np.float32) for shape in ((4,), (2, 3), (), (1, 1, 5))]
MASKS = [RNG.integers(0, 2, batch.shape).astype(bool) for batch in BATCHES]
ALL = np.concatenate([batch.ravel() for batch in BATCHES])
CHOSEN = np.concatenate([batch[mask] for batch, mask in zip(BATCHES, MASKS)])


def updated(metric, masked=False):
    for batch, mask in zip(BATCHES, MASKS):
        metric.update(values=jnp.asarray(batch), **({"mask": jnp.asarray(mask)} if masked else {}))
    return metric


@pytest.mark.parametrize(("masked", "data"), [(False, ALL), (True, CHOSEN)])
def test_batches_together_are_the_whole(masked, data):
    np.testing.assert_allclose(updated(Average(), masked).compute(), data.mean(), rtol=1e-5)
    got = updated(Welford(), masked).compute()
    np.testing.assert_allclose(got.mean, data.mean(), rtol=1e-5)
    np.testing.assert_allclose(got.standard_deviation, data.std(), rtol=1e-5)
    np.testing.assert_allclose(got.standard_error_of_mean, data.std() / math.sqrt(len(data)), rtol=1e-5)


@pytest.mark.parametrize("metric", [Average(), Welford(), Accuracy()])
def test_reset_forgets_everything(metric):
    before = jax.tree.leaves(metric)
    if isinstance(metric, Accuracy):
        metric.update(logits=jnp.eye(2), labels=jnp.array([0, 1]))
    else:
        metric.update(values=jnp.arange(3))
    assert any(np.any(a != b) for a, b in zip(before, jax.tree.leaves(metric)))
    metric.reset()
    for a, b in zip(before, jax.tree.leaves(metric)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_without_data_there_is_no_number():
    assert jnp.isnan(Average().compute())
    assert jnp.isnan(Accuracy().compute())
    got = Welford().compute()
    assert got.mean == 0
    assert jnp.isnan(got.standard_deviation)
    assert jnp.isnan(got.standard_error_of_mean)


@pytest.mark.parametrize("values", [2, 2.0, True, np.float64(2), np.arange(3), jnp.ones((2, 2), jnp.bfloat16)])
def test_sums_are_float32_and_counts_int32_whatever_comes_in(values):
    metric = Average("loss")
    metric.update(loss=values)
    assert metric.total[...].dtype == jnp.float32
    assert metric.count[...].dtype == jnp.int32
    np.testing.assert_allclose(metric.compute(), np.mean(np.asarray(values, np.float32)))


def test_low_precision_is_summed_in_float32():
    metric = Average()
    metric.update(values=jnp.ones(1000, jnp.bfloat16))
    metric.update(values=jnp.ones(1, jnp.bfloat16))
    assert metric.total[...] == 1001


def test_a_masked_nan_does_not_matter_and_a_mask_is_broadcast_before_it_is_counted():
    values = jnp.array([[1.0, jnp.nan], [3.0, jnp.nan]])
    metric, spread = Average(), Welford()
    metric.update(values=values, mask=jnp.array([True, False]))
    spread.update(values=values, mask=jnp.array([True, False]))
    assert metric.compute() == 2
    assert metric.count[...] == 2
    assert spread.compute().standard_deviation == 1


def test_an_empty_or_fully_masked_batch_changes_nothing():
    for metric in (Average(), Welford()):
        metric.update(values=jnp.array([1.0, 3.0]))
        before = jax.tree.leaves(metric)
        metric.update(values=jnp.zeros((0,)))
        metric.update(values=jnp.ones(2), mask=jnp.zeros(2))
        for a, b in zip(before, jax.tree.leaves(metric)):
            np.testing.assert_array_equal(a, b)


def test_accuracy_counts_the_largest_logit_or_those_above_a_threshold():
    metric = Accuracy()
    metric.update(logits=jnp.array([[1.0, 2.0], [3.0, 1.0]]), labels=jnp.array([1, 1], jnp.uint8))
    assert metric.compute() == 0.5
    metric.update(
        logits=jnp.zeros((2, 3, 4)), labels=jnp.zeros((2, 3), jnp.int32), mask=jnp.array([[1, 1, 0], [0, 0, 0]])
    )
    assert metric.compute() == 3 / 4
    binary = Accuracy(threshold=0.5)
    binary.update(logits=jnp.array([0.4, 0.6, 0.5]), labels=jnp.array([0, 1, 1]))
    np.testing.assert_allclose(binary.compute(), 2 / 3)


def test_attributes_stand_in_the_order_of_their_names_on_paper():
    assert list(vars(Average())) == ["argname", "total", "count"]
    assert list(vars(Accuracy())) == ["threshold", "argname", "total", "count"]
    assert list(vars(Welford())) == ["argname", "count", "mean", "m2"]
    assert all(isinstance(v, MetricState) for v in (Average().total, Welford().m2))


def test_multi_metric_passes_all_keywords_on():
    metrics = MultiMetric(loss=Average("loss"), accuracy=Accuracy(), spread=Welford("loss"))
    metrics.update(loss=jnp.array([1.0, 3.0]), logits=jnp.eye(2), labels=jnp.array([0, 0]))
    assert metrics.compute()["loss"] == 2
    assert metrics.compute()["accuracy"] == 0.5
    assert metrics.compute()["spread"] == Statistics(2, jnp.sqrt(0.5), 1)
    metrics.reset()
    assert jnp.isnan(metrics.compute()["loss"])


def test_multi_metric_gives_each_its_own_mask():
    metrics = MultiMetric(a=Average("x"), b=Average("x"))
    metrics.update(x=jnp.array([1.0, 3.0]), mask={"a": jnp.array([True, False])})
    assert metrics.compute() == {"a": 1, "b": 2}
    metrics.update(x=jnp.array([5.0, 3.0]), mask=jnp.array([True, False]))
    assert metrics.compute() == {"a": 3, "b": 3}


def test_metrics_nest_and_are_split_and_merged():
    metrics = MultiMetric(train=MultiMetric(loss=Average()))
    graphdef, state = metrics.split(MetricState)
    nnx.merge(graphdef, state).update(values=jnp.ones(3))
    assert metrics.compute() == {"train": {"loss": 1}}  # the state holds the same Variables


def test_a_metric_is_updated_inside_jit():
    metrics = MultiMetric(loss=Average(), spread=Welford())

    @nnx.jit
    def step(metrics, x):
        metrics.update(values=x)

    for x in (jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])):
        step(metrics, x)
    assert metrics.compute()["loss"] == 3
    np.testing.assert_allclose(metrics.compute()["spread"].standard_deviation, np.std([1, 2, 3, 6]), rtol=1e-6)


def test_statistics_are_a_frozen_pytree():
    doubled = jax.tree.map(lambda x: 2 * x, Statistics(1, 2, 3).replace(mean=5))
    assert doubled == Statistics(10, 4, 6)


def test_the_base_class_asks_for_its_methods():
    class Half(Metric):
        def __init__(self):
            """Nothing to keep."""

    with pytest.raises(NotImplementedError, match="__init__"):
        Metric()
    for call in (Half().reset, Half().update, Half().compute):
        with pytest.raises(NotImplementedError, match=call.__name__):
            call()


WRONG = [
    (lambda: Average("loss").update(x=1), TypeError, "Expected keyword argument 'loss'"),
    (lambda: Welford().update(), TypeError, "Expected keyword argument 'values'"),
    (lambda: Average().update(values=1.0, mask=jnp.array(True)), ArgumentError, "values should be a jax array"),
    (lambda: Average().update(values=jnp.ones((2, 3)), mask=jnp.ones(2)), ShapeError, r"got \(2,\), expected \(2, 3\)"),
    (lambda: Average().update(values=jnp.ones(3), mask=jnp.ones((2, 3))), ShapeError, r"got \(2, 3\), expected \(3,\)"),
    (lambda: Accuracy(threshold=1), TypeError, "Expected threshold to be a float"),
    (lambda: Accuracy().update(logits=jnp.ones((3, 2)), labels=jnp.ones(3)), ArgumentError, "labels.dtype.*float32"),
    (
        lambda: Accuracy().update(logits=jnp.ones((3, 2)), labels=jnp.ones(2, int)),
        ShapeError,
        r"labels \(2,\), expected \(3,\)",
    ),
    (
        lambda: Accuracy().update(logits=jnp.ones(3), labels=jnp.ones(3, int)),
        ShapeError,
        "multi-class classification, expected logits.ndim==labels.ndim",
    ),
    (
        lambda: Accuracy(0.5).update(logits=jnp.ones((3, 2)), labels=jnp.ones(3, int)),
        ShapeError,
        "binary classification, expected logits.ndim==labels.ndim",
    ),
    (lambda: MultiMetric(update=Average()), ArgumentError, "cannot be called 'update'"),
]


@pytest.mark.parametrize(("call", "error", "words"), WRONG)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
