# SPDX-License-Identifier: Apache-2.0
"""States, under Flax's name."""

from batiste.graph.state import *  # noqa: F403
from batiste.graph.state import create_path_filters  # noqa: F401
