# SPDX-License-Identifier: Apache-2.0
"""States, under Flax's name."""

from batiste.graph.states import *  # noqa: F403
from batiste.graph.states import create_path_filters  # noqa: F401
