# SPDX-License-Identifier: Apache-2.0
"""Boxes go through init, apply, optimizers and transforms, and say where their values are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import batiste.core.meta as meta
import batiste.linen as nn
from batiste.errors import PartitioningUnspecifiedError
from batiste.graph.errors import ArgumentError

LAYERS = {nn.PARTITION_NAME: "layers"}
RULES = (("embed", "x"), ("mlp", "y"))
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(kind=AUTO):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(4, kernel_init=nn.with_partitioning(init, ("x", "y")))(x)
        return nn.Dense(2, kernel_init=nn.with_logical_partitioning(init, ("mlp", "embed")))(x)


X = jnp.ones((2, 6))


def test_init_boxes_and_apply_unboxes():
    variables = Mlp().init(jax.random.key(0), X)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == ("x", "y")
    y, plain = Mlp().apply(variables, X), Mlp().apply(nn.unbox(variables), X)
    np.testing.assert_array_equal(y, plain)


def test_the_shape_inside_a_box_is_checked():
    variables = Mlp().init(jax.random.key(0), X)
    with pytest.raises(Exception, match=r"kernel.*\(3, 3\)"):
        Mlp().apply(meta.map_axis_meta(lambda box: box.replace_boxed(jnp.ones((3, 3))), variables), X)


def test_a_model_is_made_where_its_boxes_say():
    mesh = mesh_of()
    abstract = jax.eval_shape(Mlp().init, jax.random.key(0), X)
    specs = nn.logical_to_mesh(nn.get_partition_spec(abstract), (("x", "x"), ("y", "y"), *RULES))
    assert specs["params"]["Dense_0"] == {"kernel": P("x", "y"), "bias": P()}
    assert specs["params"]["Dense_1"]["kernel"] == P("y", "x")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    with jax.set_mesh(mesh):
        variables = jax.jit(Mlp().init, out_shardings=shardings)(jax.random.key(0), X)
    assert variables["params"]["Dense_1"]["kernel"].value.sharding.spec == P("y", "x")


def test_an_optimizer_sees_through_boxes():
    params = Mlp().init(jax.random.key(0), X)["params"]
    optimizer = optax.adam(0.1)
    grads = jax.grad(lambda p: Mlp().apply({"params": p}, X).sum())(params)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert state[0].mu["Dense_0"]["kernel"].names == ("x", "y")


@pytest.mark.parametrize(("index", "names"), [(0, "LAB"), (1, "ALB"), (2, "ABL"), (-1, "ALB")])
def test_an_added_axis_can_be_removed(index, names):
    box = nn.Partitioned(1, ("A", "B"))
    longer = box.add_axis(index, {nn.PARTITION_NAME: "L"})
    assert longer.names == tuple(names)
    assert longer.remove_axis(names.index("L"), {nn.PARTITION_NAME: "L"}) == box


def test_an_axis_beyond_the_names_leaves_room():
    assert nn.Partitioned(1, ("A",)).add_axis(3, LAYERS).names == ("A", None, None, "layers")


@pytest.mark.parametrize(
    ("params", "index", "error"),
    [({}, 0, PartitioningUnspecifiedError), (LAYERS, 0, ArgumentError), (LAYERS, 5, ArgumentError)],
)
def test_another_axis_is_not_removed(params, index, error):
    with pytest.raises(error):
        nn.Partitioned(1, ("A", "B")).remove_axis(index, params)


def test_lifted_transforms_name_their_axis():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.ones, ("x", "y")))(x), None

    stack = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=3, metadata_params=LAYERS)
    variables = stack().init(jax.random.key(0), X, None)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert kernel.names == ("layers", "x", "y") and kernel.value.shape == (3, 6, 6)
    assert stack().apply(variables, X, None)[0].shape == (2, 6)
    unnamed = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=3)
    with pytest.raises(PartitioningUnspecifiedError, match="partition_name"):
        unnamed().init(jax.random.key(0), X, None)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("compile", [False, True])
def test_unboxing_puts_the_value_on_the_mesh_in_context(kind, compile):
    def unbox(x):
        return nn.Partitioned(x, ("x", "y")).unbox(), nn.LogicallyPartitioned(x, ("mlp", "embed"), rules=RULES).unbox()

    with jax.set_mesh(mesh_of(kind)):
        boxed, logical = (jax.jit(unbox) if compile else unbox)(jnp.ones((4, 4)))
    assert boxed.sharding.spec == P("x", "y") and logical.sharding.spec == P("y", "x")


def test_a_box_with_a_mesh_needs_none_in_context():
    box = nn.Partitioned(jnp.ones((4, 4)), ("x", None), mesh_of())
    assert box.unbox().sharding.spec == P("x", None)
    assert box.unbox(apply_constraint=False).sharding == box.value.sharding
    with pytest.raises(ArgumentError, match="nowhere"):
        box.replace(names=("nowhere",)).unbox()


def test_boxes_in_boxes():
    outer = nn.Partitioned(nn.Partitioned(1, ("inner",)), ("outer",))
    assert nn.unbox(outer) == 1
    assert meta.replace_boxed(outer, 2) == nn.Partitioned(nn.Partitioned(2, ("inner",)), ("outer",))
    assert nn.get_partition_spec({"box": outer, "array": X, "other": "text"}) == {
        "box": P("outer"), "array": P(), "other": None,
    }  # fmt: skip


def test_a_box_and_the_metadata_of_a_variable_say_the_same():
    for box in (nn.Partitioned(1, ("x",), None), nn.LogicallyPartitioned(1, ("x",), None, RULES)):
        metadata = box.to_nnx_metadata()
        assert metadata["out_sharding"] == ("x",)
        assert type(box).from_nnx_metadata({**metadata, "other": 1}) == box


def test_the_mesh_in_context():
    assert meta.get_global_mesh() is None and not meta.global_mesh_defined()
    with jax.set_mesh(mesh_of()):
        assert meta.global_mesh_defined()
