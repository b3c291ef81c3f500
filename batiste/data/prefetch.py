# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the devices while the step before them runs."""

from __future__ import annotations

import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Sharding

from batiste.distributed import global_batch
from batiste.graph.errors import ArgumentError
from batiste.graph.leaving import leaves
from batiste.sharding import Plan, current_plan

from .errors import DataTimeout, SlowDataWarning
from .feed import Feed, Position, feed
from .loader import Loader

Place = Plan | Sharding | Callable[[Any], Any] | None
Item = tuple[Any, Position, BaseException | None]
POLL = 0.2
LAST = 1.0  # seconds that the end of the program waits for a batch under way


@overload
def prefetch(
    source: Loader, n: int = 2, place: Place = None, *, slow: float = 5.0, timeout: float | None = None
) -> Prefetched: ...
@overload
def prefetch(
    source: Any, n: int = 2, place: Place = None, *, slow: float = 5.0, timeout: float | None = None
) -> Feed[Any]: ...
def prefetch(
    source: Any, n: int = 2, place: Place = None, *, slow: float = 5.0, timeout: float | None = None
) -> Feed[Any] | Prefetched:
    """A feed whose batches are read by a thread and put on the devices up to `n` ahead of their use.

    Its position is that of the batch handed out last, whatever has been read ahead. An error of the source is raised
    where its batch would have been.

    Args:
        source: a feed, or what `feed` makes one of. Of a Loader it makes what can be iterated epoch by epoch, as it.
        n: batches that are ready or on their way; 0 puts each on the devices when it is asked for, without a thread.
        place: where the arrays go: a Plan (shared as its batches are), a Sharding, a function of a batch, or, if
            None, JAX's default device. With several processes each passes its own rows (as a Loader does), which
            become one batch over all of them, by the plan in use unless one is given.
        slow: seconds without a batch after which a warning says so.
        timeout: seconds without a batch after which a DataTimeout is raised.

    >>> batches = prefetch([np.ones(2), np.zeros(2)])
    >>> next(batches), batches.state()
    (Array([1., 1.], dtype=float32), {'epoch': 0, 'item': 1})
    """
    if n < 0:
        raise ArgumentError("prefetch got a wrong number of batches", got=n, expected="0 or more")
    put = placing(place)
    if isinstance(source, Loader):
        return Prefetched(source, lambda batches: Prefetch(batches, n, put, slow, timeout))
    return Prefetch(feed(source), n, put, slow, timeout)


def placing(place: Place) -> Callable[[Any], Any]:
    """The function that puts a batch where `place` says. Leaves that are no numbers, such as texts, stay."""
    if callable(place) and not isinstance(place, Plan | Sharding):
        return place
    if place is None and jax.process_count() > 1:
        place = current_plan()
    if isinstance(place, Plan):
        plan, alone = place, jax.process_count() == 1
        return lambda batch: plan.shard_batch(batch) if alone else global_batch(batch, plan)

    def put(x: Any) -> Any:
        if not (isinstance(x, jax.Array) or np.asarray(x).dtype.kind not in "OUSMm"):
            return x
        if place is not None and jax.process_count() > 1:
            return jax.make_array_from_process_local_data(place, np.asarray(x))
        return jax.device_put(x, place)

    return lambda batch: jax.tree.map(put, batch)


class Prefetched:
    """A Loader whose batches are prefetched."""

    def __init__(self, loader: Loader, prefetching: Callable[[Feed[Any]], Feed[Any]]):
        self.loader, self._prefetching = loader, prefetching
        self._current: Callable[[], Feed[Any] | None] = lambda: None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Feed[Any]:
        batches = self._prefetching(iter(self.loader))
        self._current = weakref.ref(batches)
        return batches

    def feed(self, *, epochs: int | None = 1) -> Feed[Any]:
        """The batches of `epochs` epochs as one feed; None for ever."""
        return self._prefetching(self.loader.feed(epochs=epochs))

    def state(self) -> Position:
        """The position of the iteration that was begun last."""
        current = self._current()
        return self.loader.state() if current is None else current.state()

    def restore(self, state: Position) -> None:
        """The next iteration begins at this position."""
        self.loader.restore(state)
        self._current = lambda: None


class Prefetch(Feed[Any]):
    """See `prefetch`. The thread knows the source and the queue, not this object, and ends with it."""

    def __init__(self, source: Feed[Any], n: int, put: Callable[[Any], Any], slow: float, timeout: float | None):
        self._source, self._n, self._put, self._slow, self._timeout = source, n, put, slow, timeout
        self._state = source.state()
        self._thread: Reading | None = None

    def __next__(self) -> Any:
        if self._thread is None and self._source.state() != self._state:
            self._source.restore(self._state)  # it was closed while it was ahead, or a batch could not be put
        if self._n == 0:
            return self._next_now()
        if self._thread is None:
            self._thread = Reading(self._source, self._put, self._n)
            weakref.finalize(self, self._thread.stopped.set)
        batch, state, error = self._wait(self._thread)
        if error is not None:
            self._stop()
            if isinstance(error, StopIteration):
                self._state = state
            raise error
        self._state = state
        return batch

    def _next_now(self) -> Any:
        try:
            batch = self._put(next(self._source))
        except StopIteration:
            self._state = self._source.state()
            raise
        self._state = self._source.state()
        return batch

    def _wait(self, thread: Reading) -> Item:
        since, warned = time.monotonic(), False
        while True:
            try:
                return thread.take(POLL)
            except queue.Empty:
                waited = time.monotonic() - since
            if self._timeout is not None and waited > self._timeout:
                raise DataTimeout(
                    "No batch comes", at=f"position {self._state}", got=f"{waited:.1f} s",
                    expected=f"at most {self._timeout} s", fix="mend what reads the data, or allow more with timeout=",
                )  # fmt: skip
            if waited > self._slow and not warned:
                warned = True
                text = f"Waiting for data: no batch for {waited:.1f} s behind position {self._state}"
                warnings.warn(text, SlowDataWarning, stacklevel=3)

    def state(self) -> Position:
        return self._state

    def restore(self, state: Position) -> None:
        if not self._stop():
            raise DataTimeout("The data cannot go to a position: a read does not end", at=f"position {self._state}")
        self._source.restore(state)
        self._state = state

    def close(self) -> None:
        if self._stop():
            self._source.close()

    def _stop(self) -> bool:
        """Whether nobody reads any more; a thread whose read does not end is left to itself."""
        if self._thread is not None and self._thread.stop():
            self._thread = None
        return self._thread is None


class Reading:
    """The thread, what it has read (batch, position behind it, error), and how many batches more it may read."""

    def __init__(self, source: Feed[Any], put: Callable[[Any], Any], n: int):
        self.ready: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.room, self.stopped = threading.Semaphore(n), threading.Event()
        self.thread = threading.Thread(target=self._read, args=(source, put), name="batiste-prefetch", daemon=True)
        self.thread.start()
        leaves(self)

    def leave(self, timeout: float) -> None:
        """At the end of the program: reads nothing more, and waits for what is being put on the devices."""
        self.stop(min(timeout, LAST))

    def take(self, timeout: float) -> Item:
        """The next item; queue.Empty if none comes in time."""
        item = self.ready.get(timeout=timeout)
        self.room.release()
        return item

    def stop(self, patience: float = 5.0) -> bool:
        """Whether the thread has ended."""
        self.stopped.set()
        self.room.release()  # it may wait for room
        self.thread.join(patience)
        return not self.thread.is_alive()

    def _read(self, source: Feed[Any], put: Callable[[Any], Any]) -> None:
        """Reads while there is room, until the data end, an error comes, or it is told to stop."""
        while not self.stopped.is_set():
            if not self.room.acquire(timeout=POLL) or self.stopped.is_set():
                continue
            before = source.state()
            try:
                batch = put(next(source))
            except BaseException as error:
                if not isinstance(error, StopIteration):
                    error.add_note(f"while reading the batch behind position {before}")
                return self.ready.put((None, source.state(), error))
            self.ready.put((batch, source.state(), None))
            del batch  # it is in the queue, and may be freed when it is used up
