# SPDX-License-Identifier: Apache-2.0
"""Operations that ONNX lacks, out of operations of JAX that it has: each is traced, and its program translated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..errors import ExportError
from .graph import Graph, rule

Array = jax.Array


def composed(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Says that `function(*values, **params)` computes these primitives; `which` is given if there are several."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        @rule(*names)
        def translated(graph: Graph, eqn: Any, *inputs: str) -> list[str]:
            more = {"which": eqn.primitive.name} if len(names) > 1 else {}
            avals = [v.aval for v in eqn.invars]
            return graph.traced(lambda *values: function(*values, **more, **eqn.params), avals, inputs)

        return function

    return note


# ---------------------------------------------------------------- functions of one element


@composed("atan2")
def atan2(y: Array, x: Array) -> Array:
    """The angle of (x, y); 0/0 counts as 0, and a sign of zero is looked at."""
    least, most = jnp.minimum(abs(x), abs(y)), jnp.maximum(abs(x), abs(y))
    both = jnp.isinf(least)
    ratio = jnp.where(both, 1, least / jnp.where(both | (most == 0), 1, most))
    angle = lax.atan(ratio)
    angle = jnp.where(abs(y) > abs(x), np.pi / 2 - angle, angle)
    angle = jnp.where(negative(x), np.pi - angle, angle)
    angle = jnp.where(negative(y), -angle, angle)
    return jnp.where((x != x) | (y != y), jnp.nan, angle).astype(x.dtype)


def negative(x: Array) -> Array:
    """Of -0 too, whose inverse is -∞."""
    return (x < 0) | ((x == 0) & (1 / x < 0))


# p(w) of Giles, for w below 5 and above, the highest power first
NEAR = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
        -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
FAR = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
       0.00943887047, 1.00167406, 2.83297682)  # fmt: skip


@composed("erf_inv")
def erf_inv(x: Array) -> Array:
    """x p(-log(1 - x²))

    Source: Giles 2010, "Approximating the erfinv function", single precision.
    """
    w = -lax.log1p(-x * x)
    near, far = w - 2.5, lax.sqrt(jnp.maximum(w, 5)) - 3
    p = jnp.where(w < 5, polynomial(NEAR, near), polynomial(FAR, far))
    return jnp.where(abs(x) == 1, x * jnp.inf, p * x).astype(x.dtype)


def polynomial(coefficients: Any, x: Array) -> Array:
    """By Horner's rule, the highest power first."""
    found = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        found = found * x + c
    return found


LANCZOS = (0.99999999999980993227684700473478, 676.520368121885098567009190444019, -1259.13921672240287047156078755283,
           771.3234287776530788486528258894, -176.61502916214059906584551354, 12.507343278686904814458936853,
           -0.13857109526572011689554707, 9.984369578019570859563e-6, 1.50563273514931155834e-7)  # fmt: skip
G = 7


def lanczos(z: Array) -> tuple[Array, Array]:
    """The sum over c_k / (z + k) of Γ(z + 1), and its derivative."""
    total, slope = jnp.full_like(z, LANCZOS[0]), jnp.zeros_like(z)
    for k, c in enumerate(LANCZOS[1:], 1):
        total, slope = total + c / (z + k), slope - c / (z + k) ** 2
    return total, slope


@composed("lgamma")
def lgamma(x: Array) -> Array:
    """log |Γ(x)|, below ½ by reflection

    Source: Lanczos 1964, "A precision approximation of the gamma function", g = 7 and nine terms.
    """
    z = jnp.where(x < 0.5, -x, x - 1)
    total, _ = lanczos(z)
    t = z + G + 0.5
    log_t = np.log(G + 0.5) + lax.log1p(z / (G + 0.5))
    found = (z + 0.5 - t / log_t) * log_t + lax.log(total) + np.log(2 * np.pi) / 2
    part = abs(x) - lax.floor(abs(x))
    part = jnp.where(part > 0.5, 1 - part, part)
    reflected = np.log(np.pi) - lax.log(lax.sin(np.pi * part)) - found
    found = jnp.where(x < 0.5, jnp.where(part == 0, jnp.inf, reflected), found)
    return jnp.where(jnp.isinf(x), jnp.inf, found).astype(x.dtype)


@composed("digamma")
def digamma(x: Array) -> Array:
    """d/dx log |Γ(x)|, of the same series"""
    z = jnp.where(x < 0.5, -x, x - 1)
    total, slope = lanczos(z)
    found = np.log(G + 0.5) + lax.log1p(z / (G + 0.5)) + slope / total - G / (z + G + 0.5)
    part = x - lax.floor(x + 0.5)  # around 0, where the tangent is exact
    reflected = found - np.pi / lax.tan(np.pi * part)
    return jnp.where(x < 0.5, jnp.where((x <= 0) & (x == lax.floor(x)), jnp.nan, reflected), found).astype(x.dtype)


@composed("reduce_precision")
def reduce_precision(x: Array, exponent_bits: int, mantissa_bits: int) -> Array:
    kinds = {(8, 23): jnp.float32, (8, 7): jnp.bfloat16, (5, 10): jnp.float16, (11, 52): x.dtype}
    if (exponent_bits, mantissa_bits) not in kinds:
        raise ExportError("ONNX has no numbers of this precision", got=f"{exponent_bits} + {mantissa_bits} bits")
    return x.astype(kinds[exponent_bits, mantissa_bits]).astype(x.dtype)


# ---------------------------------------------------------------- along one axis

JOINED = {"cumprod": lax.mul, "cummax": lax.max, "cummin": lax.min, "cumlogsumexp": jnp.logaddexp}


@composed(*JOINED)
def cumulated(x: Array, *, which: str, axis: int, reverse: bool) -> Array:
    """A loop over the axis."""
    join = JOINED[which]
    rows = jnp.moveaxis(x, axis, 0)
    first = {"cumprod": 1, "cummax": lowest(x.dtype), "cummin": highest(x.dtype), "cumlogsumexp": -jnp.inf}[which]

    def step(so_far: Array, row: Array) -> tuple[Array, Array]:
        new = join(so_far, row).astype(x.dtype)
        return new, new

    _, found = lax.scan(step, jnp.broadcast_to(jnp.asarray(first, x.dtype), rows.shape[1:]), rows, reverse=reverse)
    return jnp.moveaxis(found, 0, axis)


def lowest(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def highest(dtype: Any) -> Any:
    return jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


@composed("approx_top_k")
def approx_top_k(x: Array, *, k: int, reduction_dimension: int, is_max_k: bool, **hints: Any) -> Any:
    """The exact one."""
    moved = jnp.moveaxis(x if is_max_k else -x, reduction_dimension, -1)
    values, places = lax.top_k(moved, k)
    values = values if is_max_k else -values
    return [jnp.moveaxis(found, -1, reduction_dimension) for found in (values, places)]


@composed("reduce_window_min")
def reduce_window_min(x: Array, **window: Any) -> Array:
    return -lax.reduce_window(-x, -np.inf, lax.max, *windows(window))


@composed("reduce_window_sum")
def reduce_window_sum(x: Array, **window: Any) -> Array:
    """Along each dim by itself: the padded input at each place of the window, added up."""
    sizes, strides, padding, inside, between = windows(window)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(*pair, n - 1) for pair, n in zip(padding, inside)])
    for axis, (size, stride, step) in enumerate(zip(sizes, strides, between)):
        if size == stride == 1:
            continue
        reach = (x.shape[axis] - (size - 1) * step - 1) // stride * stride + 1
        x = sum(lax.slice_in_dim(x, i * step, i * step + reach, stride, axis) for i in range(size))  # type: ignore[assignment]
    return x


def windows(given: dict[str, Any]) -> tuple[Any, ...]:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    return tuple(given[name] for name in names)


# ---------------------------------------------------------------- bits

WIDTH = 32
POWERS = np.ldexp(np.float32(1), np.maximum(np.arange(256), 1) - 150).astype(np.float32)


@composed("bitcast_convert_type")
def bitcast(x: Array, new_dtype: Any) -> Array:
    """Words as the numbers that IEEE 754 reads in them: a whole number of 24 bits times a power of two."""
    if (x.dtype, np.dtype(new_dtype)) != (np.uint32, np.float32):
        raise ExportError("ONNX does not read the bits of a number", got=f"{x.dtype} as {np.dtype(new_dtype)}")
    exponent = (lax.shift_right_logical(x, np.uint32(23)) & 255).astype(np.int32)
    fraction = (x & 0x7FFFFF).astype(np.int32)
    whole = jnp.where(exponent > 0, fraction + (1 << 23), fraction)
    value = whole.astype(np.float32) * jnp.asarray(POWERS)[exponent]
    value = jnp.where(exponent == 255, jnp.where(fraction == 0, jnp.inf, jnp.nan), value)
    return jnp.where(x >= np.uint32(1 << 31), -value, value)


def rotated(x: Array, by: int) -> Array:
    return (x << by) | lax.shift_right_logical(x, np.uint32(WIDTH - by))


@composed("iota_2x32_shape")
def counted(*, shape: Any) -> list[Array]:
    """0, 1, … as words, the higher one first."""
    low = lax.iota(np.uint32, int(np.prod(shape))).reshape(shape)
    return [jnp.zeros_like(low), low]


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@composed("threefry2x32")
def threefry2x32(key0: Array, key1: Array, x0: Array, x1: Array) -> list[Array]:
    """Two words, mixed with the words of a key in 20 rounds.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
    """
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for by in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ rotated(x1, by)
        x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return [x0, x1]
