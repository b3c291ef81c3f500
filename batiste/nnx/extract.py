# SPDX-License-Identifier: Apache-2.0
"""Objects inside trees, under Flax's name."""

from batiste.graph.passing import *  # noqa: F403
