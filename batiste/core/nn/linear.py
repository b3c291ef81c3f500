# SPDX-License-Identifier: Apache-2.0
"""Linear maps, convolutions and embeddings as functions of a scope; the modules of `batiste.linen` do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from batiste import linen, struct
from batiste.linen.context import in_module
from batiste.linen.linear import default_embed_init, default_kernel_init
from batiste.linen.scope import Scope
from batiste.nn.initializers import Initializer, zeros

__all__ = ["Embedding", "conv", "conv_transpose", "dense", "dense_general", "embedding", "run"]


def run(module: Callable[..., Any], scope: Scope, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The call of a module of these settings whose variables are those of `scope`."""
    with in_module(None):
        return module(**settings, parent=scope)(*args, **kwargs)


def dense_general(scope: Scope, inputs: Array, features: int | Sequence[int], axis: int | Sequence[int] = -1,
                  batch_dims: Sequence[int] = (), bias: bool = True, dtype: Any = jnp.float32,
                  kernel_init: Initializer = default_kernel_init, bias_init: Initializer = zeros,
                  precision: Any = None) -> Array:  # fmt: skip
    """y = Σ x · kernel + bias over the dims `axis`; see `batiste.linen.DenseGeneral`"""
    settings = dict(features=features, axis=axis, batch_dims=batch_dims, use_bias=bias, dtype=dtype,
                    kernel_init=kernel_init, bias_init=bias_init, precision=precision)  # fmt: skip
    return run(linen.DenseGeneral, scope, settings, inputs)


def dense(scope: Scope, inputs: Array, features: int, bias: bool = True, dtype: Any = jnp.float32,
          precision: Any = None, kernel_init: Initializer = default_kernel_init,
          bias_init: Initializer = zeros) -> Array:  # fmt: skip
    """y[..., features] = x[..., in] @ kernel[in, features] + bias[features]; see `batiste.linen.Dense`

    >>> from batiste.core import init
    >>> import jax
    >>> y, variables = init(dense)(jax.random.key(0), jax.numpy.ones((1, 3)), 2)
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 2), (3, 2))
    """
    settings = dict(features=features, use_bias=bias, dtype=dtype, precision=precision, kernel_init=kernel_init,
                    bias_init=bias_init)  # fmt: skip
    return run(linen.Dense, scope, settings, inputs)


def conv(scope: Scope, inputs: Array, features: int, kernel_size: int | Sequence[int],
         strides: Sequence[int] | None = None, padding: Any = "SAME", input_dilation: Sequence[int] | None = None,
         kernel_dilation: Sequence[int] | None = None, feature_group_count: int = 1, bias: bool = True,
         dtype: Any = jnp.float32, precision: Any = None, kernel_init: Initializer = default_kernel_init,
         bias_init: Initializer = zeros) -> Array:  # fmt: skip
    """y = x * kernel + bias; see `batiste.linen.Conv`"""
    settings = dict(features=features, kernel_size=kernel_size, strides=strides or 1, padding=padding,
                    input_dilation=input_dilation or 1, kernel_dilation=kernel_dilation or 1,
                    feature_group_count=feature_group_count, use_bias=bias, dtype=dtype, precision=precision,
                    kernel_init=kernel_init, bias_init=bias_init)  # fmt: skip
    return run(linen.Conv, scope, settings, inputs)


def conv_transpose(scope: Scope, inputs: Array, features: int, kernel_size: int | Sequence[int],
                   strides: Sequence[int] | None = None, padding: Any = "SAME",
                   kernel_dilation: Sequence[int] | None = None, bias: bool = True, dtype: Any = jnp.float32,
                   precision: Any = None, kernel_init: Initializer = default_kernel_init,
                   bias_init: Initializer = zeros) -> Array:  # fmt: skip
    """y = x, spread by `strides`, * kernel + bias; see `batiste.linen.ConvTranspose`"""
    settings = dict(features=features, kernel_size=kernel_size, strides=strides, padding=padding,
                    kernel_dilation=kernel_dilation, use_bias=bias, dtype=dtype, precision=precision,
                    kernel_init=kernel_init, bias_init=bias_init)  # fmt: skip
    return run(linen.ConvTranspose, scope, settings, inputs)


@struct.dataclass
class Embedding:
    """A table of vectors: `lookup` of integers, and `attend`, the scores of vectors against it."""

    table: Any

    def lookup(self, inputs: Array) -> Array:
        """y[..., features] = table[inputs]

        Raises:
            ValueError: the inputs are no integers.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError("Input type must be an integer or unsigned integer.")
        return self.table[inputs]

    def attend(self, query: Array) -> Array:
        """scores[..., num_embeddings] = query[..., features] @ table.T"""
        return jnp.dot(query, self.table.T)


def embedding(scope: Scope, num_embeddings: int, features: int,
              init_fn: Callable[..., Any] = default_embed_init) -> Embedding:  # fmt: skip
    """The parameter `table` [num_embeddings, features] of the scope."""
    return Embedding(scope.param("table", init_fn, (num_embeddings, features)))
