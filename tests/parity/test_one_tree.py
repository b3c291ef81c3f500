# SPDX-License-Identifier: Apache-2.0
"""One parameter tree: with the same numbers, a Linen layer and the layer of objects compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen, nnx
from batiste.graph.errors import ShapeError, StructureError
from batiste.nnx.bridge import trees
from tests.parity.case import integers, normal

X, X_BTD, IMAGE = normal(4, 3), normal(2, 5, 8), normal(2, 6, 6, 4)


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer in both faces.

    Args:
        functional: `functional(linen)` makes the Linen module.
        objects: `objects(nnx, rngs)` makes the object.
        inputs: of both calls.
        run: `run(layer, *inputs)`, the call of a bound Linen module and of the object.
        zero: the end of the paths of variables that have to be zero.
    """

    name: str
    functional: Callable[[Any], Any]
    objects: Callable[[Any, Any], Any]
    inputs: tuple[Any, ...] = (X,)
    run: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)
    zero: str = ""


def step(layer, x):
    """One step of a cell from a carry that is not zero, the same in both faces."""
    half = jnp.full((len(x), 4), 0.5)
    return layer((half, half) if "LSTM" in type(layer).__name__ else half, x)


def of_cell(name):
    return Pair(name, lambda linen: getattr(linen, name)(4), lambda nnx, rngs: getattr(nnx, name)(3, 4, rngs=rngs),
                run=step, zero="hn/bias")  # fmt: skip


def linen_block(linen):
    class Block(linen.Module):
        def setup(self):
            self.layers = [linen.Dense(4), linen.Dense(4)]
            self.heads = {"a": linen.Dense(2), "b": linen.Dense(2)}
            self.cell = linen.RNN(linen.OptimizedLSTMCell(4))
            self.norm = linen.BatchNorm(use_running_average=True)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            x = self.norm(self.cell(x))
            return self.heads["a"](x), self.heads["b"](x)

    return Block()


def object_block(nnx, rngs):
    class Block(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
            self.heads = nnx.Dict(a=nnx.Linear(4, 2, rngs=rngs), b=nnx.Linear(4, 2, rngs=rngs))
            self.cell = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs))
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            x = self.norm(self.cell(x))
            return self.heads["a"](x), self.heads["b"](x)

    return Block()


def rnn(linen):
    return linen.Bidirectional(linen.RNN(linen.GRUCell(4)), linen.RNN(linen.LSTMCell(3)))


def object_rnn(nnx, rngs):
    return nnx.Bidirectional(
        nnx.RNN(nnx.GRUCell(8, 4, rngs=rngs)), nnx.RNN(nnx.LSTMCell(8, 3, rngs=rngs)), rngs=rngs
    )  # fmt: skip


def not_stored(layer, *inputs):
    return layer(*inputs, update_stats=False)


PAIRS = [
    Pair("Dense", lambda L: L.Dense(4), lambda N, r: N.Linear(3, 4, rngs=r)),
    Pair("DenseGeneral", lambda L: L.DenseGeneral((2, 3), axis=(-2, -1), batch_dims=0),
         lambda N, r: N.LinearGeneral((5, 8), (2, 3), axis=(-2, -1), batch_axis={0: 2}, rngs=r), (X_BTD,)),
    Pair("Einsum", lambda L: L.Einsum((8, 2, 3), "btd,dhk->bthk"),
         lambda N, r: N.Einsum("btd,dhk->bthk", (8, 2, 3), (2, 3), rngs=r), (X_BTD,)),
    Pair("Embed", lambda L: L.Embed(7, 4), lambda N, r: N.Embed(7, 4, rngs=r), (integers(2, 5, below=7),)),
    Pair("Conv", lambda L: L.Conv(6, (3, 2), strides=2, feature_group_count=2),
         lambda N, r: N.Conv(4, 6, (3, 2), strides=2, feature_group_count=2, rngs=r), (IMAGE,)),
    Pair("ConvTranspose", lambda L: L.ConvTranspose(5, (3, 3), strides=(2, 2)),
         lambda N, r: N.ConvTranspose(4, 5, (3, 3), strides=(2, 2), rngs=r), (IMAGE,)),
    Pair("BatchNorm", lambda L: L.BatchNorm(use_running_average=True),
         lambda N, r: N.BatchNorm(8, use_running_average=True, rngs=r), (X_BTD,)),
    Pair("LayerNorm", lambda L: L.LayerNorm(), lambda N, r: N.LayerNorm(8, rngs=r), (X_BTD,)),
    Pair("LayerNorm-two-axes", lambda L: L.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)),
         lambda N, r: N.LayerNorm(40, reduction_axes=(1, 2), feature_axes=(1, 2), rngs=r), (X_BTD,)),
    Pair("RMSNorm", lambda L: L.RMSNorm(), lambda N, r: N.RMSNorm(8, rngs=r), (X_BTD,)),
    Pair("GroupNorm", lambda L: L.GroupNorm(2), lambda N, r: N.GroupNorm(4, 2, rngs=r), (IMAGE,)),
    Pair("InstanceNorm", lambda L: L.InstanceNorm(), lambda N, r: N.InstanceNorm(4, rngs=r), (IMAGE,)),
    Pair("PReLU", lambda L: L.PReLU(), lambda N, r: N.PReLU()),
    Pair("MultiHeadAttention", lambda L: L.MultiHeadAttention(2, normalize_qk=True),
         lambda N, r: N.MultiHeadAttention(2, 8, normalize_qk=True, decode=False, rngs=r), (X_BTD,)),
    Pair("Sequential", lambda L: L.Sequential([L.Dense(4), L.relu, L.Dense(2)]),
         lambda N, r: N.Sequential(N.Linear(3, 4, rngs=r), N.relu, N.Linear(4, 2, rngs=r))),
    *map(of_cell, ["SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell"]),
    Pair("RNN", rnn, object_rnn, (X_BTD,), zero="hn/bias"),
    Pair("WeightNorm", lambda L: L.WeightNorm(L.Dense(4)), lambda N, r: N.WeightNorm(N.Linear(3, 4, rngs=r), rngs=r)),
    Pair("SpectralNorm", lambda L: L.SpectralNorm(L.Dense(4)),
         lambda N, r: N.SpectralNorm(N.Linear(3, 4, rngs=r), rngs=r), run=not_stored),
    Pair("block", linen_block, object_block, (X_BTD,)),
]  # fmt: skip


def shapes_of(pair, linen):
    return jax.eval_shape(lambda: pair.functional(linen).init(jax.random.key(0), *pair.inputs, method=pair.run))


def variables_of(pair):
    """Variables of the Linen layer: random numbers, and zero where it has to be."""

    def fill(path, x):
        zero = pair.zero and jax.tree_util.keystr(path, simple=True, separator="/").endswith(pair.zero)
        return np.zeros(x.shape) if zero else np.random.default_rng(x.size).uniform(0.1, 1, x.shape)

    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(fill(path, x), x.dtype), shapes_of(pair, linen))


def paths_of(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): x for path, x in leaves}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_the_same_numbers_come_back_and_give_the_same_result(pair):
    module, model = pair.functional(linen), pair.objects(nnx, nnx.Rngs(1))
    variables = variables_of(pair)
    nnx.update(model, trees.to_state(model, variables))
    again, before = paths_of(trees.to_variables(model, variables)), paths_of(variables)
    assert again.keys() == before.keys()
    for path, x in again.items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    wanted = jax.jit(lambda variables: module.apply(variables, *pair.inputs, method=pair.run))(variables)
    got = nnx.jit(lambda model: pair.run(model, *pair.inputs))(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_the_tree_is_that_of_the_installed_flax(pair):
    shapes = shapes_of(pair, flax.linen)
    model = pair.objects(nnx, nnx.Rngs(1))
    ours = jax.eval_shape(lambda: trees.to_variables(model, shapes))
    assert {k: v.shape for k, v in paths_of(ours).items()} == {k: v.shape for k, v in paths_of(shapes).items()}


def test_boxed_variables_are_unboxed():
    box = nnx.bridge.NNXMeta(nnx.Param, jnp.ones((3, 4)), {"unit": "m"})
    state = trees.to_state(nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0)), {"params": {"kernel": box}})
    assert isinstance(state["kernel"], nnx.Param) and state["kernel"].shape == (3, 4)


def test_metadata_of_the_object_stay():
    model = nnx.Linear(3, 4, kernel_metadata={"unit": "m"}, rngs=nnx.Rngs(0))
    assert trees.to_state(model, trees.to_variables(model))["kernel"].unit == "m"


def test_a_bias_that_the_object_cannot_hold_is_refused():
    pair = of_cell("GRUCell")
    variables = variables_of(pair)
    variables["params"]["hn"]["bias"] = jnp.ones(4)
    with pytest.raises(StructureError, match="not zero at params/hn/bias"):
        trees.to_state(pair.objects(nnx, nnx.Rngs(0)), variables)


def test_what_does_not_fit_is_named():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(StructureError, match=r"unknown \['params/head/kernel'\], missing \['params/bias'\]"):
        trees.to_state(model, {"params": {"kernel": jnp.ones((3, 4)), "head": {"kernel": jnp.ones((3, 4))}}})
    with pytest.raises(ShapeError, match=r"at kernel: got \(3, 5\), expected \(3, 4\)"):
        trees.to_state(model, {"params": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(4)}})


def test_containers_of_plain_python_are_parts_too():
    class Plain(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((nnx.Param(jnp.ones(2)), {"w": nnx.Param(jnp.ones(3))}))

    shapes = jax.tree.map(jnp.shape, trees.to_variables(Plain()))
    assert shapes == {"params": {"pair_0": (2,), "pair_1_w": (3,)}}


def test_a_rule_for_a_class_of_ones_own(monkeypatch):
    class Own(nnx.Linear):
        pass

    monkeypatch.setitem(trees.RULES, Own, trees.Rule({"kernel": ("left", "right")}))
    model = Own(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    variables = trees.to_variables(model)
    assert {k: v.shape for k, v in variables["params"].items()} == {"left": (3, 2), "right": (3, 2)}
    np.testing.assert_array_equal(trees.to_state(model, variables)["kernel"], model.kernel)
