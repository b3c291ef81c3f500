# SPDX-License-Identifier: Apache-2.0
"""Variables and their kinds, under Flax's name."""

from batiste.graph.variable import (  # noqa: F401
    BatchStat,
    Cache,
    Intermediate,
    Param,
    Perturbation,
    Variable,
    VariableMetadata,
    register_variable_name,
    variable_name_from_type,
    variable_type_from_name,
)
