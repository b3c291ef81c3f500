# SPDX-License-Identifier: Apache-2.0
"""Filters, under Flax's name."""

from batiste.graph.filters import *  # noqa: F403
from batiste.graph.filters import to_predicates as filters_to_predicates  # noqa: F401
from batiste.traverse_util import PathParts  # noqa: F401
