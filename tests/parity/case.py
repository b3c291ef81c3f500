# SPDX-License-Identifier: Apache-2.0
"""One row of the parity table: how to build a layer with either library, and what to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Case:
    """A layer in one configuration.

    Args:
        name: unique; the test's id.
        build: `build(lib)` makes the layer, with `lib` either library's `nnx`, from fixed seeds.
        inputs: arrays for the call; gradients are taken with respect to those of a float dtype.
        call: `call(layer, *inputs)`, where it is more than calling the layer. Returns an array or a tree of arrays.
        tolerance: relative and absolute.
    """

    name: str
    build: Callable[[Any], Any]
    inputs: tuple[Any, ...]
    call: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)
    tolerance: float = 1e-5


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Numbers from the standard normal distribution, the same ones for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def distinct(*shape: int) -> np.ndarray:
    """The numbers 0 .. n-1 in random order, centred: no two are equal."""
    size = int(np.prod(shape))
    return (np.random.default_rng(shape).permutation(size).reshape(shape) - size / 2).astype(np.float32)


def integers(*shape: int, below: int) -> np.ndarray:
    """Whole numbers from 0 to `below` - 1."""
    return np.random.default_rng(shape).integers(0, below, shape, dtype=np.int32)
