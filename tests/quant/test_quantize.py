# SPDX-License-Identifier: Apache-2.0
"""Quantised models: the same layers, smaller weights, about the same results; their state, and what they cost."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.precision import policy
from batiste.quant import QuantizedWeight, error_report, quantize, weight_of
from batiste.quant.quantize import RESCALED
from batiste.serialization import from_bytes, to_bytes
from tests.parity.case import Case
from tests.parity.layers import CASES


def parts_with_weights(model: Any) -> list[Any]:
    return [x for _, x in nnx.iter_graph(model) if weight_of(x) is not None]


def first_of_each_class() -> list[Case]:
    """The first row of each class that has something to quantise."""
    found: dict[type, Case] = {}
    for case in CASES:
        if "bf16" not in case.name and parts_with_weights(layer := case.build(nnx)):
            found.setdefault(type(layer), case)
    return list(found.values())


@pytest.mark.parametrize("case", first_of_each_class(), ids=lambda case: case.name)
def test_every_layer_gives_about_the_same(case: Case) -> None:
    inputs = [jnp.asarray(x) for x in case.inputs]
    layer, small = case.build(nnx), quantize(case.build(nnx), 8, keep=())
    is_small = {isinstance(vars(x)[weight_of(x).name], QuantizedWeight) for x in parts_with_weights(small)}
    assert is_small == {type(layer).__name__ not in RESCALED}
    for exact, y in zip(*(jax.tree.leaves(case.call(model, *inputs)) for model in (layer, small)), strict=True):
        assert (exact.shape, exact.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(exact, y, rtol=0.02, atol=0.02 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 2, 6])
def test_no_number_is_off_by_more_than_half_a_step(bits: int, group: int | None) -> None:
    model = nnx.LinearGeneral((5, 3), (2, 4), axis=(-2, -1), rngs=nnx.Rngs(0))  # 15 is no multiple of a group
    small = quantize(model, bits, group=group)
    w, values = model.kernel[...], small.kernel.get_value()
    step = np.asarray(values.scale).max()
    assert small.kernel.shape == w.shape and values.q.dtype == jnp.int8
    assert np.abs(w - small.kernel[...]).max() <= 0.5001 * step
    exact = jnp.array([[1.0, -7.0, 0.0], [3.0, 2.0, 0.0]])  # whole numbers up to the largest come back
    held = nnx.Linear(2, 3, kernel_init=lambda *_: exact, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(quantize(held, 8).kernel[...], exact, rtol=0.01, atol=0.02)


class Model(nnx.Module):
    """A table, a norm, a stack, a router and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(11, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.blocks = nnx.Stack(lambda rngs: nnx.Linear(16, 16, rngs=rngs), 3, rngs=rngs)
        self.router = nnx.Linear(16, 2, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.blocks(self.norm(self.table(ids)))
        return self.head(x) * nnx.softmax(self.router(x))[..., :1]


HEAD = "layer type shape bits group before after error worst result"
IDS = jnp.array([[1, 2, 10], [0, 4, 5]])


@functools.cache
def models() -> tuple[Model, Model]:
    model = Model(nnx.Rngs(0))
    return model, quantize(model, 8)


def test_what_is_kept_and_what_is_changed() -> None:
    model, small = models()
    kinds = {path: type(x).__name__ for path, x in nnx.to_flat_state(nnx.state(small))}
    assert {path for path, kind in kinds.items() if kind == "QuantizedWeight"} == {
        ("table", "embedding"), ("blocks", "layers", "kernel"), ("head", "kernel")}  # fmt: skip
    assert small.blocks.layers.kernel.shape == (3, 16, 16)
    assert isinstance(model.head.kernel, nnx.Param), "the model itself stays"
    assert small.head.bias is not model.head.bias
    chosen = quantize(model, choose=lambda path, layer: {"head": 4, "table": 8}.get(path[0]))
    assert chosen.head.kernel.bits == 4 and chosen.table.embedding.bits == 8
    assert isinstance(chosen.blocks.layers.kernel, nnx.Param)


def test_a_quantised_model_runs_jitted_and_under_a_policy() -> None:
    model, small = models()
    exact = model(IDS)
    for y in (nnx.jit(lambda m, x: m(x))(small, IDS), small(IDS)):
        np.testing.assert_allclose(y, exact, rtol=0.05, atol=0.02)
    half = nnx.jit(lambda m, x: policy("bfloat16")(m)(x))(small, IDS)
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=0.1, atol=0.05)
    program = str(jax.make_jaxpr(lambda q: nnx.merge(*q)(IDS))(nnx.split(small)))
    assert "i8[1,16,5]" in program, "the weights go in as whole numbers"


@pytest.mark.parametrize("bits", [8, 4])
def test_its_state_is_saved_and_loaded(bits: int) -> None:
    model, _ = models()
    small = quantize(model, bits, group=8)
    saved = to_bytes(nnx.to_pure_dict(nnx.state(small)))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: quantize(Model(nnx.Rngs(1)), bits, group=8)))
    nnx.replace_by_pure_dict(state, from_bytes(nnx.to_pure_dict(state), saved))
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(IDS), small(IDS))


def test_the_report() -> None:
    model, small = models()
    report = error_report(model, small, IDS)
    assert [row.path for row in report.rows] == ["blocks/layers", "head", "table"]
    row = report["head"]
    assert (row.before, row.after, row.bits, row.group) == (320, 100, 8, 16)
    assert row.error < 0.01 and row.worst < 0.01 and row.result is not None and row.result < 0.02
    assert report["blocks/layers"].result is None, "it runs inside a scan"
    assert report.before == 4 * (11 * 16 + 3 * 256 + 80)
    coarse = error_report(model, quantize(model, 4, group=8))
    assert all(row.error < 0.15 for row in coarse.rows)
    assert all(a.error > 5 * b.error for a, b in zip(coarse.rows, report.rows))
    text = str(report)
    assert text.splitlines()[0].split() == [
        "layer",
        "type",
        "shape",
        "bits",
        "group",
        "before",
        "after",
        "error",
        "worst",
        "result",
    ]
    assert "3 layers" in text


def test_bad_input() -> None:
    model, _ = models()
    with pytest.raises(ArgumentError, match=r"8 or 4 bits.*bits=3"):
        quantize(model, 3)
    with pytest.raises(ArgumentError, match=r"a group is even.*group=5"):
        quantize(model, 4, group=5)
    with pytest.raises(ArgumentError, match="no quantised weight"):
        error_report(model, model)
    with pytest.raises(ArgumentError, match="not made from this one"):
        error_report(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), quantize(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
