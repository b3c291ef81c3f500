# SPDX-License-Identifier: Apache-2.0
"""A watchdog: when a step does not end in time, the stacks of all threads are written, also while Python is blocked."""

from __future__ import annotations

import faulthandler
import sys
from typing import Any, Self, TextIO

from batiste.graph.errors import ArgumentError

__all__ = ["watchdog"]


class watchdog:
    """Writes the stacks of all threads when `seconds` pass inside the `with` without a `beat()`.

    The timer is a thread of the interpreter's own fault handler: it needs no Python, and so works while a computation,
    a lock or a file system holds the program. There is one per process; an inner watchdog takes the place of an outer
    one until it ends. Also a hook of a training loop, which lives for the run; each step is a beat.

    Args:
        seconds: how long a step may take.
        file: an open file with a file number; standard error if None.
        exit: ends the process (status 1) after the stacks were written, so that a supervisor may start it again.
        repeat: writes them again every `seconds`.

    >>> with watchdog(60) as dog:
    ...     for step in range(3):
    ...         dog.beat()

    Raises:
        ArgumentError: `seconds` is not above zero.
    """

    _running: list[watchdog] = []  # noqa: RUF012

    def __init__(self, seconds: float, *, file: TextIO | None = None, exit: bool = False, repeat: bool = False):
        if not seconds > 0:
            raise ArgumentError("a watchdog waits for some time", got=seconds, expected="seconds > 0",
                                fix="pass more than the longest step takes, compilation included")  # fmt: skip
        self.seconds, self.file, self.exit, self.repeat = seconds, file, exit, repeat

    def __enter__(self) -> Self:
        self._running.append(self)
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.remove(self)
        faulthandler.cancel_dump_traceback_later()
        if self._running:
            self._running[-1].beat()

    def beat(self) -> None:
        """The step has ended: the time begins anew."""
        if self._running and self._running[-1] is self:
            faulthandler.dump_traceback_later(
                self.seconds, repeat=self.repeat, file=self.file or sys.__stderr__ or sys.stderr, exit=self.exit
            )

    # as a hook of a training loop

    def start(self, run: Any) -> None:
        self.__enter__()

    def step(self, run: Any) -> None:
        self.beat()

    def end(self, run: Any) -> None:
        self.__exit__()
