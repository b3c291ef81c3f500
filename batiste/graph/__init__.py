# SPDX-License-Identifier: Apache-2.0
"""The core: live objects, their structure, their state, and how they cross a JAX transform.

Variable, kind     a mutable value with metadata, and what it is for              variable
Module             an object whose attributes are parts or settings               pytree, module
GraphDef, State    the static half of an object, and `path -> value`              structure, states
flatten, unflatten objects to (structure, leaves), and back                       flatten, unflatten
filter             a predicate (path, value), with a short spelling               filters
Boundary, Plan     the passage through one transform, and its memory              boundary, plan
Rngs               named random streams                                           rng
make               the birth of a variable                                        birth
"""

from .birth import make
from .filters import (
    All,
    Any,
    Everything,
    Not,
    Nothing,
    OfType,
    PathContains,
    PathIn,
    WithTag,
    to_predicate,
    to_predicates,
)
from .flatten import flatten_graph, is_graph_node
from .lost import LostUpdateWarning
from .metadata import VariableMetadata
from .modes import graph_mode, graph_updates_mode, set_graph_mode, set_graph_updates
from .module import Dict, List, Module, Sequential, first_from, iter_module_children, iter_modules
from .placement import use_eager_sharding, using_eager_sharding
from .pytree import (
    Data,
    Object,
    Pytree,
    Static,
    check_pytree,
    data,
    dataclass,
    has_data,
    is_data,
    register_data_type,
    static,
)
from .restream import backup_keys, fork_rngs, reseed, restore_rngs, split_rngs, with_rngs
from .rng import RngCount, RngKey, Rngs, RngState, RngStream
from .split import GraphState, call, clone, graphdef, merge, pop, split, state, unpack, update, variables
from .states import (
    FlatState,
    State,
    diff,
    filter_state,
    from_flat_state,
    map_state,
    merge_state,
    replace_by_pure_dict,
    restore_int_paths,
    split_state,
    to_flat_state,
    to_pure_dict,
)
from .structure import GraphDef
from .unflatten import unflatten_graph
from .variable import (
    MISSING,
    BatchStat,
    Cache,
    Intermediate,
    Param,
    Perturbation,
    Variable,
    register_variable_name,
    variable_name_from_type,
    variable_type_from_name,
)
from .walk import as_pure, find_duplicates, iter_children, iter_graph, map, pure, recursive_map, set_metadata
