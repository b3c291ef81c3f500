# SPDX-License-Identifier: Apache-2.0
"""Metrics, under Flax's name."""

from batiste.training.metrics import *  # noqa: F403
