# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: small trainable products beside a layer that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste.graph import Module, Param, Variable, make
from batiste.graph.errors import ArgumentError
from batiste.precision import promote_dtype

from . import initializers
from .checks import check_last_dim, check_sizes, params_stream
from .initializers import Initializer
from .linear import NO_METADATA, Linear

default_a_initializer = initializers.he_uniform()
default_b_initializer = initializers.zeros


class LoRAParam(Param):
    """A parameter of a low-rank adapter: `wrt=LoRAParam` trains the adapters alone."""

    __slots__ = ()


class LoRA(Module):
    """y[..., out] = x[..., in] @ lora_a[in, rank] @ lora_b[rank, out] (+ base_module(x))

    Args:
        base_module: a layer from `in_features` to `out_features` whose output is added.
        dtype: what is computed in; None takes what the input and the parameters promote to.
        lora_param_type: the kind of the two parameters.

    Raises:
        ArgumentError: `base_module` is not callable.
        ShapeError: the last dim of `x` is not `in_features`.

    >>> from batiste.graph import Rngs
    >>> layer = LoRA(3, 2, 4, rngs=Rngs(0))
    >>> layer.lora_a.shape, layer.lora_b.shape, layer(jnp.ones((5, 3))).shape
    ((3, 2), (2, 4), (5, 4))

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
    """

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Module | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable] = LoRAParam,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        a_metadata: Mapping[str, Any] = NO_METADATA,
        b_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        check_sizes(self, in_features=in_features, lora_rank=lora_rank, out_features=out_features)
        stream = params_stream(self, rngs)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.lora_param_type = lora_param_type
        self.base_module = base_module
        self.promote_dtype = promote_dtype
        self.lora_a = make(lora_param_type, a_initializer, (in_features, lora_rank), param_dtype, stream, a_metadata)
        self.lora_b = make(lora_param_type, b_initializer, (lora_rank, out_features), param_dtype, stream, b_metadata)

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        """Args:
        kwargs: are passed on to `base_module`.
        """
        x, a, b = self.promote_dtype((x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        check_last_dim(self, x, self.in_features, "in_features")
        y = x @ a @ b
        if self.base_module is None:
            return y
        if not callable(self.base_module):
            raise ArgumentError("`self.base_module` must be callable", at=self, got=type(self.base_module).__name__,
                                fix="give that class a __call__ method, or leave base_module out")  # fmt: skip
        return y + self.base_module(x, **kwargs)


class LoRALinear(Linear):
    """y[..., out] = x[..., in] @ kernel[in, out] + bias[out] + x @ lora_a[in, rank] @ lora_b[rank, out]

    A `Linear` with an adapter in its attribute `lora`; the other parameters have Linear's names and first values.

    Args:
        lora_dtype, lora_param_dtype, lora_promote_dtype: as `dtype` … are to Linear, for the adapter.
        lora_param_type: the kind of the adapter's parameters.
        kwargs: are Linear's.

    Raises:
        ShapeError: the last dim of `x` is not `in_features`.

    >>> from batiste.graph import Rngs
    >>> layer = LoRALinear(3, 4, lora_rank=2, rngs=Rngs(0))
    >>> layer.kernel.shape, layer.lora.lora_a.shape
    ((3, 4), (3, 2))

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: DTypeLike | None = None,
        lora_param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable] = LoRAParam,
        lora_promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: Any,
        a_metadata: Mapping[str, Any] = NO_METADATA,
        b_metadata: Mapping[str, Any] = NO_METADATA,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            rngs=rngs,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
        )

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        return super().__call__(x, out_sharding=out_sharding) + self.lora(x)
