# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of the core and of jit: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from batiste import nnx


class Layer(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((2, 2)))
        self.size = 2


class Model(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Layer(), Layer()])


class Odd:
    __hash__ = None


def assign(**attributes):
    layer = Layer()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def captured(write):
    model = Model()

    @jax.jit
    def f(x):
        write(model)
        return x

    f(1.0)


def shared():
    model = Model()
    model.again = model.blocks[0]
    return model


def append_behind_the_back():
    class M(nnx.Module):
        def __init__(self):
            self.parts = []
            self.parts.append(nnx.Param(1))

    M()


def merge_partly():
    graphdef, state = nnx.split(Layer())
    nnx.merge(graphdef, nnx.State({"other": state["kernel"]}))


def slots():
    class S(nnx.Module):
        __slots__ = ("a",)


CASES: list[tuple[str, Callable[[], object]]] = [
    ("a list of Variables as an attribute", lambda: assign(parts=[nnx.Param(1)])),
    ("an array in a static attribute", lambda: assign(size=jnp.ones(1))),
    ("data under static()", lambda: assign(other=nnx.static(jnp.ones(1)))),
    ("data found after __init__", append_behind_the_back),
    ("slots", slots),
    ("an unhashable setting", lambda: nnx.jit(lambda m: 1)(assign(odd=Odd()))),
    ("a captured Variable is written", lambda: captured(lambda m: m.blocks[1].kernel.set_value(0.0))),
    ("a captured module is changed", lambda: captured(lambda m: setattr(m.blocks[1], "size", 3))),
    ("an unknown filter", lambda: nnx.split(Layer(), 3.5)),
    ("filters that leave something over", lambda: nnx.split(Layer(), nnx.BatchStat)),
    ("everything before another filter", lambda: nnx.split(Layer(), ..., nnx.Param)),
    ("merge without a leaf", merge_partly),
    ("merge without a structure", lambda: nnx.merge(nnx.state(Layer()))),
    ("update below a Variable", lambda: nnx.update(Layer(), {"kernel": {"deep": {"er": 1}}})),
    ("pop without a filter", lambda: nnx.pop(Layer())),
    ("a tree that shares", lambda: nnx.split(shared(), graph=False)),
    ("an input handed out without graph updates", lambda: nnx.jit(lambda m: m.kernel, graph_updates=False)(Layer())),
    ("one object twice in a tree call", lambda: nnx.jit(lambda a, b: 1, graph=False)(*[Layer()] * 2)),
    ("a bound method", lambda: nnx.jit(Model().eval)),
    ("a static argument that is a list", lambda: nnx.jit(lambda x: x, static_argnums=0)([1])),
    (
        "two shardings for one Variable",
        lambda: nnx.jit(lambda a, b: 1, in_shardings=(jax.sharding.PartitionSpec("x"), None))(*[Layer()] * 2),
    ),
    (
        "a rule that matches nothing",
        lambda: nnx.jit(lambda a: 1, in_shardings=nnx.StateSharding({nnx.BatchStat: None}))(Layer()),
    ),
    ("a prefix that does not fit", lambda: nnx.jit(lambda a: 1, in_shardings=(None, None))(Layer())),
    ("attributes that exist nowhere", lambda: Model().set_attributes(no_such=1)),
    ("a view nobody takes", lambda: nnx.view(Model(), no_such=True)),
    ("copying from another kind", lambda: nnx.Param(1).copy_from(nnx.BatchStat(1))),
    ("metadata set as an attribute", lambda: setattr(nnx.Param(1), "note", 1)),
    ("in-place addition", lambda: exec("v += 1", {"v": nnx.Param(1)})),
    ("a Ref as value", lambda: nnx.Param(jax.new_ref(1.0))),
    ("an unregistered kind", lambda: nnx.variable_type_from_name("no such kind")),
    ("a pure dict with an unknown path", lambda: nnx.replace_by_pure_dict(nnx.state(Layer()), {"other": 1})),
]
