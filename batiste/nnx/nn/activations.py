# SPDX-License-Identifier: Apache-2.0
"""Activations, under Flax's name."""

from batiste.nn.activations import *  # noqa: F403
