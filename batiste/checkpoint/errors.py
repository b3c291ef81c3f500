# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a checkpoint: it could not be written, it is damaged, it does not fit, another writes it."""

from __future__ import annotations

from batiste.graph.errors import BatisteError


class CheckpointError(BatisteError):
    """Base of the errors of `batiste.checkpoint`."""


class SaveError(CheckpointError):
    """A checkpoint could not be written or removed; `__cause__` is the operating system's error."""


class CorruptError(CheckpointError, ValueError):
    """A file is no checkpoint, or not the one that was written: a bit, a length or a name differs."""


class NotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at that path."""

    def __str__(self) -> str:
        return str(self.args[0])


class MismatchError(CheckpointError, ValueError):
    """A sound checkpoint holds other entries than the model it was to be loaded into. Nothing was written."""


class LockedError(CheckpointError):
    """Another program, or another Manager of this one, writes into the folder."""


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, and an older one taken."""
