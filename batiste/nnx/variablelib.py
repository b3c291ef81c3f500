# SPDX-License-Identifier: Apache-2.0
"""Variables and their kinds, under Flax's name."""

import importlib
import typing

from batiste.graph.backing import VarDefaults, VarDefaultsContext, var_defaults  # noqa: F401
from batiste.graph.metadata import VariableMetadata  # noqa: F401
from batiste.graph.placement import use_eager_sharding, using_eager_sharding  # noqa: F401
from batiste.graph.variable import (  # noqa: F401
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
from batiste.graph.variable import Variable as VariableState  # noqa: F401

from .views import with_metadata  # noqa: F401


def __getattr__(name: str) -> typing.Any:
    if name == "HijaxVariable":  # it rests on experimental parts of JAX
        return importlib.import_module("batiste.graph.hijax").HijaxVariable
    raise AttributeError(f"module 'batiste.nnx.variablelib' has no attribute {name!r}")
