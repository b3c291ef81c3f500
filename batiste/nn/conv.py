# SPDX-License-Identifier: Apache-2.0
"""Convolutions of `x[*batch, *spatial, in]` with kernels `[*kernel_size, in // groups, out]`, in any number of dims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.graph import Module, Param, data, make
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.precision import promote_dtype

from .checks import check_last_dim, check_sizes, params_stream
from .initializers import Initializer
from .linear import (
    NO_METADATA,
    add_bias,
    as_tuple,
    default_bias_init,
    default_kernel_init,
    output_dtype,
    value_of,
)

PaddingLike = str | int | Sequence[int | tuple[int, int]]
PerDim = int | Sequence[int] | None
"""One number for all spatial dims, or one for each; None stands for 1."""

NAMED = ("SAME", "VALID", "SAME_LOWER")  # the paddings that XLA knows
WRAPPED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}  # and those made with `jax.numpy.pad`, under its mode


# ---------------------------------------------------------------- arguments
def canonicalize_padding(padding: PaddingLike, rank: int) -> str | list[tuple[int, int]]:
    """A name in capitals, or one pair `(low, high)` for each of `rank` spatial dims.

    Raises:
        ArgumentError: `padding` is none of a name, a number, or `rank` numbers or pairs.

    >>> canonicalize_padding(1, 2), canonicalize_padding([0, (1, 2)], 2), canonicalize_padding("same", 2)
    ([(1, 1), (1, 1)], [(0, 0), (1, 2)], 'SAME')
    """
    if isinstance(padding, str):
        return padding.upper()
    entries = [padding] * rank if hasattr(padding, "__index__") else padding
    if isinstance(entries, Sequence) and len(entries) == rank:
        pairs = [(entry, entry) if hasattr(entry, "__index__") else entry for entry in entries]
        if all(isinstance(pair, Sequence) and len(pair) == 2 and not isinstance(pair, str) for pair in pairs):
            return [(low, high) for low, high in pairs]  # type: ignore[misc]
    expected = f"a name, a number, or a sequence of len {rank} of numbers or pairs (low, high)"
    raise ArgumentError("Invalid padding format", got=repr(padding), expected=expected,
                        fix="write padding=1, padding=[(1, 1), (0, 2)] or padding='SAME'")  # fmt: skip


def _per_dim(layer: Module, name: str, value: PerDim, rank: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) else (1 if value is None else value,) * rank
    if len(numbers) != rank or any(not hasattr(n, "__index__") or n < 1 for n in numbers):
        expected = f"a positive whole number, or one for each of the {rank} spatial dims"
        raise ArgumentError(f"{type(layer).__name__} got wrong {name}", got=repr(value), expected=expected,
                            fix=f"write {name}=2, or as many numbers as kernel_size has")  # fmt: skip
    return numbers


def _known_padding(layer: Module, padding: PaddingLike, rank: int, more: tuple[str, ...]) -> None:
    """Raises unless `padding` is a pair per dim or a name, of which `more` are known beside XLA's."""
    name = canonicalize_padding(padding, rank)
    if isinstance(name, str) and name not in NAMED + more:
        raise ArgumentError(f"{type(layer).__name__} got an unknown padding", got=repr(padding),
                            expected=f"one of {', '.join(NAMED + more)}, a number, or a pair for each dim",
                            fix="choose one of these, or pad by hand and use 'VALID'")  # fmt: skip


def _hashable(value: Any) -> Any:
    """Lists as tuples, so that a setting can be part of the structure."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _masked(layer: Module, kernel: Array, mask: Any) -> Array:
    if mask is None:
        return kernel
    if mask.shape != kernel.shape:
        raise ShapeError("Mask needs to have the same shape as weights", at=layer, got=f"a mask of {mask.shape}",
                         expected=f"{kernel.shape}", fix="build the mask with shape layer.kernel.shape")  # fmt: skip
    return kernel * mask[...]


def _flat_batch(layer: Module, x: Array, rank: int) -> tuple[Array, tuple[int, ...]]:
    """`x` with its batch dims made one, and the batch dims it had."""
    if x.ndim < rank + 1:
        raise ShapeError(f"{type(layer).__name__} got too few dims", at=layer, got=x.shape,
                         expected=f"(*batch, {', '.join(f'n{i}' for i in range(rank))}, features)",
                         fix="add the missing dims, or use a kernel_size of fewer dims")  # fmt: skip
    batch = x.shape[: x.ndim - rank - 1]
    return (x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[len(batch) :])), batch


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    inputs = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(inputs, (rank + 1, rank, *range(rank)), inputs)


# ---------------------------------------------------------------- layers
class Conv(Module):
    """y[*batch, *out, features] = x[*batch, *spatial, in] * kernel[*kernel_size, in, features] + bias[features]

    `*` is the cross-correlation that is called convolution in neural networks: the kernel is not flipped. With groups
    its shape is [*kernel_size, in // groups, features].

    Args:
        kernel_size: one size per spatial dim; a number stands for one dim.
        strides, kernel_dilation, input_dilation: a number for all spatial dims, or one for each; None for 1.
        padding: "SAME", "VALID", "SAME_LOWER"; "CIRCULAR" (around the edge), "REFLECT" (mirrored at the edge element),
            "CAUSAL" (only before, so that no output sees a later input; in one dim); or numbers or pairs.
        feature_group_count: the features are cut in as many groups, each convolved on its own.
        mask: of the kernel's shape, multiplied into it at each call.
        conv_general_dilated: a function that takes the place of `jax.lax.conv_general_dilated`.

    Raises:
        ArgumentError: an unknown padding, a stride per dim too many or too few, groups that do not divide the features.
        ShapeError: `x` has too few dims or another number of features, `mask` another shape than the kernel.

    >>> from batiste.graph import Rngs
    >>> Conv(1, 8, (3, 3), strides=2, rngs=Rngs(0))(jnp.ones((7, 28, 28, 1))).shape
    (7, 14, 14, 8)

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", sec. II; dilation of Yu and
    Koltun 2016, "Multi-Scale Context Aggregation by Dilated Convolutions", eq. 2; kernel scale as in `Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerDim = 1,
        *,
        padding: PaddingLike = "SAME",
        input_dilation: PerDim = 1,
        kernel_dilation: PerDim = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        kernel_size = as_tuple(kernel_size)
        _check_sizes(self, in_features, out_features, kernel_size)
        if feature_group_count < 1 or in_features % feature_group_count or out_features % feature_group_count:
            got = f"feature_group_count={feature_group_count} for {in_features} -> {out_features} features"
            raise ArgumentError("Conv got groups that do not divide its features", got=got,
                                expected="a divisor of in_features and of out_features",
                                fix="change feature_group_count, or the numbers of features")  # fmt: skip
        stream = params_stream(self, rngs)
        self.kernel_shape = self._kernel_shape(in_features, out_features, kernel_size, feature_group_count)
        self.kernel = make(Param, kernel_init, self.kernel_shape, param_dtype, stream, kernel_metadata)
        bias = (
            make(Param, bias_init, self._bias_shape(out_features), param_dtype, stream, bias_metadata)
            if use_bias
            else None
        )
        self.bias = data(bias)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = kernel_size
        self.strides = _hashable(strides)
        self.padding = _hashable(padding)
        self.input_dilation = _hashable(input_dilation)
        self.kernel_dilation = _hashable(kernel_dilation)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self._check_settings()

    def _kernel_shape(
        self, in_features: int, out_features: int, kernel_size: tuple[int, ...], groups: int
    ) -> tuple[int, ...]:
        return (*kernel_size, in_features // groups, out_features)

    def _bias_shape(self, out_features: int) -> tuple[int, ...]:
        return (out_features,)

    def _check_settings(self) -> None:
        rank = len(self.kernel_size)
        _known_padding(self, self.padding, rank, (*WRAPPED, "CAUSAL"))
        for name in ("strides", "input_dilation", "kernel_dilation"):
            _per_dim(self, name, getattr(self, name), rank)
        padding = canonicalize_padding(self.padding, rank)
        if padding == "CAUSAL" and rank != 1:
            raise ArgumentError("Causal padding is only implemented for 1D convolutions", got=f"{rank} spatial dims",
                                fix="pad by hand and use padding='VALID'")  # fmt: skip
        dilated = any(n != 1 for n in _per_dim(self, "input_dilation", self.input_dilation, rank))
        if isinstance(padding, str) and dilated:
            raise ArgumentError("Conv needs explicit padding for a dilated input", got=repr(self.padding),
                                fix="give padding as numbers or pairs (low, high), or use ConvTranspose")  # fmt: skip

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        return _convolved(self, inputs, self.conv_general_dilated, out_sharding)


def _convolved(layer: Conv, inputs: Array, convolve: Callable[..., Array], out_sharding: Any, window: int = 1) -> Array:
    """What `layer` computes by `convolve`, whose kernel has `window` rows for each input feature of a group."""
    kernel = _masked(layer, layer.kernel[...], layer.mask)
    x, kernel, bias = layer.promote_dtype((inputs, kernel, value_of(layer.bias)), dtype=layer.dtype)
    rank = len(layer.kernel_size)
    x, batch = _flat_batch(layer, x, rank)
    check_last_dim(layer, x, kernel.shape[-2] * layer.feature_group_count // window, "in_features")
    dilation = _per_dim(layer, "kernel_dilation", layer.kernel_dilation, rank)
    x, padding = _pad(x, canonicalize_padding(layer.padding, rank), layer.kernel_size, dilation)
    y = convolve(
        x,
        kernel,
        _per_dim(layer, "strides", layer.strides, rank),
        padding,
        lhs_dilation=_per_dim(layer, "input_dilation", layer.input_dilation, rank),
        rhs_dilation=dilation,
        dimension_numbers=_channels_last(rank),
        feature_group_count=layer.feature_group_count,
        precision=layer.precision,
        out_sharding=out_sharding,
        **output_dtype(layer.preferred_element_type),
    )
    y = add_bias(y, bias)
    return y if len(batch) == 1 else y.reshape(batch + y.shape[1:])


def _check_sizes(layer: Module, in_features: int, out_features: int, kernel_size: tuple[int, ...]) -> None:
    check_sizes(layer, in_features=in_features, out_features=out_features)
    for size in kernel_size:
        check_sizes(layer, kernel_size=size)


def _pad(x: Array, padding: Any, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[Array, Any]:
    """`x` with the paddings that XLA does not know put on, and what is left for XLA to do."""
    reach = [(k - 1) * d for k, d in zip(kernel_size, dilation)]  # how far a window extends beyond its first element
    if padding == "CAUSAL":
        return x, [(n, 0) for n in reach]
    if isinstance(padding, str) and padding in WRAPPED:
        pairs = [(0, 0), *((n // 2, n - n // 2) for n in reach), (0, 0)]
        return jnp.pad(x, pairs, mode=WRAPPED[padding]), "VALID"
    return x, padding


class UnsupportedError(ArgumentError, NotImplementedError):
    """A setting of a layer that JAX has no operation for."""


class ConvLocal(Conv):
    """y[*batch, *out, features] = x[*batch, *out, window * in] · kernel[*out, window * in, features] + bias

    As `Conv`, with a kernel of its own for each place of the output.

    Args:
        out_sizes: the spatial sizes of the output, which follow from those of the input.
        settings: as of `Conv`; there are no groups.

    Raises:
        UnsupportedError: `feature_group_count` is not 1.

    >>> from batiste.graph import Rngs
    >>> ConvLocal(1, 8, (3,), out_sizes=(5,), rngs=Rngs(0))(jnp.ones((7, 5, 1))).shape
    (7, 5, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerDim = 1,
        *,
        out_sizes: Sequence[int],
        feature_group_count: int = 1,
        conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated_local,
        **settings: Any,
    ):
        if feature_group_count != 1:
            raise UnsupportedError("ConvLocal: a local convolution does not support `feature_group_count != 1`",
                                   got=feature_group_count, fix="use one layer for each group")  # fmt: skip
        self.out_sizes = tuple(out_sizes)
        super().__init__(
            in_features, out_features, kernel_size, strides, conv_general_dilated=conv_general_dilated, **settings
        )

    def _kernel_shape(
        self, in_features: int, out_features: int, kernel_size: tuple[int, ...], groups: int
    ) -> tuple[int, ...]:
        return (*self.out_sizes, math.prod(kernel_size) * in_features, out_features)

    def _bias_shape(self, out_features: int) -> tuple[int, ...]:
        return (*self.out_sizes, out_features)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        def convolve(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
            known = ("lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
            options = {name: options[name] for name in known}
            return self.conv_general_dilated(x, kernel, *args, filter_shape=self.kernel_size, **options)

        return _convolved(self, inputs, convolve, out_sharding, window=math.prod(self.kernel_size))


class ConvTranspose(Module):
    """y[*batch, *out, features] = spread(x)[*batch, *wide, in] * kernel[*kernel_size, in, features] + bias[features]

    `spread` puts `strides - 1` zeros between the elements of x[*batch, *spatial, in]; `out` is `strides` times
    `spatial` for "SAME" and "CIRCULAR", and for "VALID" longer by what the dilated kernel exceeds the stride.

    Args:
        kernel_size: one size per spatial dim; a number stands for one dim.
        strides, kernel_dilation: a number for all spatial dims, or one for each; None for 1.
        padding: "SAME", "VALID", "SAME_LOWER", "CIRCULAR" (what sticks out is added at the other end), or numbers or
            pairs, which are the padding of the spread-out input.
        mask: of the kernel's shape, multiplied into it at each call.
        transpose_kernel: flip the kernel's spatial dims and give it the shape [*kernel_size, features, in], so that
            the layer is the gradient of the `Conv` that has the same kernel (under "CIRCULAR" for odd sizes and
            strides of 1 or 2, else rolled by up to half a stride).

    Raises:
        ArgumentError: an unknown padding, a stride per dim too many or too few.
        ShapeError: `x` has too few dims or another number of features, `mask` another shape than the kernel.

    >>> from batiste.graph import Rngs
    >>> ConvTranspose(8, 1, (3, 3), strides=2, rngs=Rngs(0))(jnp.ones((7, 14, 14, 8))).shape
    (7, 28, 28, 1)

    Source: Zeiler et al. 2010, "Deconvolutional Networks", eq. 1; Dumoulin & Visin 2016, "A guide to convolution
    arithmetic for deep learning", ch. 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerDim = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: PerDim = None,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        kernel_size = as_tuple(kernel_size)
        _check_sizes(self, in_features, out_features, kernel_size)
        stream = params_stream(self, rngs)
        self.kernel_size = kernel_size
        self.in_features = in_features
        self.out_features = out_features
        self.strides = _hashable(strides)
        self.padding = _hashable(padding)
        self.kernel_dilation = _hashable(kernel_dilation)
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        _known_padding(self, padding, len(kernel_size), ("CIRCULAR",))
        for name in ("strides", "kernel_dilation"):
            _per_dim(self, name, getattr(self, name), len(kernel_size))

        features = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self.kernel_shape = (*kernel_size, *features)
        self.kernel = make(Param, kernel_init, self.kernel_shape, param_dtype, stream, kernel_metadata)
        bias = make(Param, bias_init, (out_features,), param_dtype, stream, bias_metadata) if use_bias else None
        self.bias = data(bias)

    def __call__(self, inputs: Array) -> Array:
        kernel = _masked(self, self.kernel[...], self.mask)
        x, kernel, bias = self.promote_dtype((inputs, kernel, value_of(self.bias)), dtype=self.dtype)
        rank = len(self.kernel_size)
        x, batch = _flat_batch(self, x, rank)
        check_last_dim(self, x, kernel.shape[-1 if self.transpose_kernel else -2], "in_features")
        padding = canonicalize_padding(self.padding, rank)
        strides = _per_dim(self, "strides", self.strides, rank)
        y = lax.conv_transpose(
            x,
            kernel,
            strides,
            "VALID" if padding == "CIRCULAR" else padding,
            rhs_dilation=_per_dim(self, "kernel_dilation", self.kernel_dilation, rank),
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if padding == "CIRCULAR":
            period = tuple(n * stride for n, stride in zip(x.shape[1:-1], strides))
            y = _fold(y, period, round_up=self.transpose_kernel)
        y = add_bias(y, bias)
        return y if len(batch) == 1 else y.reshape(batch + y.shape[1:])


def _fold(y: Array, period: tuple[int, ...], round_up: bool) -> Array:
    """z[i] = sum of y[j] over all j with j = i + offset modulo `period`, in each spatial dim.

    What a convolution writes beyond a period of its output is added at the other end. `offset` is half of what sticks
    out, so that it is shared by both ends; which end gets the odd element depends on whether the kernel is flipped.
    """
    for dim, size in enumerate(period, 1):
        excess = y.shape[dim] - size
        offset = (excess + round_up) // 2
        low = -offset % size
        high = -(low + y.shape[dim]) % size
        y = jnp.pad(y, [(low, high) if d == dim else (0, 0) for d in range(y.ndim)])
        y = y.reshape(*y.shape[:dim], -1, size, *y.shape[dim + 1 :]).sum(dim)
    return y
