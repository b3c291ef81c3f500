# SPDX-License-Identifier: Apache-2.0
"""Initialisers, under Flax's name."""

from batiste.nn.initializers import *  # noqa: F403
