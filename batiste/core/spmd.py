# SPDX-License-Identifier: Apache-2.0
"""Rules for logical axes, and values put where they say, under Flax's path."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from batiste.graph.placement import Rules, place, spec_of
from batiste.sharding import get_logical_axis_rules, logical_axis_rules, set_logical_axis_rules

__all__ = [
    "from_sharding_rules",
    "get_logical_axis_rules",
    "get_pspec",
    "logical_axis_rules",
    "set_logical_axis_rules",
    "shard_value",
]


def from_sharding_rules(sharding: Any, sharding_rules: Rules) -> tuple[Any, ...]:
    """The mesh axes that each name stands for, the names that no rule has unchanged.

    >>> from_sharding_rules(("embed", "data"), (("embed", "model"),))
    ('model', 'data')
    """
    meanings = dict(sharding_rules)
    return tuple(meanings.get(name, name) if isinstance(name, str) else name for name in sharding)


def get_pspec(sharding: Any, sharding_rules: Rules | None = None) -> PartitionSpec | NamedSharding | None:
    """The PartitionSpec of a Variable's `out_sharding`, by these rules and those in context.

    Raises:
        ArgumentError: the rules contradict each other.
    """
    return sharding if sharding is None or isinstance(sharding, NamedSharding) else spec_of(sharding, sharding_rules)


def shard_value(
    value: jax.Array, out_sharding: Any, sharding_rules: Rules | None, mesh: Mesh | AbstractMesh | None
) -> jax.Array:
    """`value` where `out_sharding` says, on `mesh` or the mesh in context.

    Raises:
        ArgumentError: there is no mesh, or it lacks an axis.
    """
    return place(value, {"out_sharding": out_sharding, "sharding_rules": sharding_rules, "mesh": mesh})
