# SPDX-License-Identifier: Apache-2.0
"""Batches and metrics of programs under `jax.pmap`: an axis of devices before all others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from batiste.jax_utils import unreplicate


def shard(xs: Any) -> Any:
    """x[devices · batch, ...] -> x[devices, batch, ...], for every array of a pytree.

    Raises:
        ValueError: the local devices cannot share the batch equally.
    """
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape((devices, -1, *x.shape[1:])), xs)


def shard_prng_key(prng_key: jax.Array) -> jax.Array:
    """A key for each local device."""
    return jax.random.split(prng_key, jax.local_device_count())


def stack_forest(forest: Any) -> Any:
    """Pytrees of x[...] -> one pytree of x[trees, ...]

    >>> stack_forest([{"loss": 1.0}, {"loss": 2.0}])["loss"].tolist()
    [1.0, 2.0]
    """
    return jax.tree.map(lambda *xs: jnp.stack(xs), *forest)


def get_metrics(device_metrics: Any) -> Any:
    """Metrics of several steps, the same on all devices, as one pytree of NumPy arrays x[steps, ...]."""
    return stack_forest(jax.device_get([unreplicate(metrics) for metrics in device_metrics]))


def onehot(labels: jax.Array, num_classes: int, on_value: float = 1.0, off_value: float = 0.0) -> jax.Array:
    """y[..., classes] = on_value where labels[...] == class, else off_value, in float32

    >>> onehot(jnp.array([0, 2]), 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    hot = jnp.expand_dims(labels, -1) == jnp.arange(num_classes).reshape((1,) * labels.ndim + (-1,))
    return jnp.where(hot, on_value, off_value).astype(jnp.float32)
