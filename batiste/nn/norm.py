# SPDX-License-Identifier: Apache-2.0
"""Normalisation of activations: over the batch, over features, over groups of them.

All of them are one function, `moments.normalize`, over different dims, then a learnt scale and bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.graph import BatchStat, Module, Param, data, make
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.precision import canonicalize_dtype, promote_dtype

from . import initializers
from .checks import check_sizes, decided, params_stream
from .initializers import Initializer
from .linear import NO_METADATA, value_of
from .moments import Average, affine, normalize

Axes = int | Sequence[int]


# ---------------------------------------------------------------- what the layers share
def _canonical(axes: Any) -> Any:
    """Axes as a static attribute: a list becomes a tuple, which can be compared and hashed."""
    return (
        tuple(_canonical(axis) for axis in axes) if isinstance(axes, Sequence) and not isinstance(axes, str) else axes
    )


def _dims(layer: Any, argument: str, axes: Axes, ndim: int) -> tuple[int, ...]:
    """`axes` counted from the front, in order, each once.

    Raises:
        ArgumentError: one lies outside an array of `ndim` dims.
    """
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ArgumentError(f"{type(layer).__name__} got an input without dim {axis} of its {argument}", at=layer,
                                got=f"an input of {ndim} dims", expected=f"{argument} between {-ndim} and {ndim - 1}",
                                fix=f"give it an input of more dims, or other {argument}")  # fmt: skip
    return tuple(sorted({axis % ndim for axis in axes}))


def _feature_shape(layer: Any, x: Array, dims: tuple[int, ...], num_features: int) -> tuple[int, ...]:
    """The shape in which parameters of `num_features` entries meet `x`: its sizes on `dims`, 1 elsewhere.

    Raises:
        ShapeError: there are not `num_features` of them.
    """
    shape = tuple(size if dim in dims else 1 for dim, size in enumerate(x.shape))
    if math.prod(shape) != num_features:
        where = f"dim {dims[0]}" if len(dims) == 1 else f"dims {dims}"
        wanted = f"{num_features} features on {where}"
        raise ShapeError(f"{type(layer).__name__} got a wrong number of features", at=layer, got=x.shape,
                         expected=wanted,
                         fix=f"build it with num_features={math.prod(shape)}, or name other feature axes")  # fmt: skip
    return shape


def _parameters(shape: tuple[int, ...], *parameters: Array | None) -> list[Array | None]:
    """Those that are switched on, in the shape in which they meet the input."""
    return [None if parameter is None else parameter.reshape(shape) for parameter in parameters]


def _wide(layer: Any, x: Array) -> Array:
    """`x` in the precision that moments are taken in, at least float32 unless the layer says otherwise."""
    wide = getattr(layer, "force_float32_reductions", True)  # which the functional face lets its layers turn off
    return x.astype(jnp.promote_types(jnp.float32, x.dtype)) if wide else x


def _selection(mask: Any, x: Array) -> Array | None:
    """A mask as booleans, with as many dims as `x`."""
    return None if mask is None else jnp.asarray(mask, bool).reshape((1,) * (x.ndim - jnp.ndim(mask)) + jnp.shape(mask))


# ---------------------------------------------------------------- the layers
class BatchNorm(Module):
    """y[..., c] = (x[..., c] - mean[c]) / √(var[c] + ε) * scale[c] + bias[c]

    In training the moments are the batch's, over all dims but `axis`, and the stored ones follow them:
    stored ← momentum * stored + (1 - momentum) * batch's. In evaluation the stored ones are used.

    Args:
        use_running_average: use the stored moments: evaluation. `train()`, `eval()` and `view` switch it.
        axis: the dim of the features.
        momentum: how slowly the stored moments follow.
        dtype: of the result; None takes what the input and the parameters promote to. Moments are at least float32.
        axis_name, axis_index_groups: a mapped axis to take the moments over as well, and groups of its indices.
        use_fast_variance: E[x²] - E[x]² in one pass, which is less exact where the mean is far from 0.

    Raises:
        ArgumentError: `use_running_average` is given neither here nor in the call.
        ShapeError: `x` has not `num_features` entries on `axis`.

    >>> from batiste.graph import Rngs
    >>> norm = BatchNorm(3, momentum=0.9, rngs=Rngs(0))
    >>> norm(jnp.ones((4, 3))).shape, norm.mean[...]
    ((4, 3), Array([0.1, 0.1, 0.1], dtype=float32))

    Source: Ioffe, Szegedy 2015, "Batch Normalization", algorithms 1 and 2.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, num_features=num_features)
        stream, shape = params_stream(self, rngs), (num_features,)
        self.mean = make(BatchStat, initializers.zeros, shape, jnp.float32)
        self.var = make(BatchStat, initializers.ones, shape, jnp.float32)
        self.scale = data(make(Param, scale_init, shape, param_dtype, stream, scale_metadata) if use_scale else None)
        self.bias = data(make(Param, bias_init, shape, param_dtype, stream, bias_metadata) if use_bias else None)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = _canonical(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        """Args:
        use_running_average: instead of the layer's own setting.
        mask: which entries of `x` the moments are taken over; all of `x` is normalised.
        """
        stored = decided(self, "use_running_average", use_running_average, self.use_running_average)
        arrays = (x, self.mean[...], self.var[...], value_of(self.scale), value_of(self.bias))
        x, mean, var, scale, bias = self.promote_dtype(arrays, dtype=self.dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        features = _dims(self, "axis", self.axis, x.ndim)
        shape = _feature_shape(self, x, features, self.num_features)
        if stored:
            factor = lax.rsqrt(_wide(self, var) + self.epsilon).reshape(shape)
            return affine(_wide(self, x) - mean.reshape(shape), factor, *_parameters(shape, scale, bias)).astype(dtype)
        dims = tuple(dim for dim in range(x.ndim) if dim not in features)
        average = Average(dims, self.epsilon, True, self.use_fast_variance, self.axis_name, self.axis_index_groups)
        y, mean, var = normalize(average, _wide(self, x), _selection(mask, x), *_parameters(shape, scale, bias))
        for statistic, new in ((self.mean, mean), (self.var, var)):
            followed = self.momentum * statistic[...] + (1 - self.momentum) * new.reshape(self.num_features)
            statistic.set_value(lax.stop_gradient(followed))  # as it is: a complex mean stays one
        return y.astype(dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """The options of this layer for `nnx.view`.

        Args:
            use_running_average: use the stored moments instead of those of the batch.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class LayerNorm(Module):
    """y = (x - mean) / √(var + ε) * scale + bias, mean and variance over the features of each entry

    Args:
        num_features: entries of `scale` and of `bias`: the product of the sizes on `feature_axes`.
        dtype: of the result; None takes what the input and the parameters promote to. Moments are at least float32.
        reduction_axes: dims that the moments are taken over.
        feature_axes: dims that `scale` and `bias` have.
        axis_name, axis_index_groups: a mapped axis to take the moments over as well, and groups of its indices.
        use_fast_variance: E[x²] - E[x]² in one pass, which is less exact where the mean is far from 0.

    Raises:
        ArgumentError: `x` lacks one of the axes.
        ShapeError: `x` has not `num_features` entries on `feature_axes`.

    >>> from batiste.graph import Rngs
    >>> LayerNorm(2, rngs=Rngs(0))(jnp.array([[1.0, 3.0]])).round(3)
    Array([[-1.,  1.]], dtype=float32)

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", eq. 4.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, num_features=num_features)
        stream, shape = params_stream(self, rngs), (num_features,)
        self.scale = data(make(Param, scale_init, shape, param_dtype, stream, scale_metadata) if use_scale else None)
        self.bias = data(make(Param, bias_init, shape, param_dtype, stream, bias_metadata) if use_bias else None)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = _canonical(reduction_axes)
        self.feature_axes = _canonical(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = _canonical(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Args:
        mask: which entries of `x` the moments are taken over; all of `x` is normalised.
        """
        x, scale, bias = self.promote_dtype((x, value_of(self.scale), value_of(self.bias)), dtype=self.dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        shape = _feature_shape(self, x, _dims(self, "feature_axes", self.feature_axes, x.ndim), self.num_features)
        average = Average(_dims(self, "reduction_axes", self.reduction_axes, x.ndim), self.epsilon, True,
                          self.use_fast_variance, self.axis_name, self.axis_index_groups)  # fmt: skip
        y, _, _ = normalize(average, _wide(self, x), _selection(mask, x), *_parameters(shape, scale, bias))
        return y.astype(dtype)


class RMSNorm(Module):
    """y = x / √(E[x²] + ε) * scale, the mean square over the features of each entry

    Args:
        num_features: entries of `scale`: the product of the sizes on `feature_axes`.
        dtype: of the result; None takes what the input and the scale promote to. Moments are at least float32.
        reduction_axes: dims that the mean square is taken over.
        feature_axes: dims that `scale` has.
        axis_name, axis_index_groups: a mapped axis to take it over as well, and groups of its indices.
        use_fast_variance: without effect: there is no mean to subtract.

    Raises:
        ArgumentError: `x` lacks one of the axes.
        ShapeError: `x` has not `num_features` entries on `feature_axes`.

    >>> from batiste.graph import Rngs
    >>> RMSNorm(2, rngs=Rngs(0))(jnp.array([[3.0, -3.0]])).round(3)
    Array([[ 1., -1.]], dtype=float32)

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, num_features=num_features)
        stream, shape = params_stream(self, rngs), (num_features,)
        self.scale = data(make(Param, scale_init, shape, param_dtype, stream, scale_metadata) if use_scale else None)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.reduction_axes = _canonical(reduction_axes)
        self.feature_axes = _canonical(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = _canonical(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Args:
        mask: which entries of `x` the mean square is taken over; all of `x` is normalised.
        """
        x, scale = self.promote_dtype((x, value_of(self.scale)), dtype=self.dtype)
        dtype = canonicalize_dtype(x, scale, dtype=self.dtype)
        shape = _feature_shape(self, x, _dims(self, "feature_axes", self.feature_axes, x.ndim), self.num_features)
        average = Average(_dims(self, "reduction_axes", self.reduction_axes, x.ndim), self.epsilon, False,
                          self.use_fast_variance, self.axis_name, self.axis_index_groups)  # fmt: skip
        y, _, _ = normalize(average, _wide(self, x), _selection(mask, x), *_parameters(shape, scale))
        return y.astype(dtype)


class GroupNorm(Module):
    """y = (x - mean) / √(var + ε) * scale + bias, mean and variance over each group of channels of each example

    Args:
        num_features: channels; the last dim.
        num_groups: how many groups of neighbouring channels; None where `group_size` is given.
        group_size: how many channels in a group.
        dtype: of the result; None takes what the input and the parameters promote to. Moments are at least float32.
        reduction_axes: dims that the moments are taken over, the last among them; None takes all but the first.
        axis_name, axis_index_groups: a mapped axis to take the moments over as well, and groups of its indices.
        use_fast_variance: E[x²] - E[x]² in one pass, which is less exact where the mean is far from 0.

    Raises:
        ArgumentError: not exactly one of `num_groups` and `group_size` is given, it does not divide `num_features`, or
            the reduction axes do not suit the input.
        ShapeError: the last dim of `x` is not `num_features`.

    >>> from batiste.graph import Rngs
    >>> GroupNorm(6, num_groups=3, rngs=Rngs(0))(jnp.ones((2, 5, 6))).shape
    (2, 5, 6)

    Source: Wu, He 2018, "Group Normalization", eqs. 1, 2 and 7.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, num_features=num_features)
        self.feature_axis = -1
        self.num_groups, self.group_size = _groups(num_features, num_groups, group_size)
        stream, shape = params_stream(self, rngs), (num_features,)
        self.scale = data(make(Param, scale_init, shape, param_dtype, stream, scale_metadata) if use_scale else None)
        self.bias = data(make(Param, bias_init, shape, param_dtype, stream, bias_metadata) if use_bias else None)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = _canonical(reduction_axes)
        self.axis_name = axis_name
        self.axis_index_groups = _canonical(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Args:
        mask: which entries of `x` the moments are taken over; all of `x` is normalised.
        """
        x, scale, bias = self.promote_dtype((x, value_of(self.scale), value_of(self.bias)), dtype=self.dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        last = _dims(self, "feature_axis", self.feature_axis, x.ndim)
        shape = _feature_shape(self, x, last, self.num_groups * self.group_size)
        grouped = (*x.shape[:-1], self.num_groups, self.group_size)
        average = Average(_grouped_dims(self, x.ndim), self.epsilon, True,
                          self.use_fast_variance, self.axis_name, self.axis_index_groups)  # fmt: skip
        where = None if mask is None else jnp.broadcast_to(jnp.asarray(mask, bool), x.shape).reshape(grouped)
        scale, bias = _parameters((*shape[:-1], *grouped[-2:]), scale, bias)
        y, _, _ = normalize(average, _wide(self, x).reshape(grouped), where, scale, bias)
        return y.reshape(x.shape).astype(dtype)


def _grouped_dims(layer: GroupNorm, ndim: int) -> tuple[int, ...]:
    """The dims to reduce once the last one is split into groups and the channels in them."""
    chosen = tuple(range(1, ndim)) if layer.reduction_axes is None else layer.reduction_axes
    dims = _dims(layer, "reduction_axes", chosen, ndim)
    if ndim - 1 not in dims:
        raise ArgumentError("GroupNorm has to reduce the last dim, the channels", at=layer,
                            got=f"an input of {ndim} dims and reduction_axes={layer.reduction_axes}",
                            expected="the last dim among them", fix="add -1 to reduction_axes")  # fmt: skip
    return (*dims[:-1], ndim)


def _groups(num_features: int, num_groups: int | None, group_size: int | None) -> tuple[int, int]:
    """Number and size of the groups, from one of them."""
    if num_groups is not None and group_size is None:
        if num_groups > 0 and num_features % num_groups == 0:
            return num_groups, num_features // num_groups
        raise ArgumentError(
            f"Number of groups ({num_groups}) does not divide the number of channels ({num_features})",
            fix="choose num_groups among the divisors of num_features",
        )
    if num_groups is None and group_size is not None:
        if group_size > 0 and num_features % group_size == 0:
            return num_features // group_size, group_size
        raise ArgumentError(
            f"Number of features ({num_features}) is not a multiple of the group size ({group_size})",
            fix="choose group_size among the divisors of num_features",
        )
    raise ArgumentError(
        "Either `num_groups` or `group_size` should be specified, not both",
        got=f"num_groups={num_groups}, group_size={group_size}",
        fix="pass num_groups=None beside group_size: its default is 32",
    )


class InstanceNorm(Module):
    """y = (x - mean) / √(var + ε) * scale + bias, mean and variance over all but the batch and the channels

    Args:
        num_features: entries of `scale` and of `bias`: the product of the sizes on `feature_axes`.
        dtype: of the result; None takes what the input and the parameters promote to. Moments are at least float32.
        feature_axes: dims of the channels. The first dim is the batch.
        axis_name, axis_index_groups: a mapped axis to take the moments over as well, and groups of its indices.
        use_fast_variance: E[x²] - E[x]² in one pass, which is less exact where the mean is far from 0.

    Raises:
        ArgumentError: the first dim is among the feature axes, or `x` lacks one of them.
        ShapeError: `x` has not `num_features` entries on `feature_axes`.

    >>> from batiste.graph import Rngs
    >>> InstanceNorm(5, rngs=Rngs(0))(jnp.ones((2, 3, 4, 5))).shape
    (2, 3, 4, 5)

    Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization", eq. 3.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, num_features=num_features)
        stream, shape = params_stream(self, rngs), (num_features,)
        self.scale = make(Param, scale_init, shape, param_dtype, stream, scale_metadata) if use_scale else None
        self.bias = make(Param, bias_init, shape, param_dtype, stream, bias_metadata) if use_bias else None
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axes = _canonical(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = _canonical(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Args:
        mask: which entries of `x` the moments are taken over; all of `x` is normalised.
        """
        x, scale, bias = self.promote_dtype((x, value_of(self.scale), value_of(self.bias)), dtype=self.dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        features = _dims(self, "feature_axes", self.feature_axes, x.ndim)
        if 0 in features:
            raise ArgumentError("The channel axes cannot include the leading dimension as this is assumed to be the "
                                "batch axis.", at=self,
                                got=f"feature_axes={self.feature_axes} for an input of {x.ndim} dims",
                                fix="name the channels' dim in feature_axes, after the first")  # fmt: skip
        shape = _feature_shape(self, x, features, self.num_features)
        dims = tuple(dim for dim in range(1, x.ndim) if dim not in features)
        average = Average(dims, self.epsilon, True, self.use_fast_variance, self.axis_name, self.axis_index_groups)
        y, _, _ = normalize(average, _wide(self, x), _selection(mask, x), *_parameters(shape, scale, bias))
        return y.astype(dtype)
