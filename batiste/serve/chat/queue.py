# SPDX-License-Identifier: Apache-2.0
"""The waiting room: bounded, and fair to every client."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any


class Waiting:
    """Jobs that wait, given out by turns: one of each client, in the order in which its jobs came

    >>> class Job:
    ...     def __init__(self, client, name):
    ...         self.client, self.name = client, name
    >>> waiting = Waiting()
    >>> for name in ("a1", "a2", "a3", "b1"):
    ...     waiting.add(Job(name[0], name))
    >>> [waiting.pop(lambda job: True).name for _ in range(len(waiting))]
    ['a1', 'b1', 'a2', 'a3']
    """

    def __init__(self):
        self._lines: OrderedDict[str, deque[Any]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Any]:
        return (job for line in self._lines.values() for job in line)

    def add(self, job: Any) -> None:
        self._lines.setdefault(job.client, deque()).append(job)

    def pop(self, fits: Any) -> Any | None:
        """The next job that `fits`, of the client whose turn it is; None if there is none."""
        for client, line in self._lines.items():
            job = next(filter(fits, line), None)
            if job is not None:
                line.remove(job)
                self._lines.move_to_end(client)
                if not line:
                    del self._lines[client]
                return job
        return None

    def take(self, which: Any) -> list[Any]:
        """All jobs for which `which(job)` is true; they wait no longer."""
        taken = [job for job in self if which(job)]
        for job in taken:
            line = self._lines[job.client]
            line.remove(job)
            if not line:
                del self._lines[job.client]
        return taken
