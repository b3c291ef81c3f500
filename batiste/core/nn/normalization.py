# SPDX-License-Identifier: Apache-2.0
"""Normalisation as functions of a scope; the modules of `batiste.linen` do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from batiste import linen
from batiste.linen.lift import swap_collection
from batiste.linen.scope import Scope
from batiste.nn.initializers import Initializer, ones, zeros

from .linear import run

__all__ = ["batch_norm", "group_norm", "layer_norm"]


def batch_norm(scope: Scope, x: Array, use_running_average: bool = False, axis: int | Sequence[int] = -1,
               momentum: float = 0.99, epsilon: float = 1e-5, dtype: Any = jnp.float32, bias: bool = True,
               scale: bool = True, bias_init: Initializer = zeros, scale_init: Initializer = ones,
               axis_name: str | None = None, axis_index_groups: Any = None,
               kind: str = "batch_stats") -> Array:  # fmt: skip
    """y[..., c] = (x[..., c] - mean[c]) / √(var[c] + ε) * scale[c] + bias[c]; see `batiste.linen.BatchNorm`

    Args:
        kind: the collection that holds the moments.
    """
    settings = dict(use_running_average=use_running_average, axis=axis, momentum=momentum, epsilon=epsilon, dtype=dtype,
                    use_bias=bias, use_scale=scale, bias_init=bias_init, scale_init=scale_init, axis_name=axis_name,
                    axis_index_groups=axis_index_groups)  # fmt: skip
    normalize = lambda scope: run(linen.BatchNorm, scope, settings, x)
    return normalize(scope) if kind == "batch_stats" else swap_collection(normalize, kind, "batch_stats")(scope)


def layer_norm(scope: Scope, x: Array, epsilon: float = 1e-6, dtype: Any = jnp.float32, bias: bool = True,
               scale: bool = True, bias_init: Initializer = zeros,
               scale_init: Initializer = ones) -> Array:  # fmt: skip
    """y = (x - mean) / √(var + ε) * scale + bias over the last dim; see `batiste.linen.LayerNorm`"""
    settings = dict(epsilon=epsilon, dtype=dtype, use_bias=bias, use_scale=scale, bias_init=bias_init,
                    scale_init=scale_init)  # fmt: skip
    return run(linen.LayerNorm, scope, settings, x)


def group_norm(scope: Scope, x: Array, num_groups: int | None = 32, group_size: int | None = None,
               epsilon: float = 1e-6, dtype: Any = jnp.float32, bias: bool = True, scale: bool = True,
               bias_init: Initializer = zeros, scale_init: Initializer = ones) -> Array:  # fmt: skip
    """y = (x - mean) / √(var + ε) * scale + bias over a group of features and space; see `batiste.linen.GroupNorm`"""
    settings = dict(num_groups=num_groups, group_size=group_size, epsilon=epsilon, dtype=dtype, use_bias=bias,
                    use_scale=scale, bias_init=bias_init, scale_init=scale_init)  # fmt: skip
    return run(linen.GroupNorm, scope, settings, x)
