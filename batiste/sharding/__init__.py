# SPDX-License-Identifier: Apache-2.0
"""Sharding: where the values of a model live on a mesh of devices."""

from __future__ import annotations

from .collectives import Collective, collectives, count_collectives
from .explain import Explanation, Memory, explain_sharding, memory_plan
from .mesh import make_mesh
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
from .pipeline import pipeline, pipelined
from .plan import Plan, constrain, constrain_batch, current_plan, use
from .ready import data_parallel, fsdp, fsdp_tensor, ready_plan, tensor_parallel
from .sequence import gather_attention, ring_attention

__all__ = [
    "PARTITION_NAME",
    "Collective",
    "Explanation",
    "Memory",
    "Plan",
    "abstract_with_sharding",
    "add_axis",
    "as_abstract",
    "collectives",
    "constrain",
    "constrain_batch",
    "count_collectives",
    "current_plan",
    "data_parallel",
    "explain_sharding",
    "fsdp",
    "fsdp_tensor",
    "gather_attention",
    "get_abstract_model",
    "get_logical_axis_rules",
    "get_named_sharding",
    "get_partition_spec",
    "get_var_pspec",
    "logical_axis_rules",
    "make_mesh",
    "memory_plan",
    "pipeline",
    "pipelined",
    "ready_plan",
    "remove_axis",
    "ring_attention",
    "set_logical_axis_rules",
    "sharded_struct",
    "tensor_parallel",
    "use",
    "use_eager_sharding",
    "using_eager_sharding",
    "with_partitioning",
    "with_sharding_constraint",
]
