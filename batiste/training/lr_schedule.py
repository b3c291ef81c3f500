# SPDX-License-Identifier: Apache-2.0
"""Learning rates by step: constant, stepped or cosine, each with a linear warm-up counted in epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]


def _warmed_up(rate: Any, epoch: Any, warmup_length: float) -> Any:
    return rate * jnp.minimum(1.0, epoch / warmup_length) if warmup_length > 0.0 else rate


def create_constant_learning_rate_schedule(
    base_learning_rate: float, steps_per_epoch: int, warmup_length: float = 0.0
) -> Schedule:
    """rate = base · min(1, epoch / warmup_length)

    >>> create_constant_learning_rate_schedule(0.5, steps_per_epoch=10)(3)
    0.5
    """

    def rate(step):
        return _warmed_up(base_learning_rate, step / steps_per_epoch, warmup_length)

    return rate


def create_stepped_learning_rate_schedule(
    base_learning_rate: float,
    steps_per_epoch: int,
    lr_sched_steps: Sequence[Sequence[float]],
    warmup_length: float = 0.0,
) -> Schedule:
    """rate = base · factorᵢ · min(1, epoch / warmup_length), i the last with epoch > epochᵢ

    Args:
        lr_sched_steps: pairs `(epoch, factor)`, in order; the factor before the first is 1.

    >>> rate = create_stepped_learning_rate_schedule(0.5, 10, [(1, 0.5)])
    >>> rate(10).item(), rate(11).item()
    (0.5, 0.25)
    """
    ends = np.array([epoch for epoch, _ in lr_sched_steps]) * steps_per_epoch
    rates = jnp.array([base_learning_rate * factor for factor in (1.0, *(factor for _, factor in lr_sched_steps))])

    def rate(step):
        return _warmed_up(rates[jnp.sum(step > ends)], step / steps_per_epoch, warmup_length)

    return rate


def create_cosine_learning_rate_schedule(
    base_learning_rate: float, steps_per_epoch: int, halfcos_epochs: float, warmup_length: float = 0.0
) -> Schedule:
    """rate = base · (1 + cos(π · epoch / halfcos_epochs)) / 2 · min(1, epoch / warmup_length)

    >>> round(create_cosine_learning_rate_schedule(0.5, 10, halfcos_epochs=4)(20).item(), 6)
    0.25

    Source: Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", eq. 5, without restarts.
    """

    def rate(step):
        epoch = step / steps_per_epoch
        cosine = base_learning_rate * (0.5 * (jnp.cos(epoch * jnp.pi / halfcos_epochs) + 1))
        return _warmed_up(cosine, epoch, warmup_length)

    return rate
