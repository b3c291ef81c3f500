# SPDX-License-Identifier: Apache-2.0
"""A function over merged leading dims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from batiste.graph.errors import ArgumentError


class BatchApply:
    """f with the first `num_dims` dims of all its arguments made one, and split again in its results

    >>> BatchApply(jnp.sum, num_dims=2)(jnp.ones((2, 3, 4))).shape
    ()
    """

    def __init__(self, f: Callable[..., Any], num_dims: int = 2):
        self.f, self.num_dims = f, num_dims

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays = [jnp.shape(x) for x in jax.tree.leaves((args, kwargs)) if jnp.ndim(x) >= self.num_dims]
        if not arrays:
            raise ArgumentError(f"BatchApply requires at least one input of {self.num_dims} dims or more",
                                fix="pass an array with the dims to merge, or another num_dims")  # fmt: skip
        leading = arrays[0][: self.num_dims]
        merge = lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[self.num_dims :])) if jnp.ndim(x) >= self.num_dims else x
        split = lambda y: jnp.reshape(y, (*leading, *jnp.shape(y)[1:])) if jnp.ndim(y) else y
        args, kwargs = jax.tree.map(merge, (args, kwargs))
        return jax.tree.map(split, self.f(*args, **kwargs))
