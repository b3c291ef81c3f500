# SPDX-License-Identifier: Apache-2.0
"""Quantised variables of the functional face: the same modules, smaller weights, about the same results."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen as nn
from batiste.linen.precision import mixed
from batiste.linen.quantization import QuantizedBox, quantize
from batiste.serialization import from_bytes, to_bytes
from tests.parity.case import Case
from tests.parity.linen_cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
WEIGHTS = ("kernel", "embedding")
ROWS = ("dense", "general", "einsum", "embed", "conv", "conv-transpose", "conv-local", "attention", "gru",
        "lstm-optimized", "sequential")  # fmt: skip


def boxes(tree: Any) -> dict[str, Any]:
    """By the path of a weight, its box or array."""
    is_box = lambda x: isinstance(x, QuantizedBox)
    leaves = jax.tree_util.tree_leaves_with_path(tree.get("params", {}), is_leaf=is_box)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ROWS], ids=lambda case: case.name)
def test_every_layer_gives_about_the_same(case: Case) -> None:
    module, inputs = case.build(nn), [jnp.asarray(x) for x in case.inputs]
    options = {"method": lambda module, *inputs: case.call(module, *inputs), "rngs": {"dropout": jax.random.key(1)}}
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(functools.partial(module.init, method=options["method"]))(keys, *inputs)
    small = quantize(module, variables, *inputs, keep=(), **options)
    for path, x in boxes(small).items():
        assert isinstance(x, QuantizedBox) == path.endswith(WEIGHTS), path
    run = jax.jit(lambda both: [module.apply(variables, *inputs, mutable=True, **options)[0] for variables in both])
    for exact, y in zip(*map(jax.tree.leaves, run((variables, small))), strict=True):
        assert (exact.shape, exact.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(exact, y, rtol=0.02, atol=0.02 * float(jnp.abs(exact).max()))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return nn.Dense(16, name="up")(nn.LayerNorm()(x)), None


class Model(nn.Module):
    """A table, a stack, a router, a layer whose weight is normalised, a parameter of its own, and a head."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(11, 16, name="table")(ids)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="blocks")(x, None)
        x = nn.WeightNorm(nn.Dense(16, name="normed"))(x) + self.param("own", nn.initializers.ones, (1, 1, 16))
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        head = nn.Dense(5, kernel_init=init, name="head")
        return head(x) * nn.softmax(nn.Dense(2, name="router")(x))[..., :1]


IDS = jnp.array([[1, 2, 10], [0, 4, 5]])


@functools.cache
def model() -> tuple[Model, Any]:
    return Model(), jax.jit(Model().init)(jax.random.key(0), IDS)


def test_what_is_kept_and_what_is_changed() -> None:
    module, variables = model()
    changed = lambda tree: {path: x for path, x in boxes(tree).items() if isinstance(x, QuantizedBox)}
    small = changed(quantize(module, variables, IDS))
    assert set(small) == {"table/embedding", "blocks/up/kernel", "head/kernel"}
    assert small["blocks/up/kernel"].value.q.shape == (3, 1, 16, 16) and small["blocks/up/kernel"].shape == (16, 16)
    assert isinstance(variables["params"]["table"]["embedding"], jax.Array), "the variables themselves stay"
    bits = {"head": 4, "table": 8}
    chosen = changed(quantize(module, variables, IDS, choose=lambda path, layer: bits.get(path[0]), group=8))
    assert {path: x.bits for path, x in chosen.items()} == {"head/kernel": 4, "table/embedding": 8}
    assert chosen["head/kernel"].value.q.shape == (2, 4, 5)


def test_quantised_variables_run_jitted_under_a_policy_and_are_saved() -> None:
    module, variables = model()
    small = quantize(module, variables, IDS)
    again = from_bytes(jax.tree.map(jnp.zeros_like, small), to_bytes(small))
    run = jax.jit(lambda both: [module.apply(v, IDS) for v in both] + [mixed(module, "bfloat16").apply(both[1], IDS)])
    exact, y, half = run((variables, again))
    np.testing.assert_allclose(y, exact, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(half, exact, rtol=0.1, atol=0.05)
    assert (half != y).any(), "layers compute in bfloat16"
    assert "i8[3,1,16,16]" in str(jax.make_jaxpr(lambda v: module.apply(v, IDS))(small)), "whole numbers go in"
