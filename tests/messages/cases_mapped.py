# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of vmap, pmap, scan, loops and branches: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from batiste import nnx


class Block(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 2)))
        self.mean = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, x):
        return x @ self.kernel


class Model(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Block(), Block()])


def two_axes() -> object:
    model = Model()
    return nnx.vmap(lambda model, mean: mean, in_axes=(0, 1))(model, model.blocks[1].mean)


def one_tree_twice() -> object:
    model = Model()
    return nnx.vmap(lambda a, b: None, out_axes=None, graph=False, graph_updates=False)(model, model.blocks)


def batched_broadcast() -> object:
    def f(model, x):
        model.blocks[0].mean[...] = model.blocks[0].mean + x

    return nnx.vmap(f, in_axes=(None, 0))(Model(), jnp.arange(4.0))


def captured() -> object:
    model = Model()
    return nnx.vmap(lambda x: model)(jnp.arange(4.0))


def new_in_loop() -> object:
    def body(model):
        model.blocks[1].bias = nnx.Param(jnp.zeros(2))
        return model

    return nnx.while_loop(lambda model: True, body, Model())


def setting_in_loop() -> object:
    def body(i, model):
        model.blocks[1].rate = 0.5
        return model

    return nnx.fori_loop(0, 3, body, Model())


def shape_in_loop() -> object:
    def body(i, model):
        model.blocks[1].mean.set_value(jnp.zeros(4))
        return model

    return nnx.fori_loop(0, 3, body, Model())


def attribute_in_one_branch() -> object:
    def train(model):
        model.blocks[0].cache = nnx.Cache(jnp.zeros(2))

    def evaluate(model):
        model.blocks[1].cache = nnx.Cache(jnp.zeros(2))

    return nnx.cond(True, train, evaluate, Model())


def dtype_in_one_branch() -> object:
    def half(model):
        mean = model.blocks[0].mean
        mean.set_value(mean.get_value().astype(jnp.float16))

    return nnx.switch(0, [lambda model: None, half], Model())


def carry_of_objects(**mode) -> object:
    return nnx.scan(lambda model, x: (Model(), x), **mode)(Model(), jnp.arange(3.0))


CASES: list[tuple[str, Callable[[], object]]] = [
    ("vmap-two-axes-for-one-variable", two_axes),
    ("vmap-one-tree-twice", one_tree_twice),
    ("vmap-broadcast-variable-differs", batched_broadcast),
    ("vmap-result-differs", lambda: nnx.vmap(lambda x: {"loss": x}, out_axes=None)(jnp.arange(3.0))),
    ("vmap-returns-captured", captured),
    ("vmap-sizes-differ", lambda: nnx.vmap(lambda model, x: x)(Model(), jnp.arange(4.0))),
    ("vmap-of-a-number", lambda: nnx.vmap(lambda model, x: x)(Model(), 2.0)),
    ("vmap-in-axes-too-short", lambda: nnx.vmap(lambda model, x: x, in_axes=(0,))(Model(), jnp.arange(3.0))),
    ("vmap-in-axes-is-a-word", lambda: nnx.vmap(lambda x: x, in_axes="batch")(jnp.arange(3.0))),
    ("vmap-bound-method", lambda: nnx.vmap(Block().__call__)),
    ("vmap-filters-without-updates", lambda: nnx.vmap(len, in_axes=(nnx.StateAxes({...: 0}),), graph_updates=False)),
    ("vmap-no-filter-matches", lambda: nnx.vmap(len, in_axes=(nnx.StateAxes({nnx.Param: 0}),))(Model())),
    ("vmap-a-variable-as-prefix", lambda: nnx.vmap(len, in_axes=(nnx.Param(0),))),
    ("scan-carry-on-one-side", lambda: nnx.scan(len, in_axes=(nnx.Carry, 0), out_axes=0)),
    ("scan-two-carries", lambda: nnx.scan(len, in_axes=(nnx.Carry, nnx.Carry))),
    ("scan-nested-carry", lambda: nnx.scan(len, in_axes=((nnx.Carry, 0), 0))),
    ("scan-result-without-axis", lambda: nnx.scan(len, out_axes=(nnx.Carry, None))),
    ("scan-another-object", carry_of_objects),
    ("scan-another-object-without-updates", lambda: carry_of_objects(graph_updates=False)),
    ("scan-result-does-not-fit", lambda: nnx.scan(lambda c, x: c)(0.0, jnp.arange(3.0))),
    ("scan-sizes-differ", lambda: nnx.scan(len, in_axes=(nnx.Carry, 0, 0))(0.0, Block(), jnp.ones(4))),
    ("loop-new-variable", new_in_loop),
    ("loop-setting", setting_in_loop),
    ("loop-shape", shape_in_loop),
    ("cond-attribute-in-one-branch", attribute_in_one_branch),
    ("cond-results-differ", lambda: nnx.cond(True, lambda x: (x, x), lambda x: [x, x], jnp.ones(2))),
    ("switch-dtype-in-one-branch", dtype_in_one_branch),
    ("switch-of-nothing", lambda: nnx.switch(0, [], 1.0)),
]
