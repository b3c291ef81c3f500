# SPDX-License-Identifier: Apache-2.0
"""Loader: batches of in-memory arrays or of records, in an order that a seed decides."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from batiste.distributed import process_slice
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.sharding import Plan, current_plan

from .errors import PositionError
from .feed import Feed, Position, integers
from .order import Last, Order, Task, share_of_process
from .reading import Reader
from .workers import Workers

Random = np.random.Generator


class Loader:
    """Batches of `source`; iterating goes through it once, an epoch, and the next time in another order.

    `source` is a dict, tuple or other tree of arrays of one length, which are gathered at once; or a sequence of
    records (anything with `len` and `[i]`, such as Grain's data sources and MapDatasets), read one by one and stacked.

    The batches are the same whatever the number of workers and processes, and after a restore: the order depends on
    the seed and the epoch alone. `state()` is the position in the epoch that is under way; after `restore(position)`,
    the next iteration goes through the rest of that epoch.

    Args:
        batch: rows of a batch, over all processes.
        shuffle: a new order in each epoch.
        last: the last batch of an epoch may be smaller ("partial"), is left out ("drop"), or is filled up ("pad"); then
            each batch has a new entry, 1 or 0 per row, as the last item of a tuple or under the key `weight` of a dict.
        record: `record(x, rng)` is applied to each record.
        transform: `transform(batch, rng)` is applied to each batch.
        workers: processes that read; 0 reads in the program. What they run is sent to them by pickling.
        slow: seconds after which a record that the program waits for is named in a warning.
        timeout: seconds that a worker may take for one record.
        process_index, process_count: this process among those that train together; JAX's own unless given.
        plan: with several processes, the one by which they share the rows; that in use when an iteration begins, unless
            given. Processes that hold the same rows, as under tensor parallelism across hosts, read the same ones.

    >>> loader = Loader({"x": np.arange(5)}, batch=2, shuffle=False)
    >>> [batch["x"].tolist() for batch in loader]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        source: Any,
        batch: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        last: Last = "partial",
        record: Callable[[Any, Random], Any] | None = None,
        transform: Callable[[Any, Random], Any] | None = None,
        weight: str = "weight",
        workers: int = 0,
        slow: float = 2.0,
        timeout: float = 30.0,
        process_index: int | None = None,
        process_count: int | None = None,
        plan: Plan | None = None,
    ):
        source, size, columns = prepared(source)
        if columns and record is not None:
            raise ArgumentError("Loader got record= with arrays", fix="use transform=, which gets whole batches")
        if workers < 0:
            raise ArgumentError("Loader got a wrong number of workers", got=workers, expected="0 or more")
        self.order = Order(size, batch, shuffle, seed, last)
        self.reader = Reader(source, columns, seed, record, transform, weight if last == "pad" else None)
        self.workers, self.slow, self.timeout = workers, slow, timeout
        self._process, self._plan = (process_index, process_count), plan
        self._begin = (0, 0)  # epoch and step of the next iteration
        self._current: Callable[[], LoaderFeed | None] = lambda: None
        self.idle: list[Workers] = []
        weakref.finalize(self, stop_all, self.idle)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.order.steps

    def __iter__(self) -> Feed[Any]:
        """The next epoch, or the rest of the one that `restore` went to."""
        (epoch, step), self._begin = self._begin, (self._begin[0] + 1, 0)
        feed = LoaderFeed(self, (epoch, step), epoch + 1)
        self._current = weakref.ref(feed)
        return feed

    def feed(self, *, epochs: int | None = 1) -> Feed[Any]:
        """The batches of `epochs` epochs from the first on, as one feed; None for ever."""
        return LoaderFeed(self, (0, 0), epochs)

    def state(self) -> Position:
        """The position of the iteration that was begun last."""
        current = self._current()
        return self.position(*self._begin) if current is None else current.state()

    def restore(self, state: Position) -> None:
        """The next iteration begins at this position.

        Raises:
            PositionError: the position is not of these data.
        """
        self._begin, self._current = self.place(state), lambda: None

    def position(self, epoch: int, step: int) -> Position:
        """So many batches of an epoch are done."""
        order = self.order
        seed = order.seed if order.shuffle else None
        return {"epoch": epoch, "step": step, "size": order.size, "batch": order.batch, "seed": seed}

    def place(self, state: Position) -> tuple[int, int]:
        """The epoch and the step of a position."""
        epoch, step = integers(state, "epoch", "step")
        got, mine = ({name: of.get(name) for name in ("size", "batch", "seed")} for of in (state, self.position(0, 0)))
        if got != mine:
            raise PositionError(
                "The position is one of other data",
                got=got,
                expected=mine,
                fix="use the data, batch, shuffle and seed that it was saved with, or start a new feed",
            )
        if step > len(self):
            raise PositionError("The position lies past the end of an epoch", got=step, expected=f"at most {len(self)}")
        return epoch, step

    def share(self) -> tuple[int, int]:
        """Index and count of the processes that share each batch."""
        order = self.order
        return share_of_process(order.batch, order.last, *self._process, self._found)

    def _found(self) -> tuple[int, int]:
        """What JAX and the plan say of the share of this process."""
        plan, batch = self._plan or current_plan(), self.order.batch
        if plan is None or jax.process_count() == 1:
            return jax.process_index(), jax.process_count()
        rows = process_slice(batch, plan)
        return rows.start // (rows.stop - rows.start), batch // (rows.stop - rows.start)


class LoaderFeed(Feed[Any]):
    """The batches of a Loader from a place, epoch and step, to before epoch `end`."""

    def __init__(self, loader: Loader, place: tuple[int, int], end: int | None):
        self._loader, self._end = loader, end
        self._epoch, self._step = place
        self._share = loader.share()
        self._batches: Iterator[Any] | None = None
        self._workers: Workers | None = None
        self._stop: Callable[[], Any] = lambda: None

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._finish()
            raise
        except BaseException:
            self.close()  # the next call tries again
            raise
        if self._step == len(self._loader):
            self._epoch, self._step = self._epoch + 1, 0
        self._step += 1
        return batch

    def state(self) -> Position:
        return self._loader.position(self._epoch, self._step)

    def restore(self, state: Position) -> None:
        place = self._loader.place(state)
        self.close()
        if self is self._loader._current():
            self._end, self._loader._begin = place[0] + 1, (place[0] + 1, 0)
        self._epoch, self._step = place

    def close(self) -> None:
        self._stop()
        self._batches = self._workers = None

    def _start(self) -> Iterator[Any]:
        loader = self._loader
        tasks = tasks_of(loader.order, self._share, self._epoch, self._step, self._end)
        if not loader.workers:
            return (loader.reader(task, lambda record: None) for task in tasks)
        if loader.idle:
            self._workers = loader.idle.pop()
        else:
            self._workers = Workers(loader.reader, loader.workers, loader.slow, loader.timeout)
        self._stop = weakref.finalize(self, self._workers.stop)
        return self._workers.run(tasks)

    def _finish(self) -> None:
        """All is read: the epoch is over, and the workers wait for the next iteration."""
        if self._step == len(self._loader):
            self._epoch, self._step = self._epoch + 1, 0
        if self._workers is not None and isinstance(self._stop, weakref.finalize):
            self._stop.detach()
            self._loader.idle.append(self._workers)
            self._workers = None


def stop_all(idle: list[Workers]) -> None:
    for workers in idle:
        workers.stop()


def tasks_of(order: Order, share: tuple[int, int], epoch: int, step: int, end: int | None) -> Iterator[Task]:
    """The tasks from a position to before epoch `end`."""
    while end is None or epoch < end:
        permutation = order.permutation(epoch)
        yield from (order.task(epoch, step, permutation, share) for step in range(step, order.steps))
        epoch, step = epoch + 1, 0


def prepared(source: Any) -> tuple[Any, int, bool]:
    """The source, its length, and whether it is a tree of arrays.

    Raises:
        ShapeError: the arrays have different lengths.
    """
    if isinstance(source, dict | tuple | np.ndarray | jax.Array):
        source = jax.tree.map(np.asarray, source)
        sizes = {jax.tree_util.keystr(path): np.shape(x)[:1] for path, x in jax.tree_util.tree_leaves_with_path(source)}
        if len(set(sizes.values())) != 1 or () in sizes.values():
            raise ShapeError(
                "Loader got arrays of different lengths",
                got=", ".join(f"{name or 'array'}: {size[0] if size else 'a number'}" for name, size in sizes.items())
                or "no array",
                expected="one length in dim 0",
            )
        return source, next(iter(sizes.values()))[0], True
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise ArgumentError(
            "Loader got a wrong source",
            got=type(source).__name__,
            expected="arrays, or records with len() and [i]",
            fix="other iterables are used as they are, by batiste.data.feed(source)",
        )
    return source, len(source), False
