# SPDX-License-Identifier: Apache-2.0
"""Modules that take the place of `jax.lax.dot_general` or `jax.numpy.einsum`, and multiply 8-bit floats.

They keep their scales and histories in the collection `_overwrite_with_gradient`: the gradient of these variables is
what they are to be next.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste.nn import initializers
from batiste.precision.fp8 import (
    OVERWRITE_WITH_GRADIENT,
    compute_amax_history,
    compute_scale,
    dequantize,
    dot_general_with_precision,
    fp8_scaled_dot_general,
    get_fp8_max,
    in_q,
    in_qdq,
    out_dq,
    out_qdq,
    qdq,
    quantize,
    quantize_dequantize_update,
    quantized_dot,
    update_fp8_meta,
)

from .module import Module, nowrap

__all__ = [
    "OVERWRITE_WITH_GRADIENT",
    "Fp8DirectDotGeneralOp",
    "Fp8DotGeneral",
    "Fp8DotGeneralBase",
    "Fp8DotGeneralOp",
    "Fp8Einsum",
    "NANOOFp8DotGeneralOp",
    "compute_amax_history",
    "compute_scale",
    "dequantize",
    "dot_general_with_precision",
    "fp8_scaled_dot_general",
    "get_fp8_max",
    "in_q",
    "in_qdq",
    "out_dq",
    "out_qdq",
    "qdq",
    "quantize",
    "quantize_dequantize_update",
    "quantized_dot",
    "update_fp8_meta",
]


class Fp8DotGeneralBase(Module):
    """What these modules share: the state of both operands and of the result's gradient.

    Args:
        amax_history_length: of how many calls the greatest value tells the scale.
        e4m3_dtype, e5m2_dtype: of the operands, and of the result's gradient.
    """

    amax_history_length: int = 1024
    e4m3_dtype: Any = jnp.float8_e4m3fn
    e5m2_dtype: Any = jnp.float8_e5m2

    def setup(self) -> None:
        made = {}
        for name in ("input", "kernel", "output_grad"):
            for kind, init, shape in (("amax_history", initializers.zeros, (self.amax_history_length,)),
                                      ("scale", initializers.ones, (1,))):  # fmt: skip
                made[f"{name}_{kind}"] = self.variable(
                    OVERWRITE_WITH_GRADIENT, f"{name}_{kind}", init, None, shape, jnp.float32
                )
        for name, variable in made.items():
            setattr(self, name, variable)

    @nowrap
    def state(self, name: str) -> tuple[Array, Array]:
        """The scale and the history of `input`, `kernel` or `output_grad`."""
        return getattr(self, f"{name}_scale").value, getattr(self, f"{name}_amax_history").value

    @nowrap
    def product(self, *args: Any, **kwargs: Any) -> Array:
        """`fp8_scaled_dot_general` with the state of this module."""
        options: dict[str, Any] = {"e4m3_dtype": self.e4m3_dtype}
        for name, of in (("lhs", "input"), ("rhs", "kernel"), ("grad", "output_grad")):
            options[f"{name}_scale"], options[f"{name}_amax_history"] = self.state(of)
        return fp8_scaled_dot_general(*args, **kwargs, **options)


class Fp8DotGeneralOp(Fp8DotGeneralBase):
    """`jax.lax.dot_general` of operands that have been 8 bits long, in their own dtype (deprecated)

    For compilers that find the 8-bit product in it by themselves.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self) is Fp8DotGeneralOp:
            warnings.warn("Fp8DotGeneralOp is deprecated: use Fp8DirectDotGeneralOp or Fp8Einsum instead.",
                          DeprecationWarning, stacklevel=3)  # fmt: skip

    def __call__(self, lhs: Array, rhs: Array, dimension_numbers: Any, precision: lax.PrecisionLike = None,
                 preferred_element_type: DTypeLike | None = None, **options: Any) -> Array:  # fmt: skip
        dtype = rhs.dtype
        x: Any = in_qdq(dtype, self.e4m3_dtype, jnp.asarray(lhs, dtype), *self.state("input"))
        kernel: Any = in_qdq(dtype, self.e4m3_dtype, rhs, *self.state("kernel"))
        y = dot_general_with_precision(x, kernel, dimension_numbers, preferred_element_type=preferred_element_type)
        return out_qdq(dtype, self.e5m2_dtype, y, *self.state("output_grad"))


class Fp8DirectDotGeneralOp(Fp8DotGeneralBase):
    """`jax.lax.dot_general` of operands in 8 bits"""

    def __call__(self, lhs: Array, rhs: Array, dimension_numbers: Any, precision: lax.PrecisionLike = None,
                 preferred_element_type: DTypeLike | None = None, **options: Any) -> Array:  # fmt: skip
        return self.product(jnp.asarray(lhs, rhs.dtype), rhs, dimension_numbers, quantize_compute_type=rhs.dtype,
                            preferred_element_type=preferred_element_type or rhs.dtype)  # fmt: skip


Fp8DotGeneral = Fp8DirectDotGeneralOp


class NANOOFp8DotGeneralOp(Fp8DotGeneralOp):
    """`Fp8DotGeneralOp` in the 8-bit dtypes without negative zero"""

    e4m3_dtype: Any = jnp.float8_e4m3fnuz
    e5m2_dtype: Any = jnp.float8_e5m2fnuz


class Fp8Einsum(Fp8DotGeneralBase):
    """`jax.numpy.einsum` of two operands in 8 bits"""

    def __call__(self, eqn: str, lhs: Array, rhs: Array, precision: lax.Precision | None = None,
                 preferred_element_type: DTypeLike | None = None) -> Array:  # fmt: skip
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
        return jnp.einsum(eqn, lhs.astype(rhs.dtype), rhs, precision=precision,
                          preferred_element_type=preferred_element_type,
                          _dot_general=self.product)  # fmt: skip
