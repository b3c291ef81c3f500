# SPDX-License-Identifier: Apache-2.0
"""Pooling: a reduction over sliding windows of the spatial dims of `x[*batch, *spatial, features]`.

XLA has an operation for it, `reduce_window`, but what it lowers to is slow on CPUs, and the gradient of its maximum is
slower still. So the usual cases are spelled differently: a window of k elements is k strided slices, reduced element by
element; where windows neither overlap nor leave gaps a mean is a reshape and a sum. Figures: `bench/pooling.py`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from batiste.graph.errors import ArgumentError, ShapeError

Padding = str | Sequence[tuple[int, int]]

_MANY = 64  # windows of more elements go to reduce_window: one slice each would make a long program


def pool(
    inputs: Array,
    init: Any,
    reduce_fn: Callable[[Any, Any], Any],
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
) -> Array:
    """y[*batch, *out, features] = reduce_fn over each window of x[*batch, *spatial, features], starting from `init`.

    Args:
        init: the value that leaves `reduce_fn` unchanged; padding is filled with it.
        strides: one per spatial dim; None for 1.
        padding: "VALID", "SAME", "SAME_LOWER" or a `(low, high)` pair for each spatial dim.

    Raises:
        ShapeError: `inputs` has fewer dims than the windows need.
        ArgumentError: `strides` or `padding` do not fit the window.
    """
    x, window, strides, pads = _windows(inputs, window_shape, strides, padding)
    return _reduce_window(x, init, reduce_fn, window, strides, pads)


def max_pool(
    inputs: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> Array:
    """y[*batch, *out, features] = max over each window of x[*batch, *spatial, features].

    Where several elements of a window are the maximum, the gradient goes to the first of them in row-major order.

    Raises:
        ShapeError, ArgumentError: as `pool`.

    >>> max_pool(jnp.arange(4.0).reshape(4, 1), (2,), strides=(2,)).ravel()
    Array([1., 3.], dtype=float32)
    """
    return _extremum("max", inputs, window_shape, strides, padding)


def min_pool(
    inputs: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> Array:
    """y[*batch, *out, features] = min over each window of x[*batch, *spatial, features].

    Where several elements of a window are the minimum, the gradient goes to the first of them in row-major order.

    Raises:
        ShapeError, ArgumentError: as `pool`.

    >>> min_pool(jnp.arange(4.0).reshape(4, 1), (2,), strides=(2,)).ravel()
    Array([0., 2.], dtype=float32)
    """
    return _extremum("min", inputs, window_shape, strides, padding)


def avg_pool(
    inputs: Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> Array:
    """y[*batch, *out, features] = mean over each window of x[*batch, *spatial, features].

    Args:
        count_include_pad: divide by the size of the window; False divides by the elements of it that are no padding.

    Raises:
        ShapeError, ArgumentError: as `pool`.

    >>> avg_pool(jnp.arange(4.0).reshape(4, 1), (2,), strides=(2,)).ravel()
    Array([0.5, 2.5], dtype=float32)
    """
    x, window, strides, pads = _windows(inputs, window_shape, strides, padding)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # sums of bfloat16 or of small integers are not kept in these
    total = _sum(x.astype(wide), window, strides, pads)
    if count_include_pad:
        return (total / math.prod(window)).astype(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else wide)
    spatial = x.shape[-len(window) - 1 : -1]
    return total / _sum(jnp.ones((*(1,) * (x.ndim - len(window) - 1), *spatial, 1)), window, strides, pads)


# ---------------------------------------------------------------- arguments
Numbers = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


def _windows(x: Any, window: Any, strides: Any, padding: Padding) -> tuple[Array, Numbers, Numbers, Pads]:
    """The arguments in one form: an array, a window and strides with one entry per spatial dim, pairs of padding."""
    x, window = jnp.asarray(x), _numbers("window_shape", window)
    strides = (1,) * len(window) if strides is None else _numbers("strides", strides)
    if len(strides) != len(window):
        raise ArgumentError("Pooling needs as many strides as its window has dims", got=f"{strides} for {window}",
                            fix="give one stride per dim of the window, or None for 1")  # fmt: skip
    if x.ndim < len(window) + 1:
        raise ShapeError("Pooling got too few dims for its window", got=x.shape,
                         expected=f"(*batch, {', '.join(f'n{i}' for i in range(len(window)))}, features)",
                         fix="add the missing dims, or use a window_shape of fewer dims")  # fmt: skip
    spatial = x.shape[-len(window) - 1 : -1]
    if isinstance(padding, str) and padding.upper() in ("VALID", "SAME", "SAME_LOWER"):
        return x, window, strides, tuple(lax.padtype_to_pads(spatial, window, strides, padding.upper()))
    try:
        pads = tuple((int(low), int(high)) for low, high in padding)  # type: ignore[misc]
    except (TypeError, ValueError):
        pads = None
    if isinstance(padding, str) or pads is None or len(pads) != len(window):
        raise ArgumentError("Pooling got an unknown padding", got=repr(padding),
                            expected=f"'VALID', 'SAME', 'SAME_LOWER' or {len(window)} pairs (low, high)",
                            fix="choose one of these, or pad by hand and use 'VALID'")  # fmt: skip
    return x, window, strides, pads


def _numbers(name: str, value: Any) -> Numbers:
    try:
        numbers = tuple(operator.index(n) for n in value)
    except TypeError:
        numbers = (0,)
    if any(n < 1 for n in numbers):
        raise ArgumentError(f"Pooling got a wrong {name}", got=repr(value), expected="a tuple of whole numbers from 1",
                            fix=f"write {name}=(2, 2) for two spatial dims")  # fmt: skip
    return numbers


# ---------------------------------------------------------------- spellings
def _reduce_window(x: Array, init: Any, reduce_fn: Any, window: Any, strides: Any, pads: Any) -> Array:
    batch = x.ndim - len(window) - 1
    around = lambda inner, one: (one,) * batch + tuple(inner) + (one,)
    return lax.reduce_window(x, init, reduce_fn, around(window, 1), around(strides, 1), around(pads, (0, 0)))


def _pad(x: Array, value: Any, pads: Pads) -> Array:
    if not any(map(any, pads)):
        return x
    config = ((0, 0, 0),) * (x.ndim - len(pads) - 1) + tuple((low, high, 0) for low, high in pads) + ((0, 0, 0),)
    return lax.pad(x, np.asarray(value, x.dtype), config)


def _outputs(x: Array, window: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The number of windows along each spatial dim."""
    return [(size - w) // s + 1 for size, w, s in zip(x.shape[-len(window) - 1 : -1], window, strides)]


def _is_small(x: Array, window: Sequence[int], strides: Sequence[int]) -> bool:
    return math.prod(window) <= _MANY and all(n > 0 for n in _outputs(x, window, strides))


def _slices(x: Array, window: Sequence[int], strides: Sequence[int]) -> Iterator[Array]:
    """For each place in the window, in row-major order, the elements of `x` at that place of all windows."""
    batch, outputs = x.ndim - len(window) - 1, _outputs(x, window, strides)
    steps = (1,) * batch + tuple(strides) + (1,)
    for offset in itertools.product(*map(range, window)):
        stop = tuple(start + (n - 1) * step + 1 for start, n, step in zip(offset, outputs, strides))
        yield lax.slice(x, (0,) * batch + offset + (0,), x.shape[:batch] + stop + x.shape[-1:], steps)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sum(x: Array, window: Numbers, strides: Numbers, pads: Pads) -> Array:
    padded = _pad(x, 0, pads)
    if window == strides and window and not _is_split(padded):
        return _tiled(padded, window)
    if _is_small(padded, window, strides):
        return functools.reduce(operator.add, _slices(padded, window, strides))
    return _reduce_window(x, np.zeros((), x.dtype), lax.add, window, strides, pads)


def _is_split(x: Array) -> bool:
    """Whether the type of `x` says which mesh axes its dims lie on: then a reshape would not know where to put them."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)


def _tiled(x: Array, window: Numbers) -> Array:
    """The sum over windows that neither overlap nor leave gaps; what is left over at the end is dropped."""
    batch = x.ndim - len(window) - 1
    counts = _outputs(x, window, window)
    for dim, (n, w) in enumerate(zip(counts, window), batch):
        x = lax.slice_in_dim(x, 0, n * w, axis=dim)
    pairs = itertools.chain.from_iterable(zip(counts, window))
    x = x.reshape(*x.shape[:batch], *pairs, x.shape[-1])
    return x.sum(tuple(range(batch + 1, batch + 2 * len(window), 2)))


_BETTER = {"max": (operator.ge, lax.max, -jnp.inf), "min": (operator.le, lax.min, jnp.inf)}


def _extremum(which: str, x: Any, window: Any, strides: Any, padding: Padding) -> Array:
    x, window, strides, pads = _windows(x, window, strides, padding)
    better, reduce_fn, worst = _BETTER[which]
    if jnp.issubdtype(x.dtype, jnp.floating):
        padded = _pad(x, worst, pads)
        if _is_small(padded, window, strides):
            return _best_compiled(better, padded, window, strides)
    return _reduce_window(x, worst, reduce_fn, window, strides, pads)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2, 3))
def _best(better: Any, x: Array, window: Numbers, strides: Numbers) -> Array:
    return _pick(better, x, window, strides)[0]


@_best.defjvp
def _best_jvp(better, window, strides, primals, tangents):
    # One mask per place of the window: the place is remembered, not the chain of comparisons that led to it.
    best, place = _pick(better, primals[0], window, strides)
    parts = enumerate(_slices(tangents[0], window, strides))
    return best, functools.reduce(operator.add, (jnp.where(place == number, part, 0) for number, part in parts))


_best_compiled = jax.jit(_best, static_argnums=(0, 2, 3))


def _pick(better: Any, x: Array, window: Numbers, strides: Numbers) -> tuple[Array, Array]:
    """The best element of each window, and the number of its place; the first of equals wins, NaN wins over all."""
    slices = _slices(x, window, strides)
    best = next(slices)
    place = jnp.zeros(best.shape, jnp.uint8)
    for number, candidate in enumerate(slices, 1):
        stays = better(best, candidate) | (best != best)
        best, place = jnp.where(stays, best, candidate), jnp.where(stays, place, jnp.uint8(number))
    return best, place
