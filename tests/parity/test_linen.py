# SPDX-License-Identifier: Apache-2.0
"""For every row of the table: the same key gives the same variables, results, changed collections and gradients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.linen
from tests.parity.case import Case
from tests.parity.linen_cases import CASES

every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")


@functools.cache
def run(lib: Any, case: Case) -> tuple[Any, Any, Any, Any]:
    """The variables that `init` makes, the result and the changed collections of `apply`, and the gradients."""
    module, inputs = case.build(lib), [jnp.asarray(x) for x in case.inputs]
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    method = lambda module, *inputs: case.call(module, *inputs)
    variables = jax.jit(functools.partial(module.init, method=method))(keys, *inputs)
    floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in inputs]

    @jax.jit
    def forward_and_back(params, rest, some, others):
        def forward(params, some):
            some_left, others_left = iter(some), iter(others)
            args = [next(some_left if yes else others_left) for yes in floats]
            variables = {**rest, "params": params} if params else rest
            return module.apply(variables, *args, rngs={"dropout": keys["dropout"]}, mutable=True, method=method)

        out, pull, state = jax.vjp(forward, params, some, has_aux=True)
        direction = (1 + jnp.sin(jnp.arange(out.size)).reshape(out.shape) / 2).astype(out.dtype)
        return out, state, pull(direction)

    rest = {col: tree for col, tree in variables.items() if col != "params"}
    some = [x for x, yes in zip(inputs, floats) if yes]
    others = [x for x, yes in zip(inputs, floats) if not yes]
    return variables, *forward_and_back(variables.get("params", {}), rest, some, others)


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        as_float = [np.asarray(x, np.float32) for x in (mine, other)]
        np.testing.assert_allclose(*as_float, rtol=tolerance, atol=tolerance)


@every_layer
def test_the_same_key_gives_the_same_variables_bit_for_bit(case):
    ours, theirs = run(batiste.linen, case)[0], run(flax.linen, case)[0]
    assert_close(ours, theirs, 0)


@every_layer
def test_results_and_changed_collections_agree(case):
    ours, theirs = run(batiste.linen, case), run(flax.linen, case)
    assert_close(ours[1:3], theirs[1:3], case.tolerance)


@every_layer
def test_gradients_agree(case):
    assert_close(run(batiste.linen, case)[3], run(flax.linen, case)[3], case.tolerance)


NAMES = {type(case.build(flax.linen)).__name__ for case in CASES}
LAYERS = sorted(name for name in NAMES if hasattr(flax.linen, name))


@pytest.mark.parametrize("name", LAYERS)
def test_fields_have_the_same_names_order_and_defaults(name):
    ours, theirs = (inspect.signature(getattr(lib, name)).parameters.values() for lib in (batiste.linen, flax.linen))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.name == other.name
        assert (mine.default is mine.empty) == (other.default is other.empty)
        if not callable(other.default) and not isinstance(other.default, Mapping) and mine.name != "parent":
            assert mine.default == other.default


@pytest.mark.parametrize("name", LAYERS)
def test_calls_have_the_same_arguments(name):
    ours, theirs = (inspect.signature(getattr(lib, name).__call__).parameters for lib in (batiste.linen, flax.linen))
    assert list(ours) == list(theirs)
    assert [x.kind for x in ours.values()] == [x.kind for x in theirs.values()]
