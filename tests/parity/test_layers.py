# SPDX-License-Identifier: Apache-2.0
"""For every row of the parity table: the same seed gives the same numbers, going in, coming out, and going back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.nnx
from tests.parity.case import Case
from tests.parity.layers import CASES

every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def plain(value: Any) -> np.ndarray:
    """A leaf as a NumPy array; keys as their numbers."""
    value = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return np.asarray(value)


def described(lib: Any, layer: Any) -> list[tuple[tuple, str, tuple, str]]:
    """Path, kind, shape and dtype of everything in the state."""
    flat = lib.to_flat_state(lib.state(layer))
    kind = lambda leaf: type(leaf).__name__ if isinstance(leaf, lib.Variable) else "array"
    return [(path, kind(leaf), leaf.shape, str(leaf.dtype)) for path, leaf in flat]


def attributes(layer: Any) -> list[tuple[str, bool]]:
    """The public attributes in the order in which they were set, and whether each is data."""
    return [(name, is_data) for name, is_data in layer._pytree__nodes.items() if not name.startswith("_")]


class Run(NamedTuple):
    """What one library made of a case."""

    before: list[np.ndarray]  # the state after construction
    out: list[np.ndarray]
    parameters: list[np.ndarray]  # gradients
    inputs: list[np.ndarray]  # gradients
    after: list[np.ndarray]  # the state after the call


@functools.cache
def run(lib: Any, case: Case) -> Run:
    graphdef, params, rest = lib.split(case.build(lib), lib.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    others = jax.tree.leaves(rest)
    differentiable = [np.issubdtype(np.asarray(x).dtype, np.floating) or x.dtype == jnp.bfloat16 for x in case.inputs]

    @jax.jit
    def forward_and_back(leaves, rest, inputs):
        def forward(leaves, some):
            some = iter(some)
            args = [next(some) if yes else x for yes, x in zip(differentiable, inputs)]
            others = jax.tree.map(lambda x: x, rest)  # Variables of this trace level, which may be written
            layer = lib.merge(graphdef, jax.tree.unflatten(structure, leaves), others)
            out = case.call(layer, *args)
            return out, jax.tree.leaves(lib.state(layer))

        some = [x for yes, x in zip(differentiable, inputs) if yes]
        out, pull, after = jax.vjp(forward, leaves, some, has_aux=True)
        # a direction that is the same for both and for which no two outputs cancel
        direction = jax.tree.map(lambda y: (1 + jnp.sin(jnp.arange(y.size)).reshape(y.shape) / 2).astype(y.dtype), out)
        return out, pull(direction), after

    out, (d_leaves, d_inputs), after = forward_and_back(leaves, rest, [jnp.asarray(x) for x in case.inputs])
    lists = [leaves + others, jax.tree.leaves(out), d_leaves, d_inputs, after]
    return Run(*([plain(x) for x in leaves] for leaves in lists))


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float) -> None:
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    for mine, other in zip(ours, theirs):
        as_float = [x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for x in (mine, other)]
        np.testing.assert_allclose(*as_float, rtol=tolerance, atol=tolerance)


@every_layer
def test_the_same_seed_gives_the_same_state_bit_for_bit(case):
    assert described(batiste.nnx, case.build(batiste.nnx)) == described(flax.nnx, case.build(flax.nnx))
    for mine, other in zip(run(batiste.nnx, case).before, run(flax.nnx, case).before, strict=True):
        np.testing.assert_array_equal(mine, other, strict=True)


@every_layer
def test_attributes_have_the_same_names_order_and_status(case):
    assert attributes(case.build(batiste.nnx)) == attributes(case.build(flax.nnx))


@pytest.mark.parametrize("name", sorted({type(case.build(flax.nnx)).__name__ for case in CASES}))
@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_signatures_are_the_same(name, method):
    ours, theirs = (getattr(getattr(lib, name), method) for lib in (batiste.nnx, flax.nnx))
    for mine, other in zip(*(inspect.signature(f).parameters.values() for f in (ours, theirs)), strict=True):
        assert (mine.name, mine.kind) == (other.name, other.kind)
        assert (mine.default is mine.empty) == (other.default is other.empty)
        if not callable(other.default) and not isinstance(other.default, Mapping):  # each library's own functions
            assert mine.default == other.default


@every_layer
def test_outputs_and_the_state_after_the_call_agree(case):
    ours, theirs = run(batiste.nnx, case), run(flax.nnx, case)
    assert_close(ours.out, theirs.out, case.tolerance)
    assert_close(ours.after, theirs.after, case.tolerance)


@every_layer
def test_gradients_of_parameters_and_inputs_agree(case):
    ours, theirs = run(batiste.nnx, case), run(flax.nnx, case)
    assert_close(ours.parameters, theirs.parameters, case.tolerance)
    assert_close(ours.inputs, theirs.inputs, case.tolerance)


class Likeness(SimpleNamespace):
    """Has a layer's public attributes, and is called by the layer's `__call__`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.of.__call__(self, *args, **options)


METHODS_TOO = {"Einsum", "LoRALinear", "SpectralNorm", "WeightNorm"}  # with Flax, too, their calls need more of them
ONE_OF_EACH = {type(case.build(batiste.nnx)).__name__: case for case in reversed(CASES)}


@pytest.mark.parametrize("name", sorted(set(ONE_OF_EACH) - METHODS_TOO))
def test_a_call_reads_public_attributes_alone(name):
    """So programs may call `Conv.__call__` with an object of theirs, and no name of a subclass gets in its way."""
    case = ONE_OF_EACH[name]
    layer = case.build(batiste.nnx)
    public = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    out = case.call(Likeness(of=type(layer), **public), *map(jnp.asarray, case.inputs))
    assert_close([plain(x) for x in jax.tree.leaves(out)], run(flax.nnx, case).out, case.tolerance)
