# SPDX-License-Identifier: Apache-2.0
"""Objects inside trees, under Flax's name."""

from batiste.graph.passing import *  # noqa: F403
from batiste.transforms.axes import prefix  # noqa: F401
