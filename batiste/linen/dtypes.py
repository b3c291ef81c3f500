# SPDX-License-Identifier: Apache-2.0
"""Promotion of dtypes, with the signature that it has in the functional face."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jax.typing import DTypeLike

from batiste import precision
from batiste.precision import canonicalize_dtype

__all__ = ["canonicalize_dtype", "promote_dtype"]


def promote_dtype(*args: Any, dtype: DTypeLike | None = None, inexact: bool = True) -> list[Any]:
    """Casts all of `args` to the one dtype that `canonicalize_dtype` finds; None stays None.

    >>> import jax.numpy as jnp
    >>> [x.dtype.name for x in promote_dtype(jnp.ones(2), jnp.ones(2, jnp.bfloat16))]
    ['float32', 'float32']
    """
    return list(precision.promote_dtype(args, dtype=dtype, inexact=inexact))


@dataclasses.dataclass(frozen=True)
class OfTuple:
    """A function of several arguments as one of their tuple, as object layers call it."""

    function: Callable[..., Any]

    def __call__(self, args: Iterable[Any], /, **options: Any) -> Any:
        return self.function(*args, **options)


def of_tuple(function: Callable[..., Any]) -> Callable[..., Any]:
    return precision.promote_dtype if function is promote_dtype else OfTuple(function)
