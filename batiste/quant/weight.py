# SPDX-License-Identifier: Apache-2.0
"""Weights of a few bits: whole numbers and scales, read as floats.

w ≈ q · s,   s = greatest of |w| in a group / (2^(bits-1) - 1),   q = round(w / s)

A group is a part of what one result sums over: all of it (one scale per channel), or `group` values on end.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste.graph import Variable
from batiste.graph.variable import MISSING

BITS = (8, 4)


class Quantized(NamedTuple):
    """What a `QuantizedWeight` stores: q[*lead, groups, group, channels] and its scale[*lead, groups, 1, channels]

    4-bit numbers lie in pairs in bytes, q[*lead, groups, group / 2, channels]. `lead` are the leading dims of a stack
    of layers.
    """

    q: Array
    scale: Array


class QuantizedWeight(Variable, collection="quantized"):
    """A weight of 8 or 4 bits: `w[...]` gives floats, the value is a `Quantized`

    It stands where the layer has its `Param`, so that the layer need not know. It is no `Param`: it is not trained, and
    policies leave it alone.

    >>> w = quantized(jnp.array([[1.0, -4.0], [0.5, 2.0]]), axes=(0,))
    >>> w.get_value().q.ravel().tolist(), w.shape
    ([127, -127, 64, 64], (2, 2))
    >>> w[...].round(1).tolist()
    [[1.0, -4.0], [0.5, 2.0]]
    """

    def get_value(self, *, index: Any = MISSING) -> Any:
        """A `Quantized`; with an index, floats."""
        value = super().get_value()
        return value if index is MISSING else self.floats()[index]

    def floats(self) -> Array:
        """The weight, in its shape and dtype."""
        return as_floats(super().get_value(), self.bits, self.of_shape, self.axes, self.float_dtype)

    def __jax_array__(self) -> Array:
        return self.floats()

    @property
    def shape(self) -> tuple[int, ...]:
        value: Any = super().get_value()
        return (*value.q.shape[:-3], *self.of_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.float_dtype)

    @property
    def nbytes(self) -> int:
        """Of whole numbers and scales."""
        value: Any = super().get_value()
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in value)


def quantized(w: Array, axes: tuple[int, ...], *, bits: int = 8, group: int | None = None, lead: int = 0,
              scale_dtype: DTypeLike = jnp.float32) -> QuantizedWeight:  # fmt: skip
    """A weight as a `QuantizedWeight`.

    Args:
        axes: those over which a result sums, without the leading dims.
        bits: 8 or 4.
        group: how many values share a scale; None for all that are summed over.
        lead: how many leading dims belong to a stack of layers.
    """
    value = as_numbers(w, axes, bits, group, lead, scale_dtype)
    return QuantizedWeight(value, bits=bits, of_shape=w.shape[lead:], axes=axes, float_dtype=str(w.dtype))


def as_numbers(w: Array, axes: tuple[int, ...], bits: int, group: int | None, lead: int,
               scale_dtype: DTypeLike = jnp.float32) -> Quantized:  # fmt: skip
    """The whole numbers and scales of a weight; see `quantized`"""
    parts = as_groups(w, axes, bits, group, lead)
    greatest = jnp.max(jnp.abs(parts), axis=-2, keepdims=True).astype(jnp.float32)
    levels = 2 ** (bits - 1) - 1
    scale = jnp.where(greatest > 0, greatest / levels, 1.0).astype(scale_dtype)
    q = jnp.clip(jnp.round(parts / scale), -levels, levels).astype(jnp.int8)
    return Quantized(packed(q) if bits == 4 else q, scale)


def as_floats(value: Any, bits: int, shape: tuple[int, ...], axes: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The way back of `as_numbers`"""
    q = unpacked(value.q) if bits == 4 else value.q
    return as_weight(q.astype(dtype) * value.scale.astype(dtype), shape, axes)


# ---------------------------------------------------------------- shapes
def as_groups(w: Array, axes: tuple[int, ...], bits: int, group: int | None, lead: int) -> Array:
    """[*lead, *shape] -> [*lead, groups, group, channels], the last group filled up with zeros"""
    shape = w.shape[lead:]
    order = (*range(lead), *(lead + i for i in _order(shape, axes)))
    summed = math.prod(shape[i] for i in axes)
    size = group or summed + (summed % 2 if bits == 4 else 0)
    groups = -(-summed // size)
    matrix = w.transpose(order).reshape(*w.shape[:lead], summed, -1)
    matrix = jnp.pad(matrix, [(0, 0)] * lead + [(0, groups * size - summed), (0, 0)])
    return matrix.reshape(*w.shape[:lead], groups, size, matrix.shape[-1])


def as_weight(parts: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The way back of `as_groups`"""
    *lead, groups, size, channels = parts.shape
    order = _order(shape, axes)
    matrix = parts.reshape(*lead, groups * size, channels)[..., : math.prod(shape[i] for i in axes), :]
    back = [len(lead) + order.index(i) for i in range(len(shape))]
    return matrix.reshape(*lead, *(shape[i] for i in order)).transpose(*range(len(lead)), *back)


def _order(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*axes, *(i for i in range(len(shape)) if i not in axes))


def packed(q: Array) -> Array:
    """Numbers from -8 to 7 in pairs: [..., n, channels] -> [..., n / 2, channels]"""
    return (q[..., 0::2, :] & 15) | (q[..., 1::2, :] << 4)


def unpacked(q: Array) -> Array:
    """The way back of `packed`

    >>> unpacked(packed(jnp.array([[-8], [7], [-1], [0]], jnp.int8))).ravel().tolist()
    [-8, 7, -1, 0]
    """
    pairs = jnp.stack(((q << 4) >> 4, q >> 4), axis=-2)  # the shift to the right keeps the sign
    return pairs.reshape(*q.shape[:-2], 2 * q.shape[-2], q.shape[-1])
