# SPDX-License-Identifier: Apache-2.0
"""Moving averages of a model, under Flax's name."""

from batiste.training.ema import EMA  # noqa: F401
