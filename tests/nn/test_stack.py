# SPDX-License-Identifier: Apache-2.0
"""Stack: the same numbers and the same checkpoint, however the layers are gone through."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from batiste import nnx
from batiste.graph.errors import ArgumentError, CarryError, ShapeError
from batiste.nn.stack import Stack

X = jax.random.normal(jax.random.key(1), (4, 8))
N = 6
WAYS = [(run, remat) for run in ("scan", "unroll") for remat in (None, "full", "dots", "names:hidden", "sqrt")]


class Block(nnx.Module):
    """A layer with all kinds of state: parameters, statistics, a random stream."""

    traced = 0

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = False) -> jax.Array:
        Block.traced += 1
        hidden = checkpoint_name(jax.nn.gelu(self.norm(self.linear(x))), "hidden")
        hidden = self.dropout(hidden, deterministic=deterministic)
        return x + (hidden if mask is None else hidden * mask)


def make(**settings: Any) -> Stack:
    return Stack(Block, N, rngs=nnx.Rngs(0), **settings)


@nnx.jit(static_argnames="deterministic")
def step(model: Stack, x: jax.Array, deterministic: bool) -> Any:
    return nnx.value_and_grad(lambda m: (m(x, jnp.ones((4, 1)), deterministic=deterministic) ** 2).mean())(model)


@pytest.mark.parametrize(("run", "remat"), WAYS)
def test_every_way_gives_the_numbers_of_a_loop(run: Any, remat: Any) -> None:
    model = make(run=run, remat=remat)
    layers = model.unstacked()

    def loop(layers):
        x = X
        for layer in layers:
            x = layer(x)
        return (x**2).mean()

    expected, gradients = nnx.value_and_grad(loop)(layers)
    value, gradient = step(model, X, False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        gradient["layers"]["linear"]["kernel"][...],
        jnp.stack([gradients[i]["linear"]["kernel"][...] for i in range(N)]), rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    for path, got in nnx.to_flat_state(nnx.state(model.layers, nnx.Not(nnx.Param))):
        of_layers = [dict(nnx.to_flat_state(nnx.state(layer)))[path][...] for layer in layers]
        got, wanted = got[...], jnp.stack(of_layers)
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_ways_share_a_state_and_are_set_from_outside() -> None:
    class Model(nnx.Module):
        def __init__(self):
            self.blocks = make()

    model = Model()
    before = nnx.state(model)
    model.set_attributes(Stack, run="unroll", remat="dots")
    assert (model.blocks.run, model.blocks.remat) == ("unroll", "dots")
    assert jax.tree.structure(before) == jax.tree.structure(nnx.state(model))


def test_unrolled_each_layer_is_traced_once() -> None:
    model = make(run="unroll")
    Block.traced = 0
    jax.eval_shape(nnx.jit(lambda model, x: model(x, deterministic=True)), model, X)
    assert Block.traced == 1
    step(model, X, True)
    in_jit = Block.traced
    step(model, X, True)
    assert Block.traced == in_jit <= 3


def test_random_streams_differ_per_layer() -> None:
    keys = jax.random.key_data(make().layers.dropout.rngs.key[...])
    assert len(np.unique(keys, axis=0)) == N


def test_each_and_aux_and_what_is_sown() -> None:
    class Gate(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, each, shared):
            shared.count[...] += 1
            self.sow(nnx.Intermediate, "seen", x.sum())
            return x + self.scale * each, each * 2

    class Shared(nnx.Module):
        def __init__(self):
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    for run in ("scan", "unroll"):
        stack, shared = Stack(Gate, 3, rngs=nnx.Rngs(0), has_aux=True, run=run), Shared()
        captured = nnx.capture(stack, nnx.Intermediate)
        (y, more), found = captured(jnp.zeros(()), each=jnp.arange(3.0), shared=shared)
        assert (y, more.tolist(), shared.count[...]) == (3, [0, 2, 4], 3)
        np.testing.assert_array_equal(found["layers"]["seen"][0], [0, 0, 1])


def test_stacking_layers_that_exist() -> None:
    layers = [nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)]
    stack = Stack.of(layers, run="unroll")
    np.testing.assert_allclose(stack(X), layers[2](layers[1](layers[0](X))), rtol=1e-6)
    np.testing.assert_array_equal(stack[-1].kernel, layers[2].kernel)
    assert len(list(stack)) == 3
    with pytest.raises(ArgumentError, match="same structure"):
        Stack.of([layers[0], nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))])
    with pytest.raises(IndexError, match="Layer 3 of a stack of 3"):
        stack[3]


def test_axis_names_gain_the_axis_of_the_layers() -> None:
    def layer(rngs: nnx.Rngs) -> nnx.Module:
        init = nnx.with_metadata(nnx.initializers.ones_init(), out_sharding=("in", "out"))
        return nnx.Linear(8, 8, kernel_init=init, rngs=rngs)

    with nnx.use_eager_sharding(False):
        stack = Stack(layer, 2, rngs=nnx.Rngs(0))
    assert stack.layers.kernel.out_sharding == ("layers", "in", "out")


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="at least one layer"):
        Stack(Block, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="unknown way through a stack"):
        make(run="loop")
    with pytest.raises(ArgumentError, match=r"unknown policy.*names:a,b"):
        make(remat="some")
    with pytest.raises(ShapeError, match=r"entry for every layer.*\(2,\).*\(6, \.\.\.\)"):
        make()(X, each=jnp.zeros(2))
    with pytest.raises(CarryError, match="float16"):
        Stack(lambda rngs: nnx.Linear(8, 8, dtype=jnp.float16, rngs=rngs), 2, rngs=nnx.Rngs(0))(X)
