# SPDX-License-Identifier: Apache-2.0
"""The functional core's names, under Flax's path."""

from .frozen_dict import FrozenDict, copy, freeze, pop, pretty_repr, unfreeze  # isort: skip: linen needs it
from batiste.linen.boxes import AxisMetadata, unbox
from batiste.linen.scope import DenyList, Scope, Variable

__all__ = [
    "AxisMetadata", "DenyList", "FrozenDict", "Scope", "Variable", "copy", "freeze", "pop", "pretty_repr",
    "unbox", "unfreeze",
]  # fmt: skip
