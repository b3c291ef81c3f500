# SPDX-License-Identifier: Apache-2.0
"""The dtype in which a layer computes, found from its arguments and its `dtype` setting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from batiste.graph.errors import ArgumentError


def canonicalize_dtype(*args: Any, dtype: DTypeLike | None = None, inexact: bool = True) -> DTypeLike:
    """The dtype that all of `args` are to be computed in: `dtype` where one is given, else what JAX promotes them to.

    Args:
        args: arrays or scalars; None is passed over.
        inexact: the result must be a float or complex dtype; integers are lifted to float32.

    Raises:
        ArgumentError: nothing to find a dtype from, or `dtype` is an integer one where an inexact one is needed.

    >>> canonicalize_dtype(jnp.ones(2, jnp.int8), None), canonicalize_dtype(jnp.ones(2, jnp.int8), inexact=False)
    (dtype('float32'), dtype('int8'))
    """
    if dtype is None:
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in args if x is not None]
        if not arrays:
            raise ArgumentError("No dtype can be found: at least one array or dtype is required",
                                fix="give an array that is not None, or dtype=")  # fmt: skip
        dtype = jnp.result_type(*arrays)
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    elif inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ArgumentError("Dtype must be inexact", got=jnp.dtype(dtype), expected="a float or complex dtype",
                            fix="leave dtype=None, or name one such as jnp.bfloat16")  # fmt: skip
    return dtype


def promote_dtype(args: Iterable[Any], /, *, dtype: DTypeLike | None = None, inexact: bool = True) -> tuple[Any, ...]:
    """Casts all of `args` to the one dtype that `canonicalize_dtype` finds; None stays None.

    Raises:
        ArgumentError: as `canonicalize_dtype`.

    >>> [x.dtype.name for x in promote_dtype((jnp.ones(2), jnp.ones(2, jnp.bfloat16)))]
    ['float32', 'float32']
    """
    args = tuple(args)
    dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
    return tuple(_cast(x, dtype) for x in args)


def _cast(x: Any, dtype: DTypeLike) -> Any:
    if x is None or (isinstance(x, jax.Array) and x.dtype == dtype and not x.weak_type):
        return x
    return jnp.asarray(x, dtype)
