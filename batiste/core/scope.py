# SPDX-License-Identifier: Apache-2.0
"""Scopes, filters of collections, and functions of scopes, under Flax's path."""

from collections.abc import Mapping
from typing import Any

from batiste.linen.filters import (
    CollectionFilter,
    DenyList,
    filter_to_set,
    group_collections,
    in_filter,
    intersect_filters,
    is_filter_empty,
    subtract_filters,
    union_filters,
)
from batiste.linen.functional import apply, bind, init, lazy_init
from batiste.linen.keys import LazyRng
from batiste.linen.scope import Scope, Variable
from batiste.typing import Array

from .frozen_dict import FrozenDict

Collection = Mapping[str, Any]
MutableCollection = dict[str, Any]
VariableDict = Mapping[str, Collection]
FrozenVariableDict = FrozenDict[str, Collection]
MutableVariableDict = dict[str, MutableCollection]

__all__ = [
    "Array", "Collection", "CollectionFilter", "DenyList", "FrozenVariableDict", "LazyRng", "MutableCollection",
    "MutableVariableDict", "Scope", "Variable", "VariableDict", "apply", "bind", "filter_to_set", "group_collections",
    "in_filter", "init", "intersect_filters", "is_filter_empty", "lazy_init", "subtract_filters", "union_filters",
]  # fmt: skip
