# SPDX-License-Identifier: Apache-2.0
"""The model of an experiment as a checkpoint has it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from batiste.graph.optional import need
from batiste.training import Checkpoints, Feed, Run, Until

from .experiment import Experiment
from .usage import UsageError


def manager(folder: str | Path) -> Checkpoints:
    """The checkpoints in the folder of a run."""
    return need("batiste.checkpoint", extra="checkpoint").Manager(Path(folder) / "checkpoints")


def restored(made: Experiment, checkpoint: str | None) -> Any:
    """The model with the values of a checkpoint: of the folder of a run the newest, or that of a file or folder.

    Raises:
        UsageError: there is no such checkpoint.
    """
    if checkpoint is None and made.checkpoints is None and made.folder is None:
        print("no checkpoint is named: the model is as the program makes it", file=sys.stderr)
        return made.model
    if checkpoint is None:
        return newest(made, made.checkpoints or manager(made.folder or "."), str(made.folder or "the checkpoints"))
    if not Path(checkpoint).exists():
        raise UsageError("There is no such checkpoint", got=repr(checkpoint))
    if (Path(checkpoint) / "checkpoints").is_dir():
        return newest(made, manager(checkpoint), checkpoint)
    return need("batiste.checkpoint", extra="checkpoint").load(checkpoint, into=made.model)


def newest(made: Experiment, checkpoints: Checkpoints, place: str) -> Any:
    """The model of a run's newest checkpoint."""
    state = tuple(made.state) if isinstance(made.state, list) else made.state
    run = Run(made.step or (lambda *args: {}), state, Feed(made.data or ()), Until(steps=1), [])
    run.prepare()
    found = checkpoints.restore_latest(into=run.tree())
    if found is None:
        raise UsageError("There is no checkpoint", got=place, fix="train first: batiste train … --folder FOLDER")
    if not isinstance(state, tuple):
        run.state = found[1]["state"]
    return run.model
