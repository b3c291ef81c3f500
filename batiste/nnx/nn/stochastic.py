# SPDX-License-Identifier: Apache-2.0
"""Random layers, under Flax's name."""

from batiste.nn.stochastic import *  # noqa: F403
