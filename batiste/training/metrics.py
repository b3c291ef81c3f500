# SPDX-License-Identifier: Apache-2.0
"""Metrics: running figures over the batches of a training or an evaluation.

A metric is an object with `update`, `compute` and `reset`; what it accumulates are Variables of the kind `MetricState`,
so that it passes through transforms as a module does. Sums are kept in float32, counts in int32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from batiste import struct
from batiste.graph import Pytree, Variable, split
from batiste.graph.errors import ArgumentError, ShapeError

__all__ = ["Accuracy", "Average", "Metric", "MetricState", "MultiMetric", "Statistics", "Welford"]


class MetricState(Variable):
    """What a metric accumulates."""


class Metric(Pytree):
    """Base class: a metric overrides `__init__`, `reset`, `update` and `compute`."""

    def __init__(self):
        raise NotImplementedError(
            f"{type(self).__name__} has no __init__() of its own: Metric leaves it to the subclass."
        )

    def reset(self) -> None:
        """Forgets all batches, in place."""
        raise NotImplementedError(f"{type(self).__name__} has no reset() of its own: Metric leaves it to the subclass.")

    def update(self, **kwargs) -> None:
        """Takes a batch into account, in place."""
        raise NotImplementedError(
            f"{type(self).__name__} has no update() of its own: Metric leaves it to the subclass."
        )

    def compute(self) -> Any:
        """The figure over all batches since the last reset."""
        raise NotImplementedError(
            f"{type(self).__name__} has no compute() of its own: Metric leaves it to the subclass."
        )

    def split(self, *filters):
        """Cuts the metric into `(graphdef, *states)`."""
        return split(self, *filters)


class Average(Metric):
    """average = Σ mask · values / Σ mask, over all elements of all batches

    Args:
        argname: the keyword of `update` that brings the values.

    >>> loss = Average()
    >>> loss.update(values=jnp.array([1, 2, 3, 4]))
    >>> float(loss.compute())
    2.5
    """

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.total = MetricState(jnp.array(0, dtype=jnp.float32))
        self.count = MetricState(jnp.array(0, dtype=jnp.int32))

    def reset(self) -> None:
        self.total[...] = jnp.array(0, dtype=jnp.float32)
        self.count[...] = jnp.array(0, dtype=jnp.int32)

    def update(self, mask: jax.Array | None = None, **kwargs) -> None:
        """Takes the elements of `kwargs[argname]` into account, each weighted by `mask`.

        Raises:
            TypeError: there is no such keyword.
            ShapeError: the mask cannot be broadcast to the values.
        """
        values, weights = _masked(_argument(kwargs, self.argname, self), mask, self)
        self.total[...] += _sum(values if weights is None else weights * values)
        self.count[...] += values.size if weights is None else _sum(weights).astype(jnp.int32)

    def compute(self) -> jax.Array:
        return self.total[...] / self.count[...]


class Accuracy(Average):
    """accuracy = the mean of argmax(logits[..., class]) == labels[...]

    Args:
        threshold: with it, the task is binary, and the mean is that of (logits[...] > threshold) == labels[...].

    >>> accuracy = Accuracy()
    >>> accuracy.update(logits=jnp.array([[0.1, 0.9], [0.2, 0.8]]), labels=jnp.array([1, 0]))
    >>> float(accuracy.compute())
    0.5
    """

    def __init__(self, threshold: float | None = None, *args, **kwargs):
        if threshold is not None and not isinstance(threshold, float):
            raise TypeError(f"Expected threshold to be a float, got {type(threshold)}")
        self.threshold = threshold
        super().__init__(*args, **kwargs)

    def update(self, *, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, **_) -> None:  # type: ignore[override]
        """Takes the predictions of a batch into account, each weighted by `mask`.

        Raises:
            ArgumentError: the labels are no integers.
            ShapeError: logits, labels and mask do not fit together.
        """
        logits, labels = jnp.asarray(logits), jnp.asarray(labels)
        threshold = self.threshold
        binary = threshold is not None
        if logits.ndim != labels.ndim + (not binary):
            raise ShapeError(
                f"For {'binary' if binary else 'multi-class'} classification, expected "
                f"logits.ndim=={'labels.ndim' if binary else 'labels.ndim+1'}, got {logits.ndim} and {labels.ndim}",
                at=type(self).__name__,
                got=f"logits {logits.shape}, labels {labels.shape}",
                fix="leave out threshold= where the logits have a dim of classes"
                if binary
                else "pass class numbers, as jnp.argmax(one_hot, axis=-1), or threshold= for a yes or no per logit",
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ArgumentError(
                f"Expected labels.dtype==jnp.int32, got {labels.dtype}",
                at=type(self).__name__,
                fix="pass class numbers, such as jnp.argmax(one_hot, axis=-1)",
            )
        predicted = (logits > threshold).astype(jnp.int32) if threshold is not None else logits.argmax(axis=-1)
        if predicted.shape != labels.shape:
            raise ShapeError(
                "Labels do not fit the logits",
                at=type(self).__name__,
                got=f"labels {labels.shape}",
                expected=f"{predicted.shape} for logits {logits.shape}",
            )
        super().update(**{self.argname: predicted == labels.astype(predicted.dtype)}, mask=mask)


@struct.dataclass
class Statistics:
    """What `Welford` computes."""

    mean: Any
    standard_error_of_mean: Any
    standard_deviation: Any


class Welford(Metric):
    """Mean, standard deviation √(m2 / n) and standard error σ / √n of all elements, without keeping them.

    Args:
        argname: the keyword of `update` that brings the values.

    Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
        eq. 2.1.
    """

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.count = MetricState(jnp.array(0, dtype=jnp.int32))
        self.mean = MetricState(jnp.array(0, dtype=jnp.float32))
        self.m2 = MetricState(jnp.array(0, dtype=jnp.float32))

    def reset(self) -> None:
        self.count[...] = jnp.array(0, dtype=jnp.int32)
        self.mean[...] = jnp.array(0, dtype=jnp.float32)
        self.m2[...] = jnp.array(0, dtype=jnp.float32)

    def update(self, mask: jax.Array | None = None, **kwargs) -> None:
        """Takes the elements of `kwargs[argname]` into account, each weighted by `mask`.

        Raises:
            TypeError: there is no such keyword.
            ShapeError: the mask cannot be broadcast to the values.
        """
        values, weights = _masked(_argument(kwargs, self.argname, self), mask, self)
        if values.size == 0:
            return
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        before = self.count[...]
        if weights is None:
            n, mean, m2 = values.size, values.mean(), values.var() * values.size
        else:
            n = _sum(weights).astype(jnp.int32)
            mean = _sum(weights * values) / jnp.maximum(n, 1)
            m2 = _sum(weights * jnp.square(values - mean))
        after = jnp.maximum(before + n, 1)
        delta = mean - self.mean[...]
        self.count[...] = before + n
        self.mean[...] += (delta * n / after).astype(jnp.float32)
        self.m2[...] += (m2 + delta * delta * before * n / after).astype(jnp.float32)

    def compute(self) -> Statistics:
        deviation = jnp.sqrt(self.m2[...] / self.count[...])
        return Statistics(
            mean=self.mean[...],
            standard_error_of_mean=deviation / jnp.sqrt(self.count[...]),
            standard_deviation=deviation,
        )


class MultiMetric(Metric):
    """Several metrics under names, updated by one call.

    >>> metrics = MultiMetric(loss=Average("loss"), accuracy=Accuracy())
    >>> metrics.update(loss=0.5, logits=jnp.array([[0.1, 0.9]]), labels=jnp.array([1]))
    >>> {name: float(value) for name, value in metrics.compute().items()}
    {'loss': 0.5, 'accuracy': 1.0}
    """

    def __init__(self, **metrics):
        self._metric_names = tuple(metrics)
        for name, metric in metrics.items():
            if hasattr(Metric, name):
                raise ArgumentError(f"A metric cannot be called {name!r}, which is a method", fix="choose another name")
            setattr(self, name, metric)

    def reset(self) -> None:
        for name in self._metric_names:
            getattr(self, name).reset()

    def update(self, **updates) -> None:
        """Passes all keywords to every metric.

        `mask` may be one mask for all, or a dict from a metric's name to its mask.
        """
        mask = updates.pop("mask", None)
        for name in self._metric_names:
            own = mask.get(name) if isinstance(mask, dict) else mask
            getattr(self, name).update(**updates, **({} if own is None else {"mask": own}))

    def compute(self) -> dict[str, Any]:
        return {name: getattr(self, name).compute() for name in self._metric_names}


def _argument(kwargs: dict[str, Any], name: str, metric: Metric) -> Any:
    if name not in kwargs:
        raise TypeError(
            f"Expected keyword argument '{name}'\n  Fix: call update({name}=...), or name another with "
            f"{type(metric).__name__}(argname=...)"
        )
    return kwargs[name]


def _masked(values: Any, mask: Any, metric: Metric) -> tuple[jax.Array, jax.Array | None]:
    """The values and their weights; where the weight is 0 the value is made 0, for it may be a NaN."""
    if mask is None:
        return jnp.asarray(values), None
    if not hasattr(values, "shape"):
        raise ArgumentError(
            "If mask is provided, values should be a jax array", at=type(metric).__name__, got=type(values).__name__
        )
    values, mask = jnp.asarray(values), jnp.asarray(mask)
    if mask.ndim > values.ndim or any(m not in (1, v) for m, v in zip(mask.shape[::-1], values.shape[::-1])):
        raise ShapeError(
            "Incompatible shapes for broadcasting the mask",
            at=type(metric).__name__,
            got=mask.shape,
            expected=values.shape,
        )
    weights = jnp.broadcast_to(mask, values.shape)
    return jnp.where(weights == 0, jnp.zeros_like(values), values), weights


def _sum(values: jax.Array) -> jax.Array:
    """The sum in float32; integers and booleans are first added exactly."""
    if jnp.issubdtype(values.dtype, jnp.inexact):
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return values.sum().astype(jnp.float32)
