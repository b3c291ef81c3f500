# SPDX-License-Identifier: Apache-2.0
"""Variables land where Flax puts them, and their metadata change as in Flax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from batiste import nnx

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)


def place_of(variable):
    value, metadata = variable.get_raw_value(), variable.get_metadata()
    return type(variable).__name__, getattr(value, "sharding", value), metadata


RULES = (("x", "a"), ("y", None), ("z", ("a", "b")), ("x", "b"))
METADATA = {
    "two axes": {"out_sharding": ("a", "b")},
    "one axis": {"out_sharding": ("b",)},
    "a spec": {"out_sharding": P(None, "a")},
    "several axes of a dim": {"out_sharding": (("a", "b"), None)},
    "nothing": {"out_sharding": None},
    "empty": {"out_sharding": ()},
    "names": {"out_sharding": ("x", "y")},
    "a name of several axes": {"out_sharding": ("z",)},
    "names and axes": {"out_sharding": ("a", "y")},
    "own rules": {"out_sharding": ("q", "y"), "sharding_rules": (("q", "a"),)},
    "not now": {"out_sharding": ("a", "b"), "eager_sharding": False},
    "unknown": {"out_sharding": ("a", "nowhere")},
    "contradiction": {"out_sharding": ("x", "y"), "sharding_rules": (("x", "a"),)},
    "mixed": {"out_sharding": ("a", "b"), "mesh": jax.make_mesh((2, 4), ("a", "b"), axis_types=(AUTO, EXPLICIT))},
}
HOW = {
    "made": lambda make: make(),
    "jitted": lambda make: jax.jit(make)(),
    "mapped": lambda make: jax.vmap(lambda _: make(), out_axes=None, axis_size=2)(jnp.zeros(2)),
    "abstract": lambda make: jax.eval_shape(make),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_a_variable_is_placed_the_same(kind, name, how):
    def run(ns):
        with jax.set_mesh(mesh_of(kind)), ns.logical_axis_rules(RULES):
            try:
                return place_of(HOW[how](lambda: ns.Param(jnp.ones((8, 16)), **METADATA[name])))
            except ValueError as error:
                return ValueError if isinstance(error, ValueError) else error

    ours, theirs = run(nnx), run(flax_nnx)
    assert ours == theirs


@pytest.mark.parametrize("name", METADATA)
def test_without_a_mesh(name):
    def run(ns):
        try:
            with ns.logical_axis_rules(RULES):
                return place_of(ns.Param(jnp.ones((8, 16)), **METADATA[name]))
        except ValueError:
            return ValueError

    assert run(nnx) == run(flax_nnx)


@pytest.mark.parametrize("name", sorted(METADATA.keys() - {"contradiction"}))
def test_specs_are_the_same(name):
    def run(ns):
        metadata = {**METADATA[name], "eager_sharding": False}
        with ns.logical_axis_rules(RULES):
            tree = {"v": ns.Param(jnp.ones((8, 16)), **metadata), "x": jnp.ones(3), "n": 3, "none": None}
            specs = ns.get_partition_spec(tree)
            try:
                shardings = ns.get_named_sharding({"v": tree["v"], "x": tree["x"]}, mesh_of(AUTO))
            except ValueError:
                shardings = {"v": tree["v"], "x": ValueError}
        return place_of(specs.pop("v")), specs, place_of(shardings.pop("v"))[::2], shardings

    assert run(nnx) == run(flax_nnx)


def test_models_in_the_abstract_are_the_same():
    def run(ns):
        class Model(ns.Module):
            def __init__(self, rngs):
                self.rngs = rngs
                init = ns.with_partitioning(ns.initializers.lecun_normal(), ("x", "y"), mesh=mesh_of(AUTO))
                self.kernel = ns.Param(init(rngs.params(), (8, 16)))
                self.bias = ns.Param(jnp.zeros((16,)), out_sharding=("b",))
                self.mean = ns.BatchStat(jnp.zeros(16))

        with ns.logical_axis_rules(RULES):
            state = ns.get_abstract_model(lambda: Model(ns.Rngs(0)), mesh_of(AUTO))[1]
            with jax.set_mesh(mesh_of(AUTO)):
                abstract = ns.as_abstract(jax.eval_shape(lambda: Model(ns.Rngs(0))))
        flat = [(path, place_of(v), v.get_raw_value()) for path, v in ns.to_flat_state(state)]
        return flat, [place_of(v) for v in (abstract.kernel, abstract.bias, abstract.mean)]

    assert run(nnx) == run(flax_nnx)


@pytest.mark.parametrize("index", [-1, 0, 1, 2])
@pytest.mark.parametrize("name", ["two axes", "one axis", "a spec", "several axes of a dim", "nothing", "names"])
def test_an_added_axis_is_named_the_same(name, index):
    def run(ns):
        variable = ns.Param(jnp.ones((8, 16)), **{**METADATA[name], "eager_sharding": False}, roles=("u", "v"))
        metadata = {ns.PARTITION_NAME: "layers", "roles": "w", "absent": "z"}
        ns.spmd.add_axis(variable, index, metadata)
        added = variable.get_metadata()
        if index >= 0:
            ns.spmd.remove_axis(variable, index, metadata)
        return added, variable.get_metadata()

    assert run(nnx) == run(flax_nnx)


def test_the_switch_is_the_same():
    def run(ns):
        seen = [ns.using_eager_sharding()]
        with ns.use_eager_sharding(False):
            seen += [ns.using_eager_sharding(), ns.Param(jnp.ones(3)).get_metadata("eager_sharding")]
        decorated = ns.use_eager_sharding(False)(ns.using_eager_sharding)
        setting = ns.use_eager_sharding(False)
        seen += [decorated(), ns.using_eager_sharding()]
        with setting:
            seen.append(ns.use_eager_sharding.current_value())
        return [*seen, ns.using_eager_sharding()]

    assert run(nnx) == run(flax_nnx)
