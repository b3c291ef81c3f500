# SPDX-License-Identifier: Apache-2.0
"""Linear maps and convolutions of the functional face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import Param
from batiste.graph.errors import ArgumentError
from batiste.nn.conv import canonicalize_padding
from batiste.nn.initializers import Initializer
from batiste.nn.linear import as_tuple, default_bias_init, default_embed_init, default_kernel_init
from batiste.typing import DotGeneralT, Dtype, LaxPadding, PaddingLike, PrecisionLike, PRNGKey, PromoteDtypeFn, Shape

from .calls import merge_param
from .conv import Conv, ConvLocal, ConvTranspose
from .dtypes import promote_dtype
from .lazy import Lazy, replaced
from .module import Module, compact

__all__ = [
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "DotGeneralT",
    "Dtype",
    "Einsum",
    "Embed",
    "LaxPadding",
    "Module",
    "PRNGKey",
    "PaddingLike",
    "PrecisionLike",
    "PromoteDtypeFn",
    "Shape",
    "canonicalize_padding",
    "default_embed_init",
    "default_kernel_init",
]

Axes = int | Sequence[int]


class Dense(Lazy, of=nn.Linear):
    """y[..., features] = x[..., in] @ kernel[in, features] + bias[features]; see `batiste.nn.Linear`

    Args:
        dot_general, dot_general_cls: in place of `jax.lax.dot_general`: a function, or a module class.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    promote_dtype: Callable[..., Any] = promote_dtype
    dot_general: Callable[..., Array] | None = None
    dot_general_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        product = replaced(self.dot_general, self.dot_general_cls, lax.dot_general)
        return self.run(
            self.settings(in_features=inputs.shape[-1], out_features=self.features, dot_general=product), inputs
        )


class DenseGeneral(Lazy, of=nn.LinearGeneral):
    """y[*batch, ..., *features] = Σ x[*batch, ..., *in] kernel[*batch, *in, *features] + bias

    See `batiste.nn.LinearGeneral`.

    Args:
        axis: the dims of `x` that are summed over.
        batch_dims: leading dims for each entry of which there is a kernel of its own.
    """

    features: Axes
    axis: Axes = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    precision: Any = None
    promote_dtype: Callable[..., Any] = promote_dtype
    dot_general: Callable[..., Array] | None = None
    dot_general_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        axes = tuple(sorted(axis % inputs.ndim for axis in as_tuple(self.axis)))
        batch = tuple(sorted(axis % inputs.ndim for axis in as_tuple(self.batch_dims)))
        if batch != tuple(range(len(batch))):
            raise ArgumentError(f"batch_dims {batch} must be consecutive leading dimensions starting from 0",
                                fix="transpose the input")  # fmt: skip
        settings = self.settings(
            in_features=tuple(inputs.shape[axis] for axis in axes),
            out_features=as_tuple(self.features),
            axis=axes,
            batch_axis=nn.linear.AxisSizes({axis: inputs.shape[axis] for axis in batch}),
            dot_general=replaced(self.dot_general, self.dot_general_cls, None),
            dot_general_cls=None,
        )
        return self.run(settings, inputs)


class Einsum(Lazy, of=nn.Einsum):
    """y = einsum(einsum_str, x, kernel[*shape]) + bias; see `batiste.nn.Einsum`"""

    shape: Sequence[int]
    einsum_str: str | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    promote_dtype: Callable[..., Any] = promote_dtype
    preferred_element_type: DTypeLike | None = None

    @compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        equation = merge_param("einsum_str", self.einsum_str, einsum_str).replace(" ", "")
        bias_shape = None
        if self.use_bias and "->" in equation and equation.count(",") == 1:
            operands, result = equation.split("->")
            sizes = _sizes(operands.split(",")[1], tuple(self.shape))
            bias_shape = tuple(size for label in result.replace("...", ".") for size in sizes.get(label, ()))
        settings = self.settings(einsum_str=equation, kernel_shape=tuple(self.shape), bias_shape=bias_shape)
        return self.run(settings, inputs)


def _sizes(names: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The size of every label of the kernel, and the sizes under its ellipsis, which is written "."."""
    before, dots, after = names.partition("...")
    middle = len(shape) - len(after)
    sizes = {label: (size,) for label, size in zip(before + after, (*shape[: len(before)], *shape[middle:]))}
    return {**sizes, ".": shape[len(before) : middle]} if dots else sizes


class Embed(Lazy, of=nn.Embed):
    """y[..., features] = embedding[x[...], features]; see `batiste.nn.Embed`"""

    num_embeddings: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    embedding_init: Initializer = default_embed_init
    promote_dtype: Callable[..., Any] = promote_dtype

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param(
            "embedding", self.embedding_init, shape, self.param_dtype
        )  # [num_embeddings, features]

    def __call__(self, inputs: Array) -> Array:
        return self.run(self.settings(), inputs, parts={"embedding": Param(self.embedding)})

    def attend(self, query: Array) -> Array:
        """logits[..., n] = query[..., features] @ embedding[n, features].T"""
        return self.run(self.settings(), query, method="attend", parts={"embedding": Param(self.embedding)})


# ---------------------------------------------------------------- parts that programs make layers of their own from


def _normalize_axes(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The dims of an array of `ndim` dims, counted from its front, in ascending order."""
    return tuple(sorted(axis % ndim for axis in axes))


def _canonicalize_tuple(x: Axes) -> tuple[int, ...]:
    """`(x,)` for one number, a tuple of all for several."""
    return as_tuple(x)


def _conv_dimension_numbers(input_shape: Sequence[int]) -> lax.ConvDimensionNumbers:
    """Where a convolution finds batch, features and space, when the features come last."""
    rank = len(input_shape)
    last, spatial = rank - 1, range(rank - 2)
    image = (0, last, *(1 + dim for dim in spatial))
    return lax.ConvDimensionNumbers(image, (last, rank - 2, *spatial), image)
