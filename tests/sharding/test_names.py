# SPDX-License-Identifier: Apache-2.0
"""The specs of whole models, models made only in the abstract, and the names of added axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from batiste.graph import BatchStat, Module, Param, Rngs, make, merge, split, state, use_eager_sharding
from batiste.graph.errors import ArgumentError
from batiste.sharding import (
    PARTITION_NAME,
    abstract_with_sharding,
    add_axis,
    as_abstract,
    get_abstract_model,
    get_named_sharding,
    get_partition_spec,
    get_var_pspec,
    logical_axis_rules,
    remove_axis,
    sharded_struct,
    with_partitioning,
    with_sharding_constraint,
)

RULES = (("embed", None), ("mlp", "b"))
initializer = jax.nn.initializers.lecun_normal()


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(request.param,) * 2)


class Block(Module):
    def __init__(self, rngs):
        named = with_partitioning(initializer, ("embed", "mlp"))
        self.kernel = make(Param, named, (8, 8), jnp.float32, rngs.params)
        self.bias = make(Param, jax.nn.initializers.zeros, (8,), jnp.float32, rngs.params, {"out_sharding": ("a",)})
        self.mean = BatchStat(jnp.zeros((8,)))


def block():
    return Block(Rngs(0))


# ---------------------------------------------------------------- specs
def test_specs_of_a_model(mesh):
    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        model = block()
        specs = get_partition_spec(model)
        assert (specs.kernel.get_value(), specs.bias.get_value(), specs.mean.get_value()) == (P(None, "b"), P("a"), P())
        assert type(specs) is Block
        assert type(specs.mean) is BatchStat
        assert specs.kernel.out_sharding == ("embed", "mlp")
        assert get_partition_spec(state(model))["kernel"].get_value() == get_var_pspec(model.kernel) == P(None, "b")


def test_specs_of_other_leaves():
    tree = {"array": np.ones(3), "abstract": jax.ShapeDtypeStruct((3,), jnp.float32), "number": 3, "none": None}
    assert get_partition_spec(tree) == {"array": P(), "abstract": P(), "number": None, "none": None}


def test_named_shardings_put_a_model_where_it_was_made(mesh):
    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        placed = block()
        with use_eager_sharding(False):
            graphdef, values = split(block())
        moved = merge(graphdef, jax.device_put(values, get_named_sharding(values, mesh)))
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(placed)):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(x, y)


def test_a_named_sharding_keeps_its_spec_on_another_mesh(mesh):
    kernel = Param(jnp.ones((8, 8)), out_sharding=NamedSharding(mesh, P("a")))
    other = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    assert get_named_sharding(kernel, other).get_value() == NamedSharding(other, P("a"))


def test_shardings_need_a_mesh_that_has_the_axes(mesh):
    kernel = Param(jnp.ones((8, 8)), out_sharding=("z",), eager_sharding=False)
    with pytest.raises(ArgumentError, match=r"Resource axis: z of P\('z',?\) is not found in mesh"):
        get_named_sharding(kernel, mesh)
    with pytest.raises(ArgumentError, match="needs a mesh"):
        get_named_sharding(kernel, None)  # type: ignore[arg-type]


def test_with_partitioning_passes_metadata_on(mesh):
    named = with_partitioning(initializer, ("x", None), mesh=mesh, sharding_rules=(("x", "a"),), note=3)
    kernel = Param(named(jax.random.key(0), (8, 8), jnp.float32))
    assert kernel[...].sharding.spec == P("a", None)
    assert (kernel.note, kernel.mesh, kernel.out_sharding) == (3, mesh, ("x", None))
    np.testing.assert_array_equal(kernel[...], initializer(jax.random.key(0), (8, 8), jnp.float32))


# ---------------------------------------------------------------- models in the abstract
@pytest.mark.parametrize("graph", [True, False])
def test_an_abstract_model_is_the_model_without_arrays(mesh, graph):
    with logical_axis_rules(RULES):
        graphdef, abstract = get_abstract_model(block, mesh, graph=graph)
        with jax.set_mesh(mesh):
            made = split(block(), graph=graph)
    assert graphdef == made[0]
    assert jax.tree.structure(abstract) == jax.tree.structure(made[1])
    for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(made[1])):
        assert isinstance(x, jax.ShapeDtypeStruct)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert isinstance(x.sharding.mesh, jax.sharding.Mesh)
        assert x.sharding.is_equivalent_to(y.sharding, y.ndim)


def test_no_array_is_made_for_an_abstract_model(mesh):
    def huge():
        return Param(jnp.zeros((1 << 30, 1 << 10)), out_sharding=("a", "b"))

    _, abstract = get_abstract_model(huge, mesh)
    assert abstract.get_value().shape == (1 << 30, 1 << 10)


def test_as_abstract_adds_shardings_to_what_has_none():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        plain = jax.eval_shape(block)
        model = as_abstract(plain)
        assert plain.kernel.sharding is None
        assert model.kernel.sharding == NamedSharding(mesh.abstract_mesh, P(None, "b"))
        assert model.bias.sharding.spec == P("a")
        assert model.mean is plain.mean
        assert as_abstract(model).kernel is model.kernel
        assert sharded_struct(plain.mean).sharding.spec == P()
        with pytest.warns(DeprecationWarning, match="Use as_abstract instead"):
            assert abstract_with_sharding(plain).bias.sharding.spec == P("a")


def test_as_abstract_keeps_sharing_and_leaves_arrays_alone(mesh):
    abstract = Param(jax.ShapeDtypeStruct((8,), jnp.float32), out_sharding=("a",), mesh=mesh, eager_sharding=False)
    concrete = Param(jnp.ones(8), out_sharding=("a",), eager_sharding=False)
    first, second, same = as_abstract([abstract, abstract, concrete])
    assert first is second
    assert first.sharding == NamedSharding(mesh, P("a"))
    assert same is concrete


def test_as_abstract_without_a_mesh():
    abstract = Param(jax.ShapeDtypeStruct((8,), jnp.float32), out_sharding=("a",), eager_sharding=False)
    with pytest.raises(ValueError, match="mesh context or metadata is required"):
        as_abstract(abstract)


def test_without_a_mesh_what_is_replicated_stays_as_it_is():
    abstract = Param(jax.ShapeDtypeStruct((8,), jnp.float32), out_sharding=None)
    assert as_abstract(abstract) is abstract


# ---------------------------------------------------------------- constraints
def test_a_constraint_in_and_outside_of_programs(mesh):
    x = jnp.ones((8, 8))
    assert with_sharding_constraint(x, ("a", None)) is x
    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        inside = jax.jit(lambda x: with_sharding_constraint({"y": 2 * x}, ("embed", "mlp")))(x)["y"]
        outside = with_sharding_constraint(x, ("embed", "mlp"))
        assert inside.sharding.spec == outside.sharding.spec == P(None, "b")
    assert with_sharding_constraint(x, ("x",), mesh=mesh, rules=(("x", "a"),)).sharding.spec[0] == "a"


# ---------------------------------------------------------------- axes that come and go
LAYERS = {PARTITION_NAME: "layers"}


def named(*names, **metadata):
    return Param(jnp.ones((2, 3)), out_sharding=names, eager_sharding=False, **metadata)


@pytest.mark.parametrize("names", [(), ("x",), ("x", "y"), ("layers",), (None, "y"), (("x", "y"),)], ids=str)
@pytest.mark.parametrize("index", range(3))
def test_removing_undoes_adding(names, index):
    variable = named(*names)
    add_axis(variable, index, LAYERS)
    assert variable.out_sharding[index] == "layers"
    remove_axis(variable, index, LAYERS)
    assert variable.out_sharding[: len(names)] == names
    assert not any(variable.out_sharding[len(names) :])


@pytest.mark.parametrize(
    ("names", "index", "expected"),
    [
        (("x", "y"), 0, ("layers", "x", "y")),
        (("x", "y"), 2, ("x", "y", "layers")),
        (("x",), 2, ("x", None, "layers")),
        (P("x"), 1, ("x", "layers")),
        ((), 0, ("layers",)),
    ],
    ids=str,
)
def test_where_a_name_is_put(names, index, expected):
    variable = Param(jnp.ones((2, 3)), out_sharding=names, eager_sharding=False)
    assert add_axis({"v": variable}, index, LAYERS)["v"] is variable
    assert variable.out_sharding == expected


def test_a_sharding_gets_the_axis_in_its_spec(mesh):
    variable = Param(jnp.ones((8, 8)), out_sharding=NamedSharding(mesh, P("a")))
    add_axis(variable, 0, {PARTITION_NAME: "b"})
    assert variable.out_sharding == NamedSharding(mesh, P("b", "a"))
    remove_axis(variable, 0, {PARTITION_NAME: "b"})
    assert variable.out_sharding == NamedSharding(mesh, P("a"))


def test_variables_without_names_stay_without():
    plain, none = Param(jnp.ones(3)), Param(jnp.ones(3), out_sharding=None)
    add_axis([plain, none, jnp.ones(3)], 0, LAYERS)
    assert not plain.has_metadata("out_sharding")
    assert none.out_sharding is None


def test_other_metadata_of_the_transform_are_names_too():
    variable = named("x", roles=("u", "v"))
    add_axis(variable, 1, {**LAYERS, "roles": "w", "absent": "z"})
    assert (variable.out_sharding, variable.roles) == (("x", "layers"), ("u", "w", "v"))
    remove_axis(variable, 1, {**LAYERS, "roles": "w"})
    assert (variable.out_sharding, variable.roles) == (("x",), ("u", "v"))


def test_a_variable_type_hears_of_its_axes():
    heard = []

    class Listening(Param):
        def add_axis(self, axis_index, axis_name):
            heard.append(("add", axis_index, axis_name))

        def remove_axis(self, axis_index, axis_name):
            heard.append(("remove", axis_index, axis_name))

    variable = Listening(jnp.ones(3))
    add_axis(variable, 1, LAYERS)
    remove_axis(variable, 1, LAYERS)
    assert heard == [("add", 1, "layers"), ("remove", 1, "layers")]


@pytest.mark.parametrize("change", [add_axis, remove_axis])
def test_the_transform_must_name_its_axis(change):
    with pytest.raises(ValueError, match='"partition_name" is not specified in transform_metadata'):
        change(named("x"), 0, {"name": "layers"})


@pytest.mark.parametrize(
    ("names", "index"), [(("x", "y"), 0), (("layers", "x"), 1), (("layers",), 1), ((), 0)], ids=str
)
def test_only_the_right_name_is_removed(names, index):
    with pytest.raises(ValueError, match=f"Expected to remove 'layers' at index {index}"):
        remove_axis(named(*names), index, LAYERS)
