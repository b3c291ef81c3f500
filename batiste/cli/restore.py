# SPDX-License-Identifier: Apache-2.0
"""The model of an experiment as a checkpoint has it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from batiste.checkpoint import CheckpointError, Manager, load, peek

from .experiment import Experiment
from .usage import UsageError

TRAIN_FIRST = "train first: batiste train … --folder FOLDER"


def manager(folder: str | Path, every: int = 1) -> Manager:
    """The checkpoints in the folder of a run; or those in the folder itself, if there are some."""
    inside = Manager(folder, every=every)
    return inside if inside.steps() else Manager(Path(folder) / "checkpoints", every=every)


def restored(made: Experiment, checkpoint: str | None) -> Any:
    """The model with the values of a checkpoint: of the folder of a run the newest one, or those of a file.

    Raises:
        UsageError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    place = checkpoint or made.folder
    if place is None and made.checkpoints is None:
        print("no checkpoint is named: the model is as the program makes it", file=sys.stderr)
        return made.model
    try:
        if checkpoint is None and made.checkpoints is not None:
            return of_run(made, made.checkpoints)
        found = manager(place or ".")
        return of_run(made, found) if found.steps() else of_file(made, Path(place or "."))
    except CheckpointError as error:
        raise UsageError(str(error).rstrip(".")) from error


def of_run(made: Experiment, checkpoints: Manager) -> Any:
    """The model of the newest checkpoint that is whole."""
    found = checkpoints.restore_latest(into=wanted(made), ignore=True)
    if found is None:
        raise UsageError("There is no checkpoint", got=checkpoints.folder, fix=TRAIN_FIRST)
    return first(found.state["state"])


def of_file(made: Experiment, path: Path) -> Any:
    """The model of one checkpoint: of a run, or of a model alone."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise UsageError("There is no checkpoint", got=str(path), fix=TRAIN_FIRST)
    if any(name.partition("/")[0] == "state" for name in peek(path)["entries"]):
        return first(load(path, wanted(made), ignore=True)["state"])
    return load(path, into=made.model)


def wanted(made: Experiment) -> dict[str, Any]:
    """The part of a run's checkpoint that holds the model; of live objects, without the optimizer."""
    return {"state": (made.model,) if isinstance(made.state, tuple | list) else made.state}


def first(state: Any) -> Any:
    return state[0] if isinstance(state, tuple | list) else state
