# SPDX-License-Identifier: Apache-2.0
"""EarlyStopping: whether a metric that should fall has stopped falling."""

from __future__ import annotations

import math
from typing import Any

from batiste import struct


class EarlyStopping(struct.PyTreeNode):
    """Says to stop when `metric` has not fallen by more than `min_delta` in more than `patience` updates running.

    >>> stopping = EarlyStopping(min_delta=0.1, patience=1)
    >>> for loss in (1.0, 0.8, 0.75, 0.74):
    ...     stopping = stopping.update(loss)
    >>> stopping.should_stop, stopping.best_metric
    (True, 0.8)
    """

    min_delta: float = 0
    patience: int = 0
    best_metric: float = float("inf")
    patience_count: int = 0
    should_stop: bool = False
    has_improved: bool = False

    def reset(self):
        """As before the first update."""
        return self.replace(best_metric=float("inf"), patience_count=0, should_stop=False, has_improved=False)

    def update(self, metric: Any):
        """After one more value of the metric; see `has_improved` and `should_stop` of the result."""
        if math.isinf(self.best_metric) or self.best_metric - metric > self.min_delta:
            return self.replace(best_metric=metric, patience_count=0, has_improved=True)
        return self.replace(
            patience_count=self.patience_count + 1,
            should_stop=self.patience_count >= self.patience or self.should_stop,
            has_improved=False,
        )
