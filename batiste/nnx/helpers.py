# SPDX-License-Identifier: Apache-2.0
"""Containers that are modules, and the train state, under Flax's name."""

from batiste.graph.module import Dict, List, Sequential  # noqa: F401
from batiste.training.optimizer import TrainState  # noqa: F401
