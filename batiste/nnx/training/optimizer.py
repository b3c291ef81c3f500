# SPDX-License-Identifier: Apache-2.0
"""Optimisers, under Flax's name."""

from batiste.training.optimizer import *  # noqa: F403
