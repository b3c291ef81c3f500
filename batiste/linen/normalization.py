# SPDX-License-Identifier: Apache-2.0
"""Normalisation of activations and of weights, in the functional face."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste import nn
from batiste.nn import initializers
from batiste.nn.initializers import Initializer
from batiste.nn.linear import as_tuple
from batiste.nn.moments import Average
from batiste.precision import canonicalize_dtype
from batiste.typing import Dtype, PRNGKey, Shape

from .calls import merge_param
from .lazy import Lazy
from .module import Module, compact, nowrap
from .reparam import SpectralNorm, WeightNorm

__all__ = [
    "BatchNorm",
    "Dtype",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Module",
    "PRNGKey",
    "RMSNorm",
    "Shape",
    "SpectralNorm",
    "WeightNorm",
    "canonicalize_dtype",
]

Axes = int | Sequence[int]
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def _as_they_are(arrays: tuple[Any, ...], /, **_: Any) -> tuple[Any, ...]:
    """No casts before the moments are taken: only the result is of the layer's `dtype`."""
    return arrays


class _Norm(Lazy):
    """What the normalising layers share: the shape of their variables in the scope."""

    @nowrap
    def normalize(
        self, x: Array, axes: Axes, *args: Any, settings: Mapping[str, Any] = NO_SETTINGS, **kwargs: Any
    ) -> Array:
        """Runs the layer; its variables have the sizes of `x` on `axes`, each as a dim of its own."""
        shape = tuple(x.shape[axis] for axis in sorted(axis % x.ndim for axis in as_tuple(axes)))
        size = math.prod(shape)
        names = ("scale", "bias", "mean", "var")
        shapes: dict[str, tuple[int, ...]] = {name: shape for name in names if len(shape) > 1}
        settings = self.settings(num_features=size, promote_dtype=_as_they_are, **settings)
        options = {"force_float32_reductions": self.force_float32_reductions}  # type: ignore[attr-defined]
        return self.run(settings, x, *args, shapes=shapes, options=options, **kwargs)


class BatchNorm(_Norm, of=nn.BatchNorm):
    """y[..., c] = (x[..., c] - mean[c]) / √(var[c] + ε) * scale[c] + bias[c]; see `batiste.nn.BatchNorm`

    Args:
        use_running_average: use the stored moments (evaluation); given here or in the call. While a model is
            initialised the batch's are used and none is stored.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        stored = merge_param("use_running_average", self.use_running_average, use_running_average)
        mapped = None if self.is_initializing() else self.axis_name  # nothing need be mapped to make the variables
        settings = {"use_running_average": stored, "axis_name": mapped}
        return self.normalize(x, self.axis, mask=mask, settings=settings)


class LayerNorm(_Norm, of=nn.LayerNorm):
    """y = (x - mean) / √(var + ε) * scale + bias, moments over the features of each entry

    See `batiste.nn.LayerNorm`.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, self.feature_axes, mask=mask)


class RMSNorm(_Norm, of=nn.RMSNorm):
    """y = x / √(E[x²] + ε) * scale, the mean square over the features of each entry; see `batiste.nn.RMSNorm`"""

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, self.feature_axes, mask=mask)


class GroupNorm(_Norm, of=nn.GroupNorm):
    """y = (x - mean) / √(var + ε) * scale + bias, moments over a group of features and space

    See `batiste.nn.GroupNorm`.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, -1, mask=mask)


class InstanceNorm(_Norm, of=nn.InstanceNorm):
    """y = (x - mean) / √(var + ε) * scale + bias, moments of each feature over space; see `batiste.nn.InstanceNorm`"""

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, self.feature_axes, mask=mask)


# ---------------------------------------------------------------- parts that programs make norms of their own from


def _canonicalize_axes(rank: int, axes: Axes) -> tuple[int, ...]:
    """The dims of an array of `rank` dims, counted from its front."""
    return tuple(axis % rank for axis in as_tuple(axes))


def _compute_stats(
    x: Array,
    axes: Axes,
    dtype: DTypeLike | None,
    axis_name: str | None = None,
    axis_index_groups: Any = None,
    use_mean: bool = True,
    use_fast_variance: bool = True,
    mask: Array | None = None,
    force_float32_reductions: bool = True,
) -> tuple[Array, Array]:
    """Mean and variance of `x` over the dims `axes`, which leave its shape, and over a mapped axis."""
    dtype = dtype or jnp.result_type(x)
    x = jnp.asarray(x, jnp.promote_types(dtype, jnp.float32) if force_float32_reductions else dtype)
    dims = _canonicalize_axes(x.ndim, axes)
    average = Average(dims, 0.0, use_mean, use_fast_variance, axis_name, axis_index_groups)
    mean, var = (jnp.squeeze(moment, dims) if moment.ndim else moment for moment in average.moments(x, mask))
    return jnp.broadcast_to(mean, var.shape), var


def _normalize(
    mdl: Module,
    x: Array,
    mean: Array,
    var: Array,
    reduction_axes: Axes,
    feature_axes: Axes,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    epsilon: float,
    use_bias: bool,
    use_scale: bool,
    bias_init: Initializer,
    scale_init: Initializer,
    force_float32_reductions: bool = True,
) -> Array:
    """y = (x - mean) scale / √(var + ε) + bias, whose parameters are made in `mdl`, along `feature_axes`."""
    reduced = _canonicalize_axes(x.ndim, reduction_axes)
    features = _canonicalize_axes(x.ndim, feature_axes)
    sizes = tuple(x.shape[axis] for axis in features)
    wide = tuple(x.shape[axis] if axis in features else 1 for axis in range(x.ndim))
    mean, var = jnp.expand_dims(mean, reduced), jnp.expand_dims(var, reduced)
    y, factor, entering = x - mean, lax.rsqrt(var + epsilon), [x]
    if use_scale:
        scale = mdl.param("scale", scale_init, sizes, param_dtype).reshape(wide)
        factor, entering = factor * scale, [*entering, scale]
    y = y * factor
    if use_bias:
        bias = mdl.param("bias", bias_init, sizes, param_dtype).reshape(wide)
        y, entering = y + bias, [*entering, bias]
    return jnp.asarray(y, canonicalize_dtype(*entering, dtype=dtype))
