# SPDX-License-Identifier: Apache-2.0
"""Activations: JAX's functions under their own names, and those that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
    tanh,
)
from jax.typing import DTypeLike

from batiste.graph import Module, Param, make
from batiste.precision import promote_dtype


class PReLU(Module):
    """y[...] = x[...] where x >= 0, else negative_slope * x[...]; the slope is one learnt number.

    The slope is cast to the dtype of `x`, so that the activation keeps it, unless `dtype` is given.

    >>> PReLU(0.5)(jnp.array([-2.0, 3.0]))
    Array([-1.,  3.], dtype=float32)

    Source: He et al. 2015, "Delving Deep into Rectifiers", eq. 1.
    """

    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        promote_dtype: Callable[..., Any] = promote_dtype,
        negative_slope_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        def fill(key, shape, dtype):
            return jnp.asarray(negative_slope_init, dtype)

        self.negative_slope = make(Param, fill, (), param_dtype, metadata=negative_slope_metadata)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: Array) -> Array:
        x, slope = jnp.asarray(inputs), self.negative_slope[...]
        if self.dtype is None:
            slope = slope.astype(x.dtype)
        else:
            x, slope = self.promote_dtype((x, slope), dtype=self.dtype)
        return jnp.where(x >= 0, x, slope * x)


__all__ = [
    "PReLU",
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "tanh",
]
