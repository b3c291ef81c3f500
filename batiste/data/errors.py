# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a data set and a batch; each error names the record.

DataError
├── WorkerError      a worker process died
├── DataTimeout      a record takes longer than allowed (also TimeoutError)
└── PositionError    a position does not fit the data (also ValueError)
"""

from __future__ import annotations

from typing import Any

from batiste.graph.errors import BatisteError


class DataError(BatisteError, RuntimeError):
    """A batch could not be made; `record` is the index of the record that was being read, where it is known."""

    def __init__(self, problem: str, *, record: int | None = None, at: str | None = None, **details: Any):
        self.record = record
        where = [f"record {record}"] if record is not None else []
        super().__init__(problem, at=", ".join([*where, *([at] if at else [])]), **details)


class WorkerError(DataError):
    """A worker process died: it was killed, or the code that reads a record ended it."""


class DataTimeout(DataError, TimeoutError):
    """A record takes longer than allowed."""


class PositionError(DataError, ValueError):
    """A position is none, is one of other data, or lies past the end."""


class SlowDataWarning(UserWarning):
    """The program is waiting for data, and for which record."""
