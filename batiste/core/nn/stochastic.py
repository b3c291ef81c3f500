# SPDX-License-Identifier: Apache-2.0
"""Dropout as a function of a scope; the module of `batiste.linen` does the work."""

from __future__ import annotations

from jax import Array

from batiste import linen
from batiste.linen.scope import Scope

from .linear import run

__all__ = ["dropout"]


def dropout(scope: Scope, inputs: Array, rate: float, deterministic: bool = False, rng: Array | None = None) -> Array:
    """y = x * m / (1 - rate), m drawn from Bernoulli(1 - rate); see `batiste.linen.Dropout`"""
    return run(linen.Dropout, scope, dict(rate=rate, deterministic=deterministic), inputs, rng=rng)
