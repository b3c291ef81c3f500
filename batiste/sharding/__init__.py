# SPDX-License-Identifier: Apache-2.0
"""Sharding: where the values of a model live on a mesh of devices."""

from __future__ import annotations

from .names import (
    PARTITION_NAME,
    abstract_with_sharding,
    add_axis,
    as_abstract,
    get_abstract_model,
    get_logical_axis_rules,
    get_named_sharding,
    get_partition_spec,
    get_var_pspec,
    logical_axis_rules,
    remove_axis,
    set_logical_axis_rules,
    sharded_struct,
    use_eager_sharding,
    using_eager_sharding,
    with_partitioning,
    with_sharding_constraint,
)

__all__ = [
    "PARTITION_NAME",
    "abstract_with_sharding",
    "add_axis",
    "as_abstract",
    "get_abstract_model",
    "get_logical_axis_rules",
    "get_named_sharding",
    "get_partition_spec",
    "get_var_pspec",
    "logical_axis_rules",
    "remove_axis",
    "set_logical_axis_rules",
    "sharded_struct",
    "use_eager_sharding",
    "using_eager_sharding",
    "with_partitioning",
    "with_sharding_constraint",
]
