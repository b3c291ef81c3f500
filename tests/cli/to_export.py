# SPDX-License-Identifier: Apache-2.0
"""A program whose model is exported: of the right kind, without a signature, and with a wrong one."""

from __future__ import annotations

from batiste import nn
from batiste.cli import Experiment
from batiste.graph import Rngs


def model(width: int = 4) -> nn.BatchNorm:
    return nn.BatchNorm(width, rngs=Rngs(0))


def right() -> Experiment:
    arguments = {"signature": {"x": "float32[batch, 4]"}, "builder": "to_export:model"}
    return Experiment(state=(model(),), export=lambda model: arguments)


def alone() -> Experiment:
    return Experiment(state=(model(),))


def wrong() -> Experiment:
    return Experiment(state=(model(),), export=lambda model: {"signature": {"x": "float33[4]"}})
