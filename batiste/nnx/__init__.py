# SPDX-License-Identifier: Apache-2.0
"""The object face: models are plain Python objects, and functional transforms take them as arguments.

The public names are those of `flax.nnx`; each is loaded the first time it is used. `__init__.pyi` says the same to type
checkers.
"""

from __future__ import annotations

import importlib
import typing
import warnings

from batiste.graph import Variable

_HOMES = {
    "batiste.graph": """
        All Any BatchStat Cache Data Dict Everything FlatState GraphDef GraphState Intermediate List Module Not
        Nothing Object OfType Param PathContains Perturbation Pytree Sequential State Static Variable
        VariableMetadata WithTag as_pure check_pytree clone data dataclass diff filter_state find_duplicates
        from_flat_state graphdef has_data is_data iter_children iter_graph iter_module_children iter_modules map
        map_state merge merge_state pop pure recursive_map register_data_type register_variable_name
        replace_by_pure_dict restore_int_paths set_graph_mode set_graph_updates set_metadata split split_state
        state static to_flat_state to_pure_dict unpack update use_eager_sharding using_eager_sharding
        variable_name_from_type variable_type_from_name variables first_from""",
    "batiste.graph.lost": "LostUpdateWarning",
    "batiste.graph.rng": "Rngs RngCount RngKey RngState RngStream",
    "batiste.graph.restream": "backup_keys fork_rngs reseed restore_rngs split_rngs with_rngs",
    "batiste.graph.split": "A M call",  # type variables that leak out of Flax, and that annotations of programs use
    "batiste.graph.walk": "vars_as with_vars",
    "batiste.graph.backing": "var_defaults",
    "batiste.graph.passing": """
        MergeContext NodeStates SplitContext UpdateContext current_update_context flatten from_tree merge_context
        split_context to_tree unflatten update_context""",
    "batiste.sharding": """
        PARTITION_NAME abstract_with_sharding as_abstract get_abstract_model get_named_sharding get_partition_spec
        logical_axis_rules with_partitioning with_sharding_constraint""",
    "batiste.transforms.compile": "StateSharding jit",
    "batiste.transforms.cached": "cached_partial jit_partial",
    "batiste.transforms.mesh": "shard_map",
    "batiste.transforms.axes": "Carry StateAxes prefix transform_metadata",
    "batiste.transforms.batching": "pmap vmap",
    "batiste.transforms.loops": "fori_loop scan while_loop",
    "batiste.transforms.branches": "cond switch",
    "batiste.transforms.autodiff": "DiffState grad jvp value_and_grad vjp",
    "batiste.transforms.custom": "custom_vjp",
    "batiste.transforms.remat": "remat",
    "batiste.transforms.trace": "checkify eval_shape make_jaxpr",
    "batiste.nn": """
        BatchNorm Bidirectional Conv ConvTranspose Dropout Einsum Embed GRUCell GroupNorm InstanceNorm LSTMCell
        LayerNorm Linear LinearGeneral LoRA LoRALinear LoRAParam MultiHeadAttention OptimizedLSTMCell PReLU RMSNorm
        RNN RNNCellBase SimpleCell SpectralNorm Stack WeightNorm avg_pool celu combine_masks dot_product_attention elu
        gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity initializers leaky_relu log_sigmoid
        log_softmax logsumexp make_attention_mask make_causal_mask max_pool min_pool one_hot pool relu relu6 selu
        sigmoid silu soft_sign softmax softplus standardize swish tanh""",
    "batiste.nn.initializers": "Initializer",
    "batiste.training.ema": "EMA",
    "batiste.training.metrics": "Accuracy Average Metric MetricState MultiMetric Statistics Welford",
    "batiste.training.optimizer": "ModelAndOptimizer OptArray OptState OptVariable Optimizer TrainState",
    "batiste.debug.summary": "tabulate",
    "batiste.debug.show": "display",
    "batiste.nnx.views": "capture view view_info with_attributes with_metadata",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

# Modules that are attributes under the names that Flax gives them.
_MODULES = {
    "bridge": "batiste.nnx.bridge", "compat": "batiste.nnx.compat", "extract": "batiste.nnx.extract",
    "filterlib": "batiste.nnx.filterlib", "graph": "batiste.nnx.graphlib", "graphlib": "batiste.nnx.graphlib",
    "helpers": "batiste.nnx.helpers", "metrics": "batiste.training.metrics", "module": "batiste.nnx.module",
    "nn": "batiste.nnx.nn", "object": "batiste.nnx.pytreelib", "optimizer": "batiste.training.optimizer",
    "pytreelib": "batiste.nnx.pytreelib", "reprlib": "batiste.nnx.reprlib", "rnglib": "batiste.nnx.rnglib",
    "spmd": "batiste.nnx.spmd", "statelib": "batiste.nnx.statelib", "summary": "batiste.nnx.summary",
    "tracers": "batiste.nnx.tracers", "training": "batiste.nnx.training", "transforms": "batiste.nnx.transforms",
    "traversals": "batiste.nnx.traversals", "variablelib": "batiste.nnx.variablelib",
    "visualization": "batiste.nnx.visualization", "wrappers": "batiste.nnx.bridge.wrappers",
}  # fmt: skip


def __getattr__(name: str) -> typing.Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name == "VariableState":
        return _variable_state()
    elif name == "PureState":
        value = tuple
    else:
        raise AttributeError(f"module 'batiste.nnx' has no attribute {name!r}")
    globals()[name] = value
    return value


def _variable_state():
    warnings.warn(
        "'VariableState' was removed, it is an alias of 'Variable': use that.", DeprecationWarning, stacklevel=3
    )
    return Variable


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_MODULES})
