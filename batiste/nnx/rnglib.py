# SPDX-License-Identifier: Apache-2.0
"""Random streams, under Flax's name."""

from batiste.graph.restream import *  # noqa: F403
from batiste.graph.rng import *  # noqa: F403
