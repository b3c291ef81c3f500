# SPDX-License-Identifier: Apache-2.0
"""Initialisers: functions `(key, shape, dtype) -> array` that draw the first values of parameters.

Those of JAX under their own names, and the two that build one: `zeros_init()`, `ones_init()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.nn.initializers as _of_jax
from jax.nn.initializers import (
    constant,
    delta_orthogonal,
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    lecun_uniform,
    normal,
    ones,
    orthogonal,
    truncated_normal,
    uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
    zeros,
)

DtypeLikeInexact = Any
Initializer = _of_jax.Initializer | Callable[..., Any]


def zeros_init() -> Initializer:
    """The initialiser that fills with zeros.

    >>> zeros_init()(None, (2,), "float32")
    Array([0., 0.], dtype=float32)
    """
    return zeros


def ones_init() -> Initializer:
    """The initialiser that fills with ones.

    >>> ones_init()(None, (2,), "float32")
    Array([1., 1.], dtype=float32)
    """
    return ones


__all__ = [
    "DtypeLikeInexact",
    "Initializer",
    "constant",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "ones_init",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
    "zeros_init",
]
