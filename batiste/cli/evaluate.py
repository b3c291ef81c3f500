# SPDX-License-Identifier: Apache-2.0
"""`batiste evaluate`: measures the model of an experiment on held-out data and checks its thresholds."""

from __future__ import annotations

from argparse import Namespace

from .judge import experiment, judged, measured, thresholds
from .restore import restored


def run(args: Namespace) -> int:
    made = experiment(args, "state", "held_out", "metrics")
    thresholds(made, args)  # what is wrong with them is said now
    return judged(made, measured(made, restored(made, args.checkpoint)), args)
