# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are either whole or refused: one file each, sealed, on the medium before a save returns.

>>> import tempfile; from batiste import checkpoint, nnx
>>> model, path = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tempfile.mkdtemp() + "/model.ckpt"
>>> checkpoint.save(path, {"model": model, "step": 7})
>>> checkpoint.load(path, into={"model": nnx.Linear(2, 3, rngs=nnx.Rngs(1)), "step": 0})["step"]
7

`save_async` saves in the background, `Manager` keeps the checkpoints of a run, `save_weights` writes safetensors.
"""

from batiste.checkpoint.errors import (
    CheckpointError,
    CheckpointWarning,
    CorruptError,
    LockedError,
    MismatchError,
    NotFoundError,
    SaveError,
)
from batiste.checkpoint.files import Fs
from batiste.checkpoint.manager import Manager, Restored
from batiste.checkpoint.saving import Saving, load, peek, save, save_async, verify
from batiste.checkpoint.weights import load_weights, save_weights

__all__ = [
    "save",
    "load",
    "save_async",
    "Saving",
    "Manager",
    "Restored",
    "peek",
    "verify",
    "save_weights",
    "load_weights",
    "Fs",
    "CheckpointError",
    "CheckpointWarning",
    "CorruptError",
    "LockedError",
    "MismatchError",
    "NotFoundError",
    "SaveError",
]
