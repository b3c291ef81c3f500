# SPDX-License-Identifier: Apache-2.0
"""Convolutions of the functional face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import Rngs
from batiste.nn.conv import PaddingLike, PerDim
from batiste.nn.initializers import Initializer
from batiste.nn.linear import as_tuple, default_bias_init, default_kernel_init

from .dtypes import promote_dtype
from .lazy import Lazy, replaced
from .module import compact


class Conv(Lazy, of=nn.Conv):
    """y[*batch, *out, features] = x[*batch, *spatial, in] * kernel[*kernel_size, in, features] + bias

    See `batiste.nn.Conv`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: PerDim = 1
    padding: PaddingLike = "SAME"
    input_dilation: PerDim = 1
    kernel_dilation: PerDim = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: Array | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    promote_dtype: Callable[..., Any] = promote_dtype
    conv_general_dilated: Callable[..., Array] | None = None
    conv_general_dilated_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        product = replaced(self.conv_general_dilated, self.conv_general_dilated_cls, lax.conv_general_dilated)
        sizes = dict(in_features=inputs.shape[-1], out_features=self.features, kernel_size=as_tuple(self.kernel_size))
        return self.run(self.settings(**sizes, conv_general_dilated=product), inputs)


class ConvLocal(Conv, of=nn.ConvLocal):
    """As `Conv`, with a kernel of its own for each place of the output; see `batiste.nn.ConvLocal`"""

    @compact
    def __call__(self, inputs: Array) -> Array:
        product = replaced(self.conv_general_dilated, self.conv_general_dilated_cls, lax.conv_general_dilated_local)
        kernel_size = as_tuple(self.kernel_size)
        sizes = dict(in_features=inputs.shape[-1], out_features=self.features, kernel_size=kernel_size)
        plain = dict(mask=None, feature_group_count=1, kernel_init=default_kernel_init, use_bias=False)
        shared = self.settings(**sizes, **plain, conv_general_dilated=lax.conv_general_dilated)
        shape = jax.eval_shape(lambda x: nn.Conv(**shared, rngs=Rngs(0))(x), inputs).shape
        out_sizes = shape[-len(kernel_size) - 1 : -1]
        return self.run(self.settings(**sizes, out_sizes=out_sizes, conv_general_dilated=product), inputs)


class ConvTranspose(Lazy, of=nn.ConvTranspose):
    """y[*batch, *out, features] = spread(x) * kernel[*kernel_size, in, features] + bias

    See `batiste.nn.ConvTranspose`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: PerDim = None
    padding: PaddingLike = "SAME"
    kernel_dilation: PerDim = None
    use_bias: bool = True
    mask: Array | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    transpose_kernel: bool = False
    promote_dtype: Callable[..., Any] = promote_dtype
    preferred_element_type: DTypeLike | None = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        sizes = dict(in_features=inputs.shape[-1], out_features=self.features, kernel_size=as_tuple(self.kernel_size))
        return self.run(self.settings(**sizes), inputs)
