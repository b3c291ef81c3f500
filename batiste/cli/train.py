# SPDX-License-Identifier: Apache-2.0
"""`batiste train`: trains the model of an experiment, then evaluates it and checks its thresholds."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from batiste.training import Evaluation, Hook, Interrupted, JsonLines, NonFiniteError, Progress, fit

from .experiment import Experiment
from .judge import experiment, judged, measured, thresholds
from .restore import manager
from .usage import NEGATIVE, OK


def run(args: Namespace) -> int:
    made = experiment(args, "state", "step", "data", "until")
    thresholds(made, args)  # what is wrong with them is said now, not after the training
    place = args.folder or made.folder
    folder = Path(place) if place and not args.fast_dev_run else None  # a trial leaves nothing behind
    own = manager(folder, made.every) if folder is not None and made.checkpoints is None else None
    hooks = usual_hooks(made, folder) if made.hooks is None else made.hooks
    try:
        with own or contextlib.nullcontext():
            trained: Any = fit(made.step, made.state, made.data, made.until, hooks,  # type: ignore[arg-type]
                               checkpoints=made.checkpoints or own, fast_dev_run=args.fast_dev_run,
                               overfit_batches=args.overfit_batches)  # fmt: skip
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise
    except NonFiniteError as error:
        print(f"batiste train: {error}", file=sys.stderr)
        return NEGATIVE
    if args.fast_dev_run or made.held_out is None or not made.metrics:
        return OK
    return judged(made, measured(made, trained.model), args)


def usual_hooks(made: Experiment, folder: Path | None) -> list[Hook]:
    """Progress; the numbers in the folder of the run; an evaluation after each epoch."""
    hooks: list[Hook] = [Progress()]
    if folder is not None:
        hooks.append(JsonLines(folder / "metrics.jsonl"))
    if made.held_out is not None and made.metrics:
        hooks.append(Evaluation(made.held_out, made.metrics, predict=made.predict, labels=made.labels))
    return hooks
