# SPDX-License-Identifier: Apache-2.0
"""Epochs: batches of epoch after epoch out of any iterable, with a position that a checkpoint can keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from batiste.graph.errors import ArgumentError

__all__ = ["END", "Epochs"]


class _End:
    def __repr__(self) -> str:
        return "<end of epoch>"


END = _End()
"""What `Epochs.draw` gives between two epochs."""


class Epochs:
    """The batches of `data`, and where in them we are.

    Args:
        data: an iterable that gives an epoch whenever it is iterated (a list, a loader); a function
            `epoch -> iterable`, which can shuffle by that number; or an iterator, which has one epoch. Where it has
            `state()` and `restore(state)`, these keep the position; otherwise batches are drawn again and dropped.

    >>> feed = Epochs(lambda epoch: [10 * epoch, 10 * epoch + 1])
    >>> [feed.draw() for _ in range(4)], feed.position()
    ([0, 1, <end of epoch>, 10], {'epoch': 1, 'batch': 1})
    """

    def __init__(self, data: Any):
        if not callable(data) and not hasattr(data, "__iter__"):
            raise ArgumentError("data is something to iterate over", got=type(data).__name__,
                                fix="pass a list of batches, a loader, or a function of the epoch")  # fmt: skip
        self.data: Any = data
        self.epoch = self.batch = 0
        self._batches: Iterator[Any] | None = None

    @property
    def once(self) -> bool:
        """Whether the data can be read only once."""
        return isinstance(self.data, Iterator) and not self._keeps_position

    @property
    def _keeps_position(self) -> bool:
        return callable(getattr(self.data, "state", None)) and callable(getattr(self.data, "restore", None))

    def _open(self) -> Iterator[Any]:
        data: Any = self.data(self.epoch) if callable(self.data) else self.data
        return iter(data)

    def draw(self) -> Any:
        """The next batch, or `END` where an epoch ends; the next epoch begins with the next call.

        Raises:
            ArgumentError: an epoch has no batch.
        """
        if self._batches is None:
            self._batches = self._open()
        for batch in self._batches:
            self.batch += 1
            return batch
        if self.batch == 0 and not (self.once and self.epoch):
            raise ArgumentError("the data has no batches", got=f"{type(self.data).__name__}, empty in epoch "
                                f"{self.epoch}", fix="pass data with at least one batch; is the batch size larger "
                                "than the data?")  # fmt: skip
        self.epoch, self.batch, self._batches = self.epoch + 1, 0, None
        return END

    def position(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        place: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch}
        if self._keeps_position:
            place["data"] = self.data.state()
        return place

    def restore(self, place: dict[str, Any]) -> None:
        """Goes to a position that `position` gave.

        Raises:
            ArgumentError: the data is shorter than it was.
        """
        self.epoch, self.batch, self._batches = place["epoch"], place["batch"], None
        if "data" in place and self._keeps_position:
            self.data.restore(place["data"])
            return
        self._batches = self._open()
        drawn = sum(1 for _ in itertools.islice(self._batches, self.batch))
        if drawn < self.batch:
            raise ArgumentError("the data ends before the place where the run stopped", got=f"{drawn} batches in epoch "
                                f"{self.epoch}", expected=f"at least {self.batch}",
                                fix="pass the data of the first run, or start anew in another folder")  # fmt: skip

    def first(self, count: int | None) -> Iterator[Any]:
        """The first batches of an epoch, or all."""
        return itertools.islice(self._open(), count)
