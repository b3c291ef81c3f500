# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of sharding metadata: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from batiste import nnx
from batiste.sharding import add_axis, remove_axis


def mesh(*kinds: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds or (AxisType.Auto,) * 2)


def kernel(*shape: int, **metadata: object) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), **metadata)


def contradicting_rules() -> object:
    with jax.set_mesh(mesh()), nnx.logical_axis_rules((("mlp", "model"),)):
        return kernel(4, 8, out_sharding=(None, "mlp"), sharding_rules=(("mlp", "data"),))


def name_without_a_meaning() -> object:
    with jax.set_mesh(mesh()), nnx.logical_axis_rules((("embed", None),)):
        return kernel(4, 8, out_sharding=("embed", "mlp"))


def mixed_mesh() -> object:
    with jax.set_mesh(mesh(AxisType.Auto, AxisType.Explicit)):
        return kernel(4, 8, out_sharding=("data", "model"))


LAYERS = {nnx.PARTITION_NAME: "layers"}

CASES: list[tuple[str, Callable[[], object]]] = [
    ("sharding-no-mesh", lambda: kernel(4, 8, out_sharding=("data", "model"))),
    ("sharding-name-without-a-meaning", name_without_a_meaning),
    ("sharding-contradicting-rules", contradicting_rules),
    ("sharding-malformed-rules", lambda: kernel(4, out_sharding=("x",), sharding_rules="x", mesh=mesh())),
    ("sharding-is-a-string", lambda: kernel(4, out_sharding="data", mesh=mesh())),
    ("sharding-more-names-than-dims", lambda: kernel(4, out_sharding=PartitionSpec("data", "model"), mesh=mesh())),
    ("sharding-dim-not-divisible", lambda: kernel(4, 7, out_sharding=("data", "model"), mesh=mesh())),
    ("sharding-mixed-mesh", mixed_mesh),
    ("get-named-sharding-without-mesh", lambda: nnx.get_named_sharding({"x": jnp.ones(3)}, None)),
    ("axis-without-partition-name", lambda: add_axis(kernel(4), 0, {})),
    ("axis-with-another-name", lambda: remove_axis(kernel(4, out_sharding=("data",), mesh=mesh()), 0, LAYERS)),
]
