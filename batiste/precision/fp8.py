# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit floats: values are scaled into their range by what was the greatest of the last calls.

q(x) = clip(x / s, ±max) in 8 bits,  x ≈ s q(x),  s = greatest of |x| in the last calls / max

The state of an operand is a scale s[1] and a history of greatest values[n]. Both are inputs, and what they should be
next comes out as their *cotangent*: an optimiser that overwrites them with their gradient keeps them up to date, also
for the gradient of the result, which is known in the backward pass only.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"
"""The collection of scales and histories."""

Meta = tuple[Array, Array]


# ---------------------------------------------------------------- scales
def get_fp8_max(fp8_dtype: DTypeLike, out_dtype: DTypeLike) -> Array:
    """The greatest number of an 8-bit float dtype."""
    return jnp.finfo(fp8_dtype).max.astype(out_dtype)


def compute_scale(amax: Array, scale: Array, fp8_max: Any, margin: int = 0) -> Array:
    """s = amax / fp8_max * 2**margin; the old scale where `amax` is 0 or not finite.

    >>> compute_scale(jnp.array([896.0]), jnp.array([1.0]), 448.0)
    Array([2.], dtype=float32)
    """
    fits = (amax > 0) & jnp.isfinite(amax)
    return jnp.where(fits, 1 / (fp8_max / jnp.where(fits, amax, 1) / 2**margin), scale)


def compute_amax_history(x: Array, amax_history: Array) -> Array:
    """The history, its oldest entry replaced by the greatest of |x|, which comes first.

    >>> compute_amax_history(jnp.array([-5.0, 2.0]), jnp.array([1.0, 2.0, 3.0]))
    Array([5., 3., 1.], dtype=float32)
    """
    greatest = jnp.max(jnp.abs(x)).astype(amax_history.dtype)
    return jnp.roll(amax_history, shift=-1, axis=0).at[0].set(greatest)


def update_fp8_meta(x: Array, q_dtype: DTypeLike, scale: Array, amax_history: Array) -> Meta:
    """The scale for `x`, from the history before it, and the history with it."""
    new = compute_scale(jnp.max(amax_history, axis=0), scale, get_fp8_max(q_dtype, jnp.float32))
    return new, compute_amax_history(x, amax_history)


# ---------------------------------------------------------------- values
def quantize(x: Array, q_dtype: DTypeLike, scale: Array, compute_dtype: DTypeLike) -> Array:
    """clip(x / scale) in `q_dtype`"""
    greatest = get_fp8_max(q_dtype, compute_dtype)
    scaled = x.astype(compute_dtype) / jnp.broadcast_to(scale.astype(compute_dtype), x.shape)
    return jnp.clip(scaled, -greatest, greatest).astype(q_dtype)


def dequantize(x: Array, dq_dtype: DTypeLike, scale: Array) -> Array:
    """x * scale in `dq_dtype`"""
    return x.astype(dq_dtype) * jnp.broadcast_to(scale.astype(dq_dtype), x.shape)


def qdq(x: Array, q_dtype: DTypeLike, scale: Array, compute_dtype: DTypeLike) -> Array:
    """`x` as it is after it has been 8 bits long.

    >>> qdq(jnp.array([1.03, 1000.0]), jnp.float8_e4m3fn, jnp.ones(1), jnp.float32).tolist()
    [1.0, 448.0]
    """
    return dequantize(quantize(x, q_dtype, scale, compute_dtype), x.dtype, scale)


def quantize_dequantize_update(
    x: Array, q_dtype: DTypeLike, scale: Array, amax_history: Array, compute_dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """`qdq` with the new scale, and the new state."""
    new, history = update_fp8_meta(x, q_dtype, scale, amax_history)
    return qdq(x, q_dtype, new, compute_dtype), new, history


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_qdq(compute_dtype: DTypeLike, q_dtype: DTypeLike, inp: Array, scale: Array, amax_history: Array) -> Array:
    """An operand in 8 bits; its cotangent passes as it is, and those of the state are the new state."""
    return quantize_dequantize_update(inp, q_dtype, scale, amax_history, compute_dtype)[0]


def _in_qdq_fwd(compute_dtype: Any, q_dtype: Any, inp: Array, scale: Array, amax_history: Array) -> tuple[Array, Meta]:
    y, *state = quantize_dequantize_update(inp, q_dtype, scale, amax_history, compute_dtype)
    return y, (state[0], state[1])


in_qdq.defvjp(_in_qdq_fwd, lambda compute_dtype, q_dtype, state, g: (g, *state))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def out_qdq(compute_dtype: DTypeLike, q_dtype: DTypeLike, out: Array, scale: Array, amax_history: Array) -> Array:
    """A result as it is, its cotangent in 8 bits; the cotangents of the state are the new state."""
    return out


out_qdq.defvjp(
    lambda compute_dtype, q_dtype, out, *state: (out, state),
    lambda compute_dtype, q_dtype, state, g: quantize_dequantize_update(g, q_dtype, state[0], state[1], compute_dtype),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_q(compute_dtype: DTypeLike, q_dtype: DTypeLike, inp: Array, scale: Array, amax_history: Array) -> Meta:
    """An operand in 8 bits, and its scale; the cotangents of the state are the new state."""
    new, _ = update_fp8_meta(inp, q_dtype, scale, amax_history)
    return quantize(inp, q_dtype, new, compute_dtype), new


def _in_q_fwd(compute_dtype: Any, q_dtype: Any, inp: Array, scale: Array, amax_history: Array) -> tuple[Meta, Any]:
    new, history = update_fp8_meta(inp, q_dtype, scale, amax_history)
    return (quantize(inp, q_dtype, new, compute_dtype), new), (inp, new, history)


in_q.defvjp(_in_q_fwd, lambda compute_dtype, q_dtype, kept, g: (jnp.zeros_like(kept[0]), *kept[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def out_dq(dq_type: DTypeLike, lhs_scale: Array, rhs_scale: Array, out: Array) -> Array:
    """The product of two operands in 8 bits, scaled back; its cotangent passes as it is."""
    return dequantize(out, dq_type, lhs_scale * rhs_scale)


out_dq.defvjp(
    lambda dq_type, lhs_scale, rhs_scale, out: (out_dq(dq_type, lhs_scale, rhs_scale, out), (lhs_scale, rhs_scale)),
    lambda dq_type, scales, g: (*map(jnp.zeros_like, scales), g),
)


# ---------------------------------------------------------------- products
@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def quantized_dot(
    lhs: Array,
    q_lhs: Array,
    lhs_scale: Array,
    rhs: Array,
    q_rhs: Array,
    rhs_scale: Array,
    out_grad_scale: Array,
    out_grad_amax_history: Array,
    dimension_numbers: Any,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """The product of two operands in 8 bits, not yet scaled; derivatives go to `lhs` and `rhs`, with 8-bit products."""
    return lax.dot_general(
        q_lhs,
        q_rhs,
        dimension_numbers,
        precision=lax.Precision.DEFAULT,
        preferred_element_type=preferred_element_type or lhs.dtype,
    )


def _quantized_dot_fwd(lhs: Array, q_lhs: Array, lhs_scale: Array, rhs: Array, q_rhs: Array, rhs_scale: Array,
                       scale: Array, history: Array, dims: Any, preferred: Any) -> tuple[Any, Any]:  # fmt: skip
    out = quantized_dot(lhs, q_lhs, lhs_scale, rhs, q_rhs, rhs_scale, scale, history, dims, preferred)
    return out, (lhs, q_lhs, lhs_scale, rhs, q_rhs, rhs_scale, scale, history)


def _quantized_dot_bwd(dims: Any, preferred: Any, kept: Any, g: Array) -> Any:
    lhs, q_lhs, lhs_scale, rhs, q_rhs, rhs_scale, scale, history = kept
    new, history = update_fp8_meta(g, jnp.float8_e5m2, scale, history)
    wide = g.dtype
    q_g = quantize(g, jnp.float8_e5m2, new, wide).astype(wide)
    product = functools.partial(
        lax.dot_general, dimension_numbers=dims, precision=lax.Precision.DEFAULT, preferred_element_type=wide
    )
    _, pull = jax.vjp(product, q_lhs.astype(wide), q_rhs.astype(wide))  # XLA fuses the casts into products of 8 bits
    of_lhs, of_rhs = pull(q_g)
    of_lhs = dequantize(of_lhs, lhs.dtype, rhs_scale * new)
    of_rhs = dequantize(of_rhs, rhs.dtype, lhs_scale * new)
    nothing = (jnp.zeros_like(x) for x in (q_lhs, lhs_scale, q_rhs, rhs_scale))
    return of_lhs, next(nothing), next(nothing), of_rhs, next(nothing), next(nothing), new, history


quantized_dot.defvjp(_quantized_dot_fwd, _quantized_dot_bwd)


def fp8_scaled_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    lhs_scale: Array,
    rhs_scale: Array,
    grad_scale: Array,
    lhs_amax_history: Array,
    rhs_amax_history: Array,
    grad_amax_history: Array,
    quantize_compute_type: DTypeLike = jnp.float32,
    e4m3_dtype: DTypeLike = jnp.float8_e4m3fn,
    out_sharding: Any = None,
) -> Array:
    """`jax.lax.dot_general` of operands in 8 bits, which are scaled back afterwards.

    Args:
        precision: without effect.
        lhs_scale, rhs_scale, grad_scale: scales of the operands and of the result's gradient.
        lhs_amax_history, rhs_amax_history, grad_amax_history: their histories.
        quantize_compute_type: what scales are applied in.
        e4m3_dtype: of the operands.
    """
    dtype = preferred_element_type or jnp.float32
    of_lhs: Any = in_q(quantize_compute_type, e4m3_dtype, lhs, lhs_scale, lhs_amax_history)
    of_rhs: Any = in_q(quantize_compute_type, e4m3_dtype, rhs, rhs_scale, rhs_amax_history)
    (q_lhs, lhs_scale), (q_rhs, rhs_scale) = of_lhs, of_rhs
    y = quantized_dot(
        lhs, q_lhs, lhs_scale, rhs, q_rhs, rhs_scale, grad_scale, grad_amax_history, dimension_numbers, dtype
    )
    return out_dq(dtype, lhs_scale, rhs_scale, y)


def dot_general_with_precision(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    **options: Any,
) -> Array:
    """`jax.lax.dot_general` in the default precision of the machine, whatever is asked for."""
    return lax.dot_general(lhs, rhs, dimension_numbers, precision=lax.Precision.DEFAULT,
                           preferred_element_type=preferred_element_type)  # fmt: skip


# ---------------------------------------------------------------- without state
def scale_of(x: Array, fp8_dtype: DTypeLike) -> Array:
    """scale[1] = greatest of |x| / max of the dtype: what uses the whole range for this very array"""
    greatest = jnp.max(jnp.abs(x)).astype(jnp.float32).reshape(1)
    return compute_scale(greatest, jnp.ones(1, jnp.float32), get_fp8_max(fp8_dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def scaled_dot(
    lhs: Array, rhs: Array, lhs_scale: Array, rhs_scale: Array, dimension_numbers: Any, preferred: DTypeLike
) -> Array:
    """The product of operands in e4m3 with these scales; its gradient in e5m2, scaled by its own greatest value."""
    return _scaled_dot_fwd(lhs, rhs, lhs_scale, rhs_scale, dimension_numbers, preferred)[0]


def _scaled_dot_fwd(
    lhs: Array, rhs: Array, lhs_scale: Array, rhs_scale: Array, dims: Any, preferred: DTypeLike
) -> tuple[Array, Any]:
    q_lhs, q_rhs = (quantize(x, jnp.float8_e4m3fn, s, jnp.float32) for x, s in ((lhs, lhs_scale), (rhs, rhs_scale)))
    out = lax.dot_general(q_lhs, q_rhs, dims, preferred_element_type=jnp.float32)
    kept = q_lhs, q_rhs, lhs_scale, rhs_scale, jnp.zeros((), lhs.dtype), jnp.zeros((), rhs.dtype)
    return dequantize(out, jnp.float32, lhs_scale * rhs_scale).astype(preferred), kept


def _scaled_dot_bwd(dims: Any, preferred: Any, kept: Any, g: Array) -> tuple[Array, ...]:
    q_lhs, q_rhs, lhs_scale, rhs_scale, lhs, rhs = kept
    g_scale = scale_of(g, jnp.float8_e5m2)
    q_g = quantize(g, jnp.float8_e5m2, g_scale, jnp.float32)
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)  # XLA fuses the casts into products of 8 bits
    product = functools.partial(lax.dot_general, dimension_numbers=dims)
    of_lhs, of_rhs = jax.vjp(product, wide(q_lhs), wide(q_rhs))[1](wide(q_g))
    of_lhs = dequantize(of_lhs, jnp.float32, rhs_scale * g_scale).astype(lhs.dtype)
    of_rhs = dequantize(of_rhs, jnp.float32, lhs_scale * g_scale).astype(rhs.dtype)
    return of_lhs, of_rhs, jnp.zeros_like(lhs_scale), jnp.zeros_like(rhs_scale)


scaled_dot.defvjp(_scaled_dot_fwd, _scaled_dot_bwd)


def fp8_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
) -> Array:
    """`jax.lax.dot_general` in 8 bits with current scaling: no state, scales come from the operands themselves

    Operands are e4m3, gradients e5m2; the result has the dtype that `jax.lax.dot_general` gives it.

    >>> x = jnp.array([[1.0, 2.0, 3.0]])
    >>> fp8_dot_general(x, x.T, (((1,), (0,)), ((), ())))
    Array([[13.649235]], dtype=float32)
    """
    dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)
    scales = scale_of(lhs, jnp.float8_e4m3fn), scale_of(rhs, jnp.float8_e4m3fn)
    y: Any = scaled_dot(lhs, rhs, *map(lax.stop_gradient, scales), as_tuples(dimension_numbers), dtype)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def as_tuples(dimension_numbers: Any) -> Any:
    """((contracted of lhs, of rhs), (batch dims of lhs, of rhs)), hashable"""
    return tuple(tuple(tuple(map(int, dims)) for dims in pair) for pair in dimension_numbers)


def fp8_einsum(equation: str, *operands: Array, **options: Any) -> Array:
    """`jax.numpy.einsum` whose products are `fp8_dot_general`"""
    return jnp.einsum(equation, *operands, _dot_general=fp8_dot_general, **options)
