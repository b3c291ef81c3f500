# SPDX-License-Identifier: Apache-2.0
"""Parameters and variables whose axes have names go where the rules say, and refuse names that contradict."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import batiste.linen as nn
from batiste.graph.errors import ArgumentError
from batiste.linen import partitioning

RULES = (("embed", "x"), ("mlp", "y"))


class Layer(nn.Module):
    axes: tuple = ("embed", "mlp")

    @nn.compact
    def __call__(self):
        w = partitioning.param_with_axes("w", nn.initializers.ones, (4, 4), axes=self.axes)
        m = partitioning.variable_with_axes("stats", "m", jnp.zeros, (4,), axes=("mlp",))
        m.value = m.value + 1
        return w, m.value


def test_values_go_where_their_names_say():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), partitioning.axis_rules(RULES):
        (w, m), variables = jax.jit(Layer().init_with_output)(jax.random.key(0))
    assert w.sharding.spec == P("x", "y") and m.sharding.spec == P("y")
    assert partitioning.get_axis_names(variables["params_axes"]) == {"w": P("embed", "mlp")}


def test_names_may_not_change():
    variables = Layer().init(jax.random.key(0))
    with pytest.raises(ArgumentError, match="expected them to match"):
        Layer(axes=("embed", "heads")).apply(variables, mutable=["params_axes", "stats"])


@pytest.mark.parametrize("function", [
    lambda: partitioning.param_with_axes("w", nn.initializers.ones, (4,), axes=("embed",)),
    lambda: partitioning.variable_with_axes("stats", "m", jnp.zeros, (4,), axes=("embed",)),
])  # fmt: skip
def test_outside_a_module_there_is_nothing_to_name(function):
    with pytest.raises(ArgumentError, match="outside"):
        function()


def test_static_arguments_of_remat_are_counted_after_the_module():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(x) if train else x

    variables = partitioning.remat(Switch, static_argnums=1)().init(jax.random.key(0), jnp.ones((2, 3)), True)
    assert variables["params"]["Dense_0"]["kernel"].shape == (3, 2)
