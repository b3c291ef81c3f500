# SPDX-License-Identifier: Apache-2.0
"""Small states of every sort for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.checkpoint.leaves import Leaves


class Net(nnx.Module):
    """Parameters, statistics, random streams, tied weights, an array and a number."""

    def __init__(self, seed: int, width: int = 3):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(2, width, rngs=rngs), nnx.BatchNorm(width, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[0].kernel
        self.table = nnx.data(jnp.full(3, float(seed)))
        self.scale = nnx.data(float(seed))


def run_state(seed: int) -> dict[str, Any]:
    """What a program keeps: a model and its optimizer, keys, numbers, text, narrow floats, empty and host arrays."""
    model = Net(seed)
    return {
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "step": seed,
        "big": 2**80 + seed,
        "best": float("inf") if seed else 0.0,
        "name": "ü" * seed,
        "done": bool(seed % 2),
        "phase": complex(seed, -1),
        "narrow": (
            jnp.full((2, 3), seed, jnp.bfloat16),
            jnp.full(2, seed, jnp.float8_e4m3fn),
            jnp.full(3, seed % 4, jnp.int4),
        ),
        "host": np.full((2, 2), seed, np.float64),
        "scalar": np.float32(seed),
        "empty": jnp.zeros((0, 3)),
        "nothing": None,
    }


def bits(tree: Any) -> dict[str, tuple]:
    """Every leaf in a form that compares exactly."""

    def exact(x: Any) -> tuple:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return (str(x.dtype), np.asarray(jax.random.key_data(x)).tobytes())
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return (type(x).__name__, str(x.dtype), x.shape, np.asarray(x).tobytes())
        return (type(x), x)

    return {name: exact(x) for name, x in Leaves(tree).values.items()}
