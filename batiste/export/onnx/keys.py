# SPDX-License-Identifier: Apache-2.0
"""Random keys in ONNX: a key is its two words (uint32[..., 2]), and draws are JAX's threefry, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_prng_impl as threefry

from ..errors import ExportError
from .graph import Graph, rule

KEY = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


def is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def refuse_others(dtype: Any) -> None:
    """Raises ExportError for keys of another kind."""
    if is_key(dtype) and dtype != KEY:
        raise ExportError(
            "ONNX draws with keys of threefry only", got=dtype, fix="jax.random.key(0, impl='threefry2x32')"
        )


def words(aval: Any) -> jax.ShapeDtypeStruct:
    """The words of an array of keys."""
    return jax.ShapeDtypeStruct((*aval.shape, 2), np.uint32) if is_key(aval.dtype) else aval


def over_keys(function: Any, ndim: int) -> Any:
    """The function of one key, of each."""
    for _ in range(ndim):
        function = jax.vmap(function)
    return function


@rule("random_wrap", "random_unwrap", "random_clone")
def same_words(graph: Graph, eqn: Any, x: str) -> str:
    return x


@rule("random_seed")
def random_seed(graph: Graph, eqn: Any, seed: str) -> list[str]:
    aval = eqn.invars[0].aval
    return graph.traced(over_keys(threefry.seed, len(aval.shape)), [aval], [seed])


@rule("random_split")
def random_split(graph: Graph, eqn: Any, key: str) -> list[str]:
    aval, shape = eqn.invars[0].aval, tuple(eqn.params["shape"])
    return graph.traced(over_keys(lambda key: threefry.split(key, shape), len(aval.shape)), [words(aval)], [key])


@rule("random_fold_in")
def random_fold_in(graph: Graph, eqn: Any, key: str, number: str) -> list[str]:
    key_aval, number_aval = (v.aval for v in eqn.invars)
    fold = over_keys(threefry.fold_in, len(key_aval.shape))
    return graph.traced(lambda k, n: fold(k, n.astype(np.uint32)), [words(key_aval), number_aval], [key, number])


@rule("random_bits")
def random_bits(graph: Graph, eqn: Any, key: str) -> list[str]:
    aval, width, shape = eqn.invars[0].aval, eqn.params["bit_width"], tuple(eqn.params["shape"])
    draw = over_keys(lambda key: threefry.random_bits(key, width, shape), len(aval.shape))
    return graph.traced(draw, [words(aval)], [key])
