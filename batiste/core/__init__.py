# SPDX-License-Identifier: Apache-2.0
"""The functional core's names, under Flax's path."""

from .frozen_dict import FrozenDict, copy, freeze, pop, pretty_repr, unfreeze

__all__ = ["FrozenDict", "copy", "freeze", "pop", "pretty_repr", "unfreeze"]
