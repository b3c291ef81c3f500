# SPDX-License-Identifier: Apache-2.0
"""`batiste compare`: what got better and what got worse between two checkpoints of an experiment."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

from batiste.training import compare

from .judge import experiment, measured, written
from .restore import restored
from .usage import UsageError


def run(args: Namespace) -> int:
    if args.after is None:
        raise UsageError("Which checkpoints?", expected="batiste compare PROGRAM.py:NAME BEFORE AFTER")
    made = experiment(args, "state", "held_out", "metrics")
    before = measured(made, restored(made, args.before))
    after = measured(made, restored(made, args.after))
    found = compare(before, after)
    print(found)
    if args.json:
        changes = {name: dataclasses.asdict(change) for name, change in found.changes.items()}
        written(args.json, {"changes": changes, "better": found.better, "worse": found.worse})
    return found.exit_code
