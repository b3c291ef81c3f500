# SPDX-License-Identifier: Apache-2.0
"""Threads that compute end before Python does: one that comes back from XLA after that takes the process along."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from typing import Protocol

BOUND = 10.0  # seconds that the end of the program waits: for a batch, not for a thread that hangs


class Leaves(Protocol):
    def leave(self, timeout: float) -> None:
        """Computes nothing more; waits so many seconds for what runs."""


_open: weakref.WeakSet[Leaves] = weakref.WeakSet()
_changed = threading.Lock()


def leaves(thing: Leaves) -> None:
    """`thing.leave` is called when the program ends, if there is such a thing then."""
    with _changed:
        _open.add(thing)


@atexit.register
def _leave() -> None:
    until = time.monotonic() + BOUND
    with _changed:
        things = list(_open)
    for thing in things:
        thing.leave(max(until - time.monotonic(), 0.0))
