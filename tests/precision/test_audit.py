# SPDX-License-Identifier: Apache-2.0
"""The audit finds every upcast, says who is to blame, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from batiste import linen, nnx
from batiste.linen.precision import mixed
from batiste.precision import Audit, audit, policy

MIXED = policy("bfloat16")
X = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)


class Block(nnx.Module):
    """What a block does silently (a table in float32), by wish (`astype`), and as it should (a norm, a sum)."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.up = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.table = nnx.Variable(jnp.ones((1, 4)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.up(self.norm(x)) + self.table[...]
        x = x.astype(jnp.bfloat16)
        return x * jnp.tanh(x.astype(jnp.float32)).astype(x.dtype) / x.mean()


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = Block(rngs)
        self.blocks = nnx.Stack(Block, 2, rngs=rngs)
        self.router = nnx.Linear(4, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.router(self.blocks(self.dropout(self.first(x))))


def kinds(found: Audit, path: str) -> set[tuple[str, str]]:
    return {(x.kind, x.operation) for x in found.upcasts if x.path == path}


def test_every_upcast_with_its_module_its_cause_and_its_line() -> None:
    model = Model(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    found = audit(MIXED(model), X)
    for path in ("first", "blocks/layers"):
        assert kinds(found, path) == {("mixed", "add"), ("asked", "astype"), ("summed", "mean")}
    assert {x.kind for x in found.upcasts if "norm" in x.path or x.path == "router"} == {"kept"}
    assert [(x.path, x.dtype, x.to, x.shape) for x in found.silent] == [
        ("first", "bfloat16", "float32", (3, 4)), ("blocks/layers", "bfloat16", "float32", (3, 4))]  # fmt: skip
    line = Block.__call__.__code__.co_firstlineno + 1
    assert {x.line for x in found.silent} == {f"test_audit.py:{line}"}
    jax.tree.map(lambda a, b: (a.shape == b.shape and bool((a == b).all())) or pytest.fail("changed"), before,
                 jax.tree.map(jnp.copy, nnx.state(model)))  # fmt: skip
    assert found == audit(MIXED(model), X), "also when JAX remembers the traces"


def test_operations_and_products_by_dtype() -> None:
    found = audit(MIXED(Model(nnx.Rngs(0))), X)
    assert dict(found.products["blocks/layers/up"]) == {"bfloat16 x bfloat16": 1}
    assert dict(found.products["router"]) == {"float32 x float32": 1}
    assert set(found.operations["first/norm"]) == {"bfloat16", "float32"}
    text = str(found)
    assert "blocks/layers/up" in text and text.endswith("2 silent upcasts")
    assert not audit(Model(nnx.Rngs(0)), jnp.ones((3, 4))).silent


def test_what_is_wide_by_intention_is_told_by_patterns() -> None:
    model = MIXED(Model(nnx.Rngs(0)))
    assert {x.path for x in audit(model, X, keep=("*Norm", "router", "first")).silent} == {"blocks/layers"}
    assert {x.path for x in audit(model, X, keep=()).silent} > {"first", "router", "first/norm"}


def test_gradients() -> None:
    def loss(model: Any, x: Any) -> jax.Array:
        return MIXED.result(MIXED(model)(x)).mean()

    found = audit(nnx.grad(loss), Model(nnx.Rngs(0)), X)
    assert [(x.path, x.operation) for x in found.silent if x.operation == "add"] == [
        ("first", "add"), ("blocks/layers", "add")]  # fmt: skip
    assert any(x.kind == "gradient" for x in found.upcasts)
    assert dict(found.products["first/up"]) == {"bfloat16 x bfloat16": 3}


def test_two_dtypes_in_one_product() -> None:
    found = audit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ()))), X, jnp.ones((4, 2)))
    assert [(x.operation, x.kind) for x in found.upcasts] == [("dot_general", "mixed")]


class Functional(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(4, name="head")(linen.LayerNorm(name="norm")(x)) + jnp.ones((1, 4))


def test_modules_of_the_functional_face_are_found_by_their_names() -> None:
    model = mixed(Functional(), "bfloat16")
    variables = model.init(jax.random.key(0), jnp.ones((3, 4)))
    found = audit(model.apply, variables, X)
    assert dict(found.products["Functional/head"]) == {"bfloat16 x bfloat16": 1}
    assert "Functional" in {x.path for x in found.silent}
