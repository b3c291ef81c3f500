# SPDX-License-Identifier: Apache-2.0
"""Requests become batches: a bounded queue with deadlines, a thread that computes, one bad request that fails alone.

submit -> Waiting line -> (same room?) -> batch -> Servable.batched -> each its answer
                                                -> it failed: the halves again, until the one is found
                                                -> the engine died: 503; each row that was there, next time alone
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any

import jax.numpy as jnp
import numpy as np

from batiste.graph.leaving import leaves

from .errors import Died, Refusal
from .servable import Arrays, Servable
from .suspects import Suspects, marks

log = logging.getLogger(__name__)
SHARE = 0.8  # of a request's time that it may be expected to wait: an estimate is off by some
JOIN = 0.5  # seconds more for the thread that computes, once its batch has had its time
FORGET = 0.2  # weight of the newest batch in the mean of how long a batch takes


class Item:
    """One request in the line; its `future` gets the outputs, or a Refusal."""

    def __init__(self, arrays: Arrays, sizes: dict[str, int], rows: int, group: Any, deadline: float):
        self.arrays, self.sizes, self.rows, self.group, self.deadline = arrays, sizes, rows, group, deadline
        self.begun = time.monotonic()
        self.alone = False  # its batch did not come back: it is tried once more, by itself
        self.marks: list[bytes] = []  # of its rows, where one of them is suspected
        self.taken = 0.0  # when its batch was made
        self.ran: tuple[float, ...] = ()  # when its program began, and ended
        self.batch = (0, 0)  # number and rows
        self.future: Future[dict[str, np.ndarray]] = Future()

    def refuse(self, refusal: Refusal) -> None:
        with contextlib.suppress(InvalidStateError):  # whoever is first decides
            self.future.set_exception(refusal)

    def give(self, outputs: dict[str, np.ndarray]) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(outputs)


class Batcher:
    """The line in front of one servable.

    Args:
        waiting: the most rows that may wait.
        linger: seconds that a batch that is not full waits for company.
        patience: seconds that a batch may take; then its thread is given up, and each of its requests is tried alone,
            once. None waits for ever.
        nan: whether an answer with NaN is sent, not refused with status 500, and numbers that are not finite are taken.
        observe: is called with each batch: rows, seconds.
    """

    def __init__(self, servable: Servable, *, waiting: int = 256, linger: float = 0.001, patience: float | None = 60.0,
                 nan: bool = False, observe: Any = None):  # fmt: skip
        self.servable, self.waiting, self.linger, self.patience = servable, waiting, linger, patience
        self.suspects = Suspects()
        self.nan, self.observe = nan, observe or (lambda rows, seconds: None)
        self.line: collections.deque[Item] = collections.deque()
        self.changed = threading.Condition()
        self.queued = 0  # rows in the line
        self.running: list[Item] = []
        self.since = math.inf
        self.seconds = 0.0  # that a batch takes, on the average
        self.costs: dict[int, float] = {}  # and one of each size
        self.closed = False
        self.compiled = 0  # programs after warming
        self.batches = 0
        self._worker = 0
        self._start()
        leaves(self)
        if patience is not None:
            threading.Thread(target=self._watch, name=f"{servable.name}-watch", daemon=True).start()

    # ------------------------------------------------------------ callers
    def warm(self) -> None:
        """Compiles everything; measures how long batches take."""
        self.costs = self.servable.warm()
        self.seconds = self.costs[self.servable.rows]
        self.compiled = self.servable.programs()

    def submit(self, arrays: Arrays, timeout: float) -> Item:
        """Puts a request in the line.

        Raises:
            Refusal: 429, it could not be answered in time; 503, this is closing, or its engine is being started
                again; 422, the engine died of it, twice.
            ArgumentError, ShapeError, DtypeError: the inputs do not fit.
        """
        sizes = self.servable.signature.check(arrays)
        room = self.servable.room(sizes)
        rows = sizes[self.servable.batch]
        group = tuple(n for name, n in room.items() if name != self.servable.batch)
        item = Item(arrays, sizes, rows, group, time.monotonic() + timeout)
        self._suspect(item)
        with self.changed:
            if self.closed:
                raise Refusal(503, "The model is being unloaded", after=1.0)
            wait = self.expected(rows)
            if wait > SHARE * timeout and not self.up:
                raise Refusal(503, "The engine is being started again", after=self.back)
            if self.queued + rows > self.waiting or wait > SHARE * timeout:
                raise Refusal(429, "Too many requests wait here", after=max(wait - SHARE * timeout, self.seconds))
            self.line.append(item)
            self.queued += rows
            self.changed.notify_all()
        return item

    def expected(self, rows: int = 0) -> float:
        """Seconds until a request of so many rows would be answered if it came now."""
        batches = math.ceil((self.queued + rows) / self.servable.rows)
        left = max(self.seconds - (time.monotonic() - self.since), 0.0) if self.running else 0.0
        return batches * self.seconds + left + self.back

    @property
    def up(self) -> bool:
        """Whether there is an engine that computes."""
        return self.servable.apart is None or self.servable.apart.up

    @property
    def back(self) -> float:
        """Seconds until there should be one."""
        return 0.0 if self.servable.apart is None else self.servable.apart.back

    def _suspect(self, item: Item) -> None:
        """Whoever was there when an engine died is computed alone.

        Raises:
            Refusal: it died of it.
        """
        if not self.suspects:
            return
        found = marks(item.arrays)
        if any(map(self.suspects.guilty, found)):
            raise Refusal(422, "The model fails on this input, as it did before")
        if any(mark in self.suspects for mark in found):
            item.marks, item.group = found, object()

    def cancel(self, item: Item) -> None:
        """Its client is gone: what has not begun is not computed."""
        with self.changed:
            if item in self.line:
                self.line.remove(item)
                self.queued -= item.rows
        item.refuse(Refusal(499, "The client went away"))

    def close(self, timeout: float = 30.0) -> None:
        """Takes no more; waits until what has been accepted is answered."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.line and not self.running, timeout)
            for item in [*self.line, *self.running]:
                item.refuse(Refusal(503, "The server is closing", after=1.0))
            self.line.clear()
        self.servable.close()
        self._thread.join(JOIN)  # one that is in the middle of XLA's code when Python ends can take it along

    def leave(self, timeout: float) -> None:
        """At the end of the program: refuses what waits, and waits for what runs, unless `close` has done so."""
        with self.changed:
            timeout = min(timeout, JOIN) if self.closed else timeout
            self.closed = True
            for item in [*self.line, *self.running]:
                item.refuse(Refusal(503, "The server is closing", after=1.0))
            self.line.clear()
            self.queued = 0
            self.changed.notify_all()
        if self.servable.apart is None:  # else it waits for another process, not inside XLA
            self._thread.join(timeout)

    def _suspect_waiting(self) -> None:
        with self.changed:
            for item in list(self.line):
                try:
                    self._suspect(item)
                except Refusal as refusal:
                    self.line.remove(item)
                    self.queued -= item.rows
                    item.refuse(refusal)

    # ------------------------------------------------------------ the thread that computes
    def _start(self) -> None:
        self._worker += 1
        arguments = (self._worker,)
        self._thread = threading.Thread(target=self._work, args=arguments, name=self.servable.name, daemon=True)
        self._thread.start()

    def _work(self, number: int) -> None:
        while self._engine_up() and (items := self._take(number)):
            start = time.monotonic()
            died = not self._compute(items, number)
            with self.changed:
                if number != self._worker:
                    return  # given up meanwhile: another thread has taken over
                took = time.monotonic() - start
                if not died:
                    self._learn(sum(item.rows for item in items), took)
                self.running, self.since = [], math.inf
                self.changed.notify_all()
            self.observe(sum(item.rows for item in items), took)

    def _engine_up(self) -> bool:
        """Waits for it; False if there will be none any more."""
        with contextlib.suppress(Died):
            if self.servable.apart is not None:
                self.servable.apart.wait()
            return True
        return False

    def _take(self, number: int) -> list[Item]:
        """The next batch: the oldest request, and those behind it that fit in its room; empty at the end."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.line or self.closed or number != self._worker)
                if number != self._worker or not self.line:
                    return []
                self._drop_late()
                if not self.line:
                    continue
                until = self.line[0].begun + self.linger
                while self.queued < self.servable.rows and (left := until - time.monotonic()) > 0 and not self.closed:
                    self.changed.wait(left)
                if not self.line:
                    continue
                group, items, rows = self.line[0].group, [], 0
                for item in self.line:
                    if item.group == group and rows + item.rows <= self.servable.rows:
                        items.append(item)
                        rows += item.rows
                    if rows == self.servable.rows:
                        break
                most = self._worth(rows)
                while rows > most and len(items) > 1:
                    rows -= items.pop().rows
                taken = set(map(id, items))
                self.line = collections.deque(item for item in self.line if id(item) not in taken)
                self.queued -= rows
                self.running, self.since = items, time.monotonic()
                self.batches += 1
                for item in items:
                    item.taken, item.batch = self.since, (self.batches, rows)
                return items

    def _worth(self, rows: int) -> int:
        """How many of these rows to compute at once, for all of them to be done soonest: five may be four and one.

        best(n) = min over sizes s of cost(s) + best(n - s)
        """
        if not self.costs or rows in self.costs:
            return rows
        best = [(0.0, 0)]
        for n in range(1, rows + 1):
            best.append(min((cost + best[max(n - size, 0)][0], -size) for size, cost in self.costs.items()))
        return -best[rows][1]

    def _learn(self, rows: int, took: float) -> None:
        size = self.servable.room({self.servable.batch: rows})[self.servable.batch]
        self.seconds = took if not self.seconds else (1 - FORGET) * self.seconds + FORGET * took
        if size in self.costs:
            self.costs[size] += FORGET * (took - self.costs[size])

    def _drop_late(self) -> None:
        now = time.monotonic()
        late = [item for item in self.line if item.deadline <= now]
        for item in late:
            self.line.remove(item)
            self.queued -= item.rows
            item.refuse(Refusal(504, "The answer was not ready in time"))

    def _compute(self, items: list[Item], number: int) -> bool:
        """The answers; where it fails, of each half: who spoils a batch is found in log2(n) steps and fails alone.

        Returns:
            whether the engine lived through it.
        """
        items = [item for item in items if not item.future.done()]
        if not items or number != self._worker:
            return True
        start = time.monotonic()
        try:
            answers = [self._alone(items[0])] if items[0].marks else self._together(items)
        except Died:
            for item in items:
                if not item.marks:  # else it is known of which row
                    self.suspects.suspect(marks(item.arrays))
                item.refuse(Refusal(503, "The engine died, and is being started again", after=self.back))
            self._suspect_waiting()
            return False
        except Exception:
            if len(items) == 1:
                log.exception("%s failed on a request", self.servable.name)
                items[0].refuse(Refusal(500, "The model failed on this input"))
                return True
            middle = len(items) // 2
            return self._compute(items[:middle], number) & self._compute(items[middle:], number)
        for item in items:
            item.ran = (start, time.monotonic())
        for item, outputs in zip(items, answers):
            if not self.nan and (bad := next((name for name, x in outputs.items() if has_nan(x)), None)):
                item.refuse(Refusal(500, f"The output {bad!r} holds NaN"))
            else:
                item.give(outputs)
        return True

    def _together(self, items: list[Item]) -> list[dict[str, np.ndarray]]:
        return self.servable.batched([(item.arrays, item.sizes) for item in items])

    def _alone(self, item: Item) -> dict[str, np.ndarray]:
        """Row by row: if the engine dies again, it is known of which."""
        found = []
        for i, mark in enumerate(item.marks):
            row = {name: x[i : i + 1] for name, x in item.arrays.items()}
            try:
                found += self.servable.batched([(row, {**item.sizes, self.servable.batch: 1})])
            except Died:
                self.suspects.convict(mark)
                raise
            self.suspects.clear(mark)
        return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}

    # ------------------------------------------------------------ a thread that does not come back
    def _watch(self) -> None:
        while not self.closed:
            time.sleep(min(self.patience or 1.0, 1.0) / 4)
            with self.changed:
                if time.monotonic() - self.since <= (self.patience or math.inf):
                    continue
                stuck = [item for item in self.running if not item.future.done()]
                log.error("%s: a batch took more than %g s; it is given up", self.servable.name, self.patience)
                if self.servable.apart is not None:
                    self.since = time.monotonic()
                    self.servable.apart.kill()
                    continue
                self.running, self.since = [], math.inf
                self._start()
                for item in stuck:
                    if len(stuck) == 1 or item.alone:
                        item.refuse(Refusal(503, "The model did not answer in time on this input"))
                    else:
                        item.alone, item.group = True, object()
                        self.line.appendleft(item)
                        self.queued += item.rows
                self.changed.notify_all()


def has_nan(x: np.ndarray) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact) and np.isnan(x).any())
