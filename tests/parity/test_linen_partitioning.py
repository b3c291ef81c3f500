# SPDX-License-Identifier: Apache-2.0
"""Logical axes, their rules, and collections of axis names agree with Flax's."""

from __future__ import annotations

import flax.linen
import flax.linen.partitioning
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import batiste.linen

RULES = (
    ("a", "x"), ("b", "y"), ("c", ("x", "y")), ("d", None), ("a", "z"), ("e", "x"), ("e", "y"), ("e", None),
    ("f", P.UNCONSTRAINED),
)  # fmt: skip
SOME_RULES = {"many": RULES, "empty": (), "none": None, "dict": {"a": "x"}, "triple": (("a", "x", "y"),)}
CONSTRAINTS = [("a", "b"), ("unknown", "b"), ("a", "e"), ("a", "c"), ("d", None), ("a",), None, ("a", "a")]
NAMES = [
    ("a", "b"), ("b", "a"), ("a", "e"), ("e", "a"), ("e", "b", "a"), ("a", "c"), ("c", "a"), ("c", "e"), ("d",),
    ("unknown",), ("a", None), (), None, ("x",), ("c", "b"), (("x", "y"), "c"), P("a", "b"), ["a", "b"], ("f", "a"),
    (P.UNCONSTRAINED, "a"), ("a", "a"), ("unknown", "unknown"),
]  # fmt: skip


def outcome(f):
    try:
        return f()
    except ValueError:
        return ValueError


def mesh():
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("rules", SOME_RULES)
def test_names_become_the_same_mesh_axes(names, rules):
    ours, theirs = (
        outcome(lambda lib=lib: lib.logical_to_mesh_axes(names, SOME_RULES[rules]))
        for lib in (batiste.linen, flax.linen)
    )
    assert ours == theirs


@pytest.mark.parametrize("names", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("fallback", ["AXIS_IS_UNSHARDED", "RAISE_ERROR", "NO_CONSTRAINT"])
@pytest.mark.parametrize("with_mesh", [True, False])
def test_a_constraint_is_the_same(names, fallback, with_mesh):
    def constrain(lib):
        how = lib.partitioning.RulesFallback[fallback]
        return lib.with_logical_constraint(
            jnp.ones((4, 4)), names, rules=RULES, mesh=mesh() if with_mesh else None, fallback=how
        ).sharding

    assert outcome(lambda: constrain(batiste.linen)) == outcome(lambda: constrain(flax.linen))


def layer(lib):
    p = lib.partitioning

    class Layer(lib.Module):
        @lib.compact
        def __call__(self, x, _=None):
            w = p.param_with_axes("w", lib.initializers.normal(1.0), (4, 4), axes=("a", "b"))
            pair = p.param_with_axes("pair", lambda key: (jnp.ones(4), jnp.ones(4)), axes=(("a",), ("b",)))
            plain = p.param_with_axes("plain", lib.initializers.zeros, (4,))
            mean = p.variable_with_axes("stats", "mean", jnp.zeros, (4,), axes=("b",))
            mean.value = mean.value + 1
            return x @ w + (pair[0] + pair[1] + plain + mean.value)[None], None

    return Layer


AXES = {"params": 0, "stats": 1}
SPLIT = {"params": True}
LIFTED = {
    "plain": lambda p, c: c,
    "remat": lambda p, c: p.remat(c),
    "scan": lambda p, c: p.scan_with_axes(c, AXES, split_rngs=SPLIT, length=3, axes_collections=("params", "stats")),
    "scan without statistics": lambda p, c: p.scan_with_axes(c, AXES, split_rngs=SPLIT, length=3, axis_name="depth"),
    "vmap": lambda p, c: p.vmap_with_axes(
        c, AXES, SPLIT, in_axes=None, axis_size=3, partitioning_axis_names={"params": "L", "stats": "M"}
    ),
    "vmap of params": lambda p, c: p.vmap_with_axes(
        c, AXES, SPLIT, in_axes=None, axis_size=3, partitioning_axis_names={"params": "L"}
    ),
    "vmap without names": lambda p, c: p.vmap_with_axes(c, AXES, SPLIT, in_axes=None, axis_size=3),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_collections_of_names_follow_the_variables(lift):
    def run(lib):
        model = LIFTED[lift](lib.partitioning, layer(lib))()
        variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
        out, changed = model.apply(variables, jnp.ones((2, 4)), mutable=True)
        names, shapes = [], []
        for trees in (variables, changed):
            axes = {col for col in trees if col.endswith("_axes")}
            names.append({col: dict(lib.partitioning.get_axis_names(trees[col])) for col in axes})
            shapes.append({col: jax.tree.map(jnp.shape, trees[col]) for col in trees if col not in axes})
        return names, shapes, out[0]

    (names, shapes, out), (their_names, their_shapes, their_out) = run(batiste.linen), run(flax.linen)
    assert names == their_names and shapes == their_shapes
    assert jnp.allclose(out, their_out, atol=1e-5)


def test_rules_in_context_are_one_thing():
    nn = batiste.linen
    with nn.partitioning.axis_rules(RULES):
        assert nn.get_logical_axis_rules() == nn.partitioning.get_axis_rules() == RULES
        assert nn.logical_to_mesh({"w": P("b", "a"), "none": None}) == {"w": P("y", "x"), "none": None}
    assert nn.get_logical_axis_rules() == ()
