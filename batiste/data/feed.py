# SPDX-License-Identifier: Apache-2.0
"""Feeds: iterators that know their position. A position is a small JSON-able dict, and part of a checkpoint.

`feed(source)` makes one of a `Loader`, of a Grain data set, and of any iterable.
"""

from __future__ import annotations

import abc
import base64
import copy
import sys
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from batiste.graph.errors import ArgumentError

from .errors import DataError, PositionError

Position = dict[str, Any]
T = TypeVar("T")


class Feed(abc.ABC, Generic[T]):
    """An iterator with a position: `state()` after the n-th batch, restored anywhere, goes on with batch n + 1."""

    @abc.abstractmethod
    def __next__(self) -> T: ...

    @abc.abstractmethod
    def state(self) -> Position:
        """The position behind the batch that was handed out last."""

    @abc.abstractmethod
    def restore(self, state: Position) -> None:
        """Goes to a position; the next batch is the one that followed it.

        Raises:
            PositionError: the position is not of these data.
        """

    def close(self) -> None:
        """Ends threads and processes; a feed that is iterated again starts them again, at its position."""

    def __iter__(self) -> Feed[T]:
        return self

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def feed(source: Any, *, epochs: int | None = 1) -> Feed[Any]:
    """A feed of `source`: anything that can be iterated, or a function without arguments that makes an iterator.

    A Loader and a Grain data set go to a position at once. Of any other source the position is a count: going there
    reads and drops as many batches, so that source must give the same batches each time.

    Args:
        epochs: how often the source is gone through; None goes on for ever. What is a feed already has its own end.

    >>> batches = feed("abc", epochs=2)
    >>> next(batches), next(batches), batches.state()
    ('a', 'b', {'epoch': 0, 'item': 2})
    >>> again = feed("abc", epochs=2)
    >>> again.restore({"epoch": 0, "item": 2})
    >>> "".join(again)
    'cabc'
    """
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise ArgumentError("feed got a wrong number of epochs", got=repr(epochs), expected="1 or more, or None")
    if hasattr(source, "feed"):
        return source.feed(epochs=epochs)  # a Loader
    if hasattr(source, "state") and hasattr(source, "restore"):
        return source
    if hasattr(source, "to_iter_dataset"):
        source = source.to_iter_dataset()  # Grain's MapDataset
    if not callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__next__"):
        raise ArgumentError(
            "feed got nothing that can be iterated",
            got=type(source).__name__,
            expected="an iterable, a Loader, a Grain data set, or a function that makes an iterator",
        )
    kind = type(source).__module__.partition(".")[0]
    return GrainFeed(source, epochs) if kind == "grain" else Counted(source, epochs)


class Cycled(Feed[Any]):
    """Goes through a source again and again; `_go` brings a fresh iterator to its place in the epoch."""

    def __init__(self, source: Any, epochs: int | None):
        self._source, self._epochs = source, epochs
        self._epoch, self._item = 0, 0
        self._iterator: Iterator[Any] | None = None

    def _fresh(self) -> Iterator[Any]:
        source: Any = self._source() if callable(self._source) else self._source
        return iter(source)

    def __next__(self) -> Any:
        while self._epochs is None or self._epoch < self._epochs:
            if self._iterator is None:
                self._iterator = self._fresh()
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._end_epoch()
            else:
                self._item += 1
                return batch
        raise StopIteration

    def _end_epoch(self) -> None:
        if not self._item and (self._epochs is None or self._epoch):
            raise DataError(
                f"The data ended early: there is nothing in epoch {self._epoch}",
                got=type(self._source).__name__,
                expected=f"{self._epochs or 'endless'} epochs",
                fix="pass something that can be gone through again, such as a function that makes the iterator",
            )
        self._iterator, self._epoch, self._item = None, self._epoch + 1, 0


class Counted(Cycled):
    """Any iterable; its position is a count of batches."""

    def state(self) -> Position:
        return {"epoch": self._epoch, "item": self._item}

    def restore(self, state: Position) -> None:
        epoch, item = integers(state, "epoch", "item")
        iterator = self._fresh()
        if iterator is self._source and (self._epoch, self._item) != (0, 0):
            raise PositionError(
                "An iterator that has been used cannot go back",
                got=type(self._source).__name__,
                fix="pass something that can be gone through again, such as a function that makes the iterator",
            )
        for done in range(item):
            if next(iterator, iterator) is iterator:
                raise PositionError("The position lies past the end of the data", got=done, expected=f"{item} batches")
        self._iterator, self._epoch, self._item = iterator, epoch, item


class GrainFeed(Cycled):
    """A Grain data set or data loader; Grain keeps the place.

    An epoch of it is what Grain gives until it ends; `repeat` and `shuffle` of Grain's own make new orders.
    """

    _place: Any = None  # where the next iterator begins

    def _fresh(self) -> Any:
        flags = getattr(sys.modules.get("absl.flags"), "FLAGS", None)
        if flags is not None and not flags.is_parsed():
            flags.mark_as_parsed()  # Grain's worker processes read flags, which only absl's own programs parse
        iterator: Any = super()._fresh()
        place, self._place = self._place, None
        if place is not None:
            iterator.set_state(place)
        return iterator

    def state(self) -> Position:
        if self._iterator is None:
            self._iterator = self._fresh()
        place = self._iterator.get_state()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        if isinstance(place, bytes):
            place = {"base64": base64.b64encode(place).decode()}
        return {"epoch": self._epoch, "item": self._item, "grain": copy.deepcopy(place)}

    def restore(self, state: Position) -> None:
        epoch, item = integers(state, "epoch", "item")
        place = state.get("grain")
        if isinstance(place, dict) and "base64" in place:
            place = base64.b64decode(place["base64"])
        self.close()
        try:
            self._place = copy.deepcopy(place)
            self._iterator = self._fresh()
        except (ValueError, TypeError, LookupError) as error:
            raise PositionError(
                f"Grain refuses the position: {error}",
                fix="restore with the data set, the options and the number of Grain workers that it was saved with; "
                "a data source needs a __repr__ without an address",
            ) from error
        self._epoch, self._item = epoch, item

    def close(self) -> None:
        iterator: Any = self._iterator
        if iterator is not None:
            self._place, self._iterator = iterator.get_state(), None
            if hasattr(iterator, "close"):
                iterator.close()


def integers(state: Any, *names: str) -> list[int]:
    """Whole numbers from a position, or the error that it is none."""
    if not isinstance(state, dict) or not all(isinstance(state.get(n), int) and state[n] >= 0 for n in names):
        raise PositionError("This is no position of such data", got=state, expected=f"a dict with {', '.join(names)}")
    return [state[name] for name in names]
