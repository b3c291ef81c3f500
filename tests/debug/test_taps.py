# SPDX-License-Identifier: Apache-2.0
"""Taps: capture and patch, of values and gradients, through every transform and on both faces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen, nnx
from batiste.debug import capture, patch, tap
from batiste.graph.errors import ArgumentError, ShapeError

X = np.ones((2, 3), np.float32)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.calls = nnx.Linear(3, 3, rngs=rngs), nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return tap(jnp.tanh(self.linear(x)), "h")


def loss(model, x):
    return jnp.sum(model(x) ** 2)


def expected(block: Block) -> np.ndarray:
    return np.tanh(X @ np.asarray(block.linear.kernel[...]))


def h(model, x):
    return jnp.tanh(model.linear(x))


def sharded(x):
    mesh, spec = jax.make_mesh((1,), ("d",)), jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x: tap(x, "h"), mesh=mesh, in_specs=spec, out_specs=spec)(x)


THROUGH = {
    "plain": loss,
    "jit": nnx.jit(loss),
    "jit-in-jit": nnx.jit(lambda model, x: nnx.jit(loss)(model, x)),
    "remat": nnx.remat(loss),
    "vmap": lambda model, x: nnx.vmap(loss, in_axes=(None, 0))(model, x[:, None]),
    "cond": lambda model, x: nnx.cond(True, loss, lambda model, x: 0.0, model, x),
    "custom-jvp": lambda model, x: jax.nn.relu(jnp.sum(tap(h(model, x), "h"))),
    "grad": nnx.grad(loss),
    "grad-of-remat": nnx.jit(nnx.grad(nnx.remat(loss))),
}


@pytest.mark.parametrize("name", THROUGH)
def test_a_value_is_captured_and_replaced_through(name: str) -> None:
    block = Block(nnx.Rngs(0))
    _, taps = capture(THROUGH[name], "h")(block, X)
    np.testing.assert_allclose(taps["h"].reshape(2, 3), expected(block), rtol=1e-6)
    out = patch(THROUGH[name], {"h": jnp.zeros_like})(block, X)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(out)), "tanh(0)² and its gradient are zero"


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit, nnx.remat, lambda f: nnx.jit(nnx.remat(nnx.jit(f)))])
def test_gradients_are_captured_once_and_replaced(wrap) -> None:
    block = Block(nnx.Rngs(0))
    grads, taps = capture(nnx.grad(wrap(loss)))(block, X)
    assert set(taps) == {"h", "h:grad"}
    np.testing.assert_allclose(taps["h:grad"], 2 * expected(block), rtol=1e-6)
    doubled = patch(nnx.grad(wrap(loss)), {"h:grad": lambda g: 2 * g})(block, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), grads, doubled)


@pytest.mark.parametrize("remat", [None, "full"])
def test_under_a_scan_values_are_stacked_and_each_is_replaced(remat) -> None:
    stack = nnx.Stack(Block, 4, rngs=nnx.Rngs(0), remat=remat)
    _, taps = capture(nnx.jit(nnx.grad(loss)))(stack, X)
    assert {name: value.shape for name, value in taps.items()} == {"h": (4, 2, 3), "h:grad": (4, 2, 3)}
    np.testing.assert_allclose(taps["h"][-1], stack(X), rtol=1e-6)
    np.testing.assert_array_equal(patch(stack, {"h": lambda h: jnp.full_like(h, 7)})(X), np.full((2, 3), 7))


def test_a_while_loop_gives_its_last_value_and_a_branch_not_taken_nan() -> None:
    def looped(x):
        return jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, tap(c[1] * 2, "w")), (0, x))[1]

    assert [float(x) for x in (lambda out, taps: (out, taps["w"]))(*capture(looped)(1.0))] == [32.0, 32.0]
    assert float(patch(looped, {"w": 3.0})(1.0)) == 3.0
    branched = lambda p, x: jax.lax.cond(p, lambda x: tap(x, "a"), lambda x: tap(2 * x, "b"), x)
    _, taps = jax.jit(capture(branched))(True, 1.0)
    assert float(taps["a"]) == 1.0 and np.isnan(taps["b"])


def test_objects_are_written_once_and_whatever_the_face() -> None:
    block = Block(nnx.Rngs(0))
    capture(block)(X)
    capture(block.__call__)(X)
    nnx.jit(lambda block, x: capture(block)(x))(block, X)
    assert float(block.calls[...]) == 3

    class Face(linen.Module):
        @linen.compact
        def __call__(self, x):
            return tap(linen.Dense(3, name="dense")(x), "h") + 1

    variables = Face().init(jax.random.key(0), X)
    out, taps = capture(jax.jit(Face().apply))(variables, X)
    np.testing.assert_array_equal(out, taps["h"] + 1)


def test_names_are_selected_numbered_and_of_trees() -> None:
    def f(x):
        pair = tap({"a": x, "b": x + 1}, "pair")
        return tap(pair["a"], "h") + tap(pair["b"], "h")

    _, taps = capture(f)(1.0)
    assert {name: float(x) for name, x in taps.items()} == {"pair/a": 1, "pair/b": 2, "h": 1, "h#1": 2}
    assert set(capture(f, "pair*")(1.0)[1]) == {"pair/a", "pair/b"}
    assert set(capture(f, ["h", "pair/b"])(1.0)[1]) == {"h", "pair/b"}
    assert set(capture(f, lambda name: "#" in name)(1.0)[1]) == {"h#1"}
    assert float(patch(f, {"h": 5})(1.0)) == 10 and float(patch(f, {"h#1": 5})(1.0)) == 6


def test_a_tap_costs_nothing() -> None:
    compiled = [jax.jit(f).lower(X).compile().as_text() for f in (lambda x: tap(x * 2, "h") + 1, lambda x: x * 2 + 1)]
    instructions = [[line.split(", metadata")[0] for line in text.splitlines() if " = " in line] for text in compiled]
    assert instructions[0] == instructions[1]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: tap(X, ""), ArgumentError, "a tap needs a name: got ''"),
        (lambda: capture(Block(nnx.Rngs(0)), "no*")(X), ArgumentError, r"got 'no\*', expected one of \['h'\]"),
        (lambda: patch(Block(nnx.Rngs(0)), {"no": 0.0})(X), ArgumentError, r"got 'no', expected one of \['h'\]"),
        (lambda: patch(Block(nnx.Rngs(0)), {"h": np.ones(7)})(X), ShapeError, r"at h: got \(7,\), expected \(2, 3\)"),
        (lambda: capture(sharded)(X), ArgumentError, "a tap stands inside shard_map, which cannot hand values out"),
        (lambda: capture(jnp.sin, "h")(1.0), ArgumentError, "expected a tap, and there is none"),
    ],
)
def test_wrong_use_is_named(wrong, error, text) -> None:
    with pytest.raises(error, match=text) as caught:
        wrong()
    assert caught.value.fix
