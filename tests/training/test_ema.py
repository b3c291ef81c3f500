# SPDX-License-Identifier: Apache-2.0
"""Moving averages: the formula, what is averaged, sharing with the averaged model, and models that do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import FilterError, StructureError
from batiste.training.ema import EMA


class Model(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.arange(6.0).reshape(2, 3))
        self.bias = nnx.Param(jnp.zeros(3, jnp.bfloat16))
        self.mean = nnx.BatchStat(jnp.ones(3))
        self.calls = nnx.Variable(jnp.array(0))
        self.rngs = nnx.Rngs(0)


def moved(model: Model) -> Model:
    model.kernel[...] += 1
    model.bias[...] += 2
    model.mean[...] += 3
    model.calls[...] += 1
    return model


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.0, 1.0])
def test_update_moves_towards_the_new_values_in_their_dtype(decay):
    model = Model()
    ema = EMA(model, decay, only=nnx.Param)
    ema.update(moved(model))
    assert set(ema.params) == {"kernel", "bias"}
    np.testing.assert_allclose(ema.params["kernel"], jnp.arange(6.0).reshape(2, 3) + (1 - decay), rtol=1e-6)
    assert ema.params["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ema.params["bias"][...], np.float32), 2 * (1 - decay), rtol=1e-2)


def test_what_has_no_average_is_kept_as_it_is_now():
    model = Model()
    ema = EMA(model, 0.5)
    model.rngs()
    ema.update(moved(model))
    assert ema.params["calls"][...] == 1
    assert ema.params["rngs"]["default"]["count"][...] == 1
    np.testing.assert_array_equal(ema.params["mean"], jnp.full(3, 2.5))


def test_the_averages_are_variables_of_their_own_with_the_same_type_and_metadata():
    param = nnx.Param(jnp.ones(3), note="x")
    ema = EMA(nnx.Dict(p=param), 0.9)
    assert ema.params["p"] is not param
    assert type(ema.params["p"]) is nnx.Param
    assert ema.params["p"].note == "x"


def test_apply_to_shares_the_averages_and_the_rest():
    model = Model()
    ema = EMA(model, 0.5, only=nnx.Param)
    averaged = ema.apply_to(model)
    assert type(averaged) is Model
    assert averaged.kernel is ema.params["kernel"]
    assert averaged.mean is model.mean
    ema.update(moved(model))
    np.testing.assert_array_equal(averaged.kernel, jnp.arange(6.0).reshape(2, 3) + 0.5)
    np.testing.assert_array_equal(model.kernel, jnp.arange(6.0).reshape(2, 3) + 1)


@pytest.mark.parametrize("form", [nnx.state, lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param)), lambda m: m])
def test_the_new_values_come_in_several_forms(form):
    model = Model()
    ema = EMA(model, 0.5, only=nnx.Param)
    ema.update(form(moved(model)))
    np.testing.assert_array_equal(ema.params["kernel"], jnp.arange(6.0).reshape(2, 3) + 0.5)


@pytest.mark.parametrize("graph", [True, False])
def test_update_inside_jit(graph):
    model = Model()
    ema = EMA(model, 0.5, only=nnx.Param, graph=graph)

    @nnx.jit
    def step(ema, model):
        ema.update(moved(model))

    step(ema, model)
    step(ema, model)
    np.testing.assert_array_equal(ema.params["kernel"], jnp.arange(6.0).reshape(2, 3) + 1.25)


def test_misfits_are_named():
    ema = EMA(Model(), 0.5, only=nnx.Param)
    with pytest.raises(
        StructureError, match=r"new values do not fit.*bias is missing; kernel is missing; other is unknown"
    ):
        ema.update(nnx.Dict(other=nnx.Param(jnp.ones(2))))
    with pytest.raises(StructureError, match=r"kernel has shape \(3, 2\), expected \(2, 3\)"):
        ema.update(jax.tree.map(lambda x: x.T, nnx.state(Model(), nnx.Param)))
    with pytest.raises(StructureError, match=r"values of the model do not fit.*bias is missing"):
        ema.apply_to(nnx.Dict(kernel=nnx.Param(jnp.ones((2, 3)))))
    with pytest.raises(FilterError, match=r"(?s)only supports Variable leaves at a.*only=nnx.Param"):
        EMA({"a": jnp.ones(3)}, 0.9)
