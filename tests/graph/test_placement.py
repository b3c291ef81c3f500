# SPDX-License-Identifier: Apache-2.0
"""A value goes where the metadata of its Variable say: on meshes of both axis types, in and outside of programs."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from batiste.graph import Param
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.placement import (
    get_logical_axis_rules,
    logical_axis_rules,
    place,
    set_logical_axis_rules,
    spec_of,
    use_eager_sharding,
    using_eager_sharding,
)

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
RULES = (("embed", None), ("mlp", "b"), ("batch", ("a", "b")))


def mesh_of(kind, *more):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, *(more or (kind,))))


@pytest.fixture(params=[AUTO, EXPLICIT], ids=["auto", "explicit"])
def mesh(request):
    with jax.set_mesh(mesh := mesh_of(request.param)):
        yield mesh


SPECS = [("a", "b"), ("b",), (None, "a"), (("a", "b"), None), P("a"), ["b", None]]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("make", [jnp.ones, np.ones], ids=["jax", "numpy"])
def test_an_array_is_moved(mesh, spec, make):
    array = place(make((8, 8)), {"out_sharding": spec})
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), 2)
    np.testing.assert_array_equal(array, np.ones((8, 8)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_traced_array_is_constrained(mesh, spec):
    array = jax.jit(lambda: place(jnp.ones((8, 8)), {"out_sharding": spec}))()
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), 2)


def test_an_array_from_before_the_mesh_is_moved_too():
    array = jnp.ones((8, 8))
    with jax.set_mesh(mesh_of(AUTO)) as mesh:
        assert place(array, {"out_sharding": ("a",)}).sharding == NamedSharding(jax.sharding.get_mesh(), P("a"))
    del mesh


def test_an_abstract_array_gets_the_sharding(mesh):
    abstract = place(jax.ShapeDtypeStruct((8, 8), jnp.float32), {"out_sharding": ("a",)})
    assert abstract.sharding == NamedSharding(mesh, P("a"))


def test_explicit_axes_are_in_the_type():
    with jax.set_mesh(mesh_of(EXPLICIT)):
        assert jax.typeof(place(np.ones((8, 8)), {"out_sharding": ("a",)})).sharding.spec == P("a", None)
        assert jax.eval_shape(lambda: place(jnp.ones((8, 8)), {"out_sharding": ("a",)})).sharding.spec == P("a", None)


def test_every_array_of_a_pytree_is_moved(mesh):
    value = place({"x": jnp.ones(8), "y": np.ones((8, 3))}, {"out_sharding": ("a",)})
    assert [x.sharding.spec[0] for x in jax.tree.leaves(value)] == ["a", "a"]


def test_keys_are_moved(mesh):
    assert place(jax.random.split(jax.random.key(0), 8), {"out_sharding": ("a",)}).sharding.spec == P("a")


def test_what_is_left_open_is_not_split():
    with jax.set_mesh(mesh_of(AUTO)):
        assert place(jnp.ones((8, 8)), {"out_sharding": P(P.UNCONSTRAINED, "a")}).sharding.spec == P(None, "a")


@pytest.mark.parametrize("names", [None, (), P()], ids=str)
def test_nothing_said_nothing_done(names):
    array = jnp.ones((8, 8))
    assert place(array, {"out_sharding": names}) is array
    assert place(array, {}) is array


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_the_mesh_may_be_metadata(kind):
    array = place(jnp.ones((8, 8)), {"out_sharding": ("a", None), "mesh": mesh_of(kind)})
    assert array.sharding == NamedSharding(mesh_of(kind), P("a", None))


def test_a_whole_sharding_needs_no_mesh():
    sharding = NamedSharding(mesh_of(AUTO), P("a"))
    assert place(jnp.ones((8, 8)), {"out_sharding": sharding}).sharding == sharding


def test_a_layout_can_come_with_the_sharding():
    metadata = {"out_sharding": Format(Layout((1, 0)), NamedSharding(mesh_of(AUTO), P("a")))}
    assert place(jnp.ones((8, 8)), metadata).format.layout.major_to_minor == (1, 0)
    assert jax.jit(lambda: place(jnp.ones((8, 8)), metadata))().sharding.spec == P("a")
    assert spec_of(metadata["out_sharding"]) == P("a")


@pytest.mark.parametrize("traced", [False, True])
def test_a_mesh_of_mixed_axes(traced):
    make = lambda: place(jnp.ones((8, 8)), {"out_sharding": ("a", "b")})
    with (
        jax.set_mesh(mesh_of(AUTO, EXPLICIT)),
        pytest.raises(ArgumentError, match="all axes as Explicit or all axes as Auto"),
    ):
        jax.jit(make)() if traced else make()


# ---------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("embed", "mlp"), P(None, "b")),
        (("mlp", "mlp"), P("b", "b")),
        (("batch", None), P(("a", "b"), None)),
        (("a", "mlp"), P("a", "b")),
        ((("embed", "mlp", "a"),), P(("b", "a"))),
        (P("mlp"), P("b")),
        (None, P()),
        ((), P()),
    ],
    ids=str,
)
def test_rules_say_what_names_mean(names, spec):
    assert spec_of(names, RULES) == spec
    with logical_axis_rules(RULES):
        assert spec_of(names) == spec


def test_the_last_rule_of_a_name_counts():
    assert spec_of(("x",), (("x", "a"), ("x", "b"))) == P("b")


def test_rules_in_context_and_metadata_are_joined():
    with logical_axis_rules((("x", "a"),)):
        assert spec_of(("x", "y"), (("y", "b"), ("x", "a"))) == P("a", "b")


def test_rules_that_contradict_each_other():
    with logical_axis_rules((("x", "a"),)), pytest.raises(ArgumentError, match="annotations for x: a vs b"):
        spec_of(("x",), (("x", "b"),))


def test_rules_of_a_block_replace_those_outside():
    with logical_axis_rules(RULES):
        with logical_axis_rules((("x", "a"),)):
            assert get_logical_axis_rules() == (("x", "a"),)
        assert get_logical_axis_rules() == RULES
    assert get_logical_axis_rules() == ()


def test_rules_belong_to_a_thread():
    seen = []
    with logical_axis_rules(RULES):
        thread = threading.Thread(target=lambda: seen.append(get_logical_axis_rules()))
        thread.start()
        thread.join()
    assert seen == [()]


def test_rules_may_be_set_for_good():
    with logical_axis_rules(()):
        set_logical_axis_rules(RULES)
        assert get_logical_axis_rules() == RULES
    assert get_logical_axis_rules() == ()


# ---------------------------------------------------------------- Variables
def test_a_variable_is_placed_when_it_is_made(mesh):
    with logical_axis_rules(RULES):
        kernel = Param(jnp.ones((8, 8)), out_sharding=("embed", "mlp"))
    assert kernel[...].sharding.spec == P(None, "b")
    assert kernel.out_sharding == ("embed", "mlp")


def test_a_variable_can_say_no(mesh):
    kernel = Param(np.ones((8, 8)), out_sharding=("a", "b"), eager_sharding=False)
    assert isinstance(kernel.get_value(), np.ndarray)


def test_the_switch_is_remembered_by_the_variable():
    with use_eager_sharding(False):
        assert not using_eager_sharding()
        kernel = Param(jnp.ones((8, 8)), out_sharding=("a", "b"))
    assert kernel.get_metadata("eager_sharding") is False
    assert using_eager_sharding()


def test_a_variable_made_in_a_mapped_function_leaves_the_mapped_axis_open():
    make = jax.vmap(lambda key: Param(jax.random.normal(key, (8,)), out_sharding=("b",), mesh=mesh_of(AUTO)))
    assert make(jax.random.split(jax.random.key(0), 2))[...].sharding.spec == P(None, "b")


# ---------------------------------------------------------------- bad input
def test_no_mesh():
    with pytest.raises(ValueError, match=r"mesh context or metadata is required .* out_sharding=P\('a', 'b'\)"):
        Param(jnp.ones((8, 8)), out_sharding=("a", "b"))


def test_an_axis_that_the_mesh_has_not(mesh):
    with pytest.raises(ValueError, match=r"Resource axis: z of P\('a', 'z'\) is not found in mesh: \('a', 'b'\)"):
        Param(jnp.ones((8, 8)), out_sharding=("a", "z"))


@pytest.mark.parametrize("traced", [False, True])
def test_a_dim_that_cannot_be_divided(mesh, traced):
    make = lambda: Param(jnp.ones((2, 3)), out_sharding=("a", "b"))
    with pytest.raises(ShapeError, match="dim 1 is not divisible by the 4 devices of mesh axis 'b'"):
        jax.jit(make)() if traced else make()


@pytest.mark.parametrize("traced", [False, True])
def test_more_names_than_dims(mesh, traced):
    make = lambda: Param(jnp.ones(8), out_sharding=("a", "b"))
    with pytest.raises(ShapeError, match=r"rank 1 cannot be sharded as P\('a', 'b'\)"):
        jax.jit(make)() if traced else make()


def test_more_names_than_dims_that_say_nothing(mesh):
    assert Param(jnp.ones(8), out_sharding=("a", None))[...].sharding.spec == P("a")


@pytest.mark.parametrize("names", ["a", 3])
def test_names_that_are_no_tuple(mesh, names):
    with pytest.raises(ArgumentError, match="out_sharding is malformed"):
        Param(jnp.ones((8, 8)), out_sharding=names)


@pytest.mark.parametrize("rules", ["abc", (("a",),), 3])
def test_rules_that_are_no_pairs(rules):
    with pytest.raises(ArgumentError, match="malformed logical axis rules"):
        spec_of(("a",), rules)
