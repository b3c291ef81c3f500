# SPDX-License-Identifier: Apache-2.0
"""`batiste evaluate`: measures the model of an experiment on held-out data and checks its thresholds."""

from __future__ import annotations

from argparse import Namespace

from .judge import experiment, judged, measured
from .restore import restored


def run(args: Namespace) -> int:
    made = experiment(args, "state", "held_out", "metrics")
    return judged(made, measured(made, restored(made, args.checkpoint)), args)
