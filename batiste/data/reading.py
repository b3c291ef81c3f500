# SPDX-License-Identifier: Apache-2.0
"""From the rows of a task to a batch of arrays; runs in the program or in a worker process.

In-memory arrays are gathered at once, dim 0 of each; records are read one by one and stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from batiste.graph.errors import ArgumentError

from .errors import DataError
from .order import Task

Mark = Callable[[int], None]  # told of each record before it is read


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes the batch of a task. `columns` says that the source is a tree of arrays."""

    source: Any
    columns: bool
    seed: int
    record: Callable[[Any, np.random.Generator], Any] | None
    transform: Callable[[Any, np.random.Generator], Any] | None
    weight: str | None

    def __call__(self, task: Task, mark: Mark) -> Any:
        mark(int(task.rows[0]))
        try:
            batch = gather(self.source, task.rows) if self.columns else stack(self._records(task, mark), task.rows)
            if self.transform is not None:
                batch = self.transform(batch, np.random.default_rng((self.seed, 1, task.epoch, int(task.rows[0]))))
        except DataError:
            raise
        except Exception as error:
            raise failure(error, task, None) from error
        return batch if self.weight is None else weighted(batch, self.weight, task)

    def _records(self, task: Task, mark: Mark) -> list[Any]:
        found = []
        for row in map(int, task.rows):
            mark(row)
            try:
                read = self.source[row]
                if self.record is not None:
                    read = self.record(read, np.random.default_rng((self.seed, 0, task.epoch, row)))
            except Exception as error:
                raise failure(error, task, row) from error
            found.append(read)
        return found


def failure(error: Exception, task: Task, record: int | None) -> DataError:
    what = "Reading" if record is not None else "Making a batch"
    where = f"epoch {task.epoch}, batch {task.step}"
    return DataError(f"{what} failed with {type(error).__name__}: {error}", record=record, at=where)


def gather(source: Any, rows: np.ndarray) -> Any:
    """Rows of each array; neighbouring rows are a view."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return jax.tree.map(lambda x: x[rows[0] : rows[-1] + 1], source)
    return jax.tree.map(lambda x: x.take(rows, axis=0), source)


def stack(records: list[Any], rows: np.ndarray) -> Any:
    """Records, each a tree of arrays and numbers, as one tree with a new dim 0."""
    first, structure = jax.tree.flatten(records[0])
    first = [np.shape(leaf) for leaf in first]
    columns: list[list[Any]] = [[] for _ in first]
    for row, record in zip(rows, records):
        leaves, other = jax.tree.flatten(record)
        if other != structure or (shapes := [np.shape(leaf) for leaf in leaves]) != first:
            raise DataError(
                "Records of one batch differ",
                record=int(row),
                got=other if other != structure else shapes,
                expected=f"{structure if other != structure else first}, as in record {int(rows[0])}",
                fix="make them alike with record=, or pack texts with batiste.data.pack",
            )
        for column, leaf in zip(columns, leaves):
            column.append(leaf)
    return jax.tree.unflatten(structure, [np.stack(column) for column in columns])


def weighted(batch: Any, name: str, task: Task) -> Any:
    """A batch with the weight of each of its rows: 1, and 0 for what only fills it up."""
    weights = (np.arange(len(task.rows)) < task.filled).astype(np.float32)
    if isinstance(batch, dict):
        return {**batch, name: weights}
    if type(batch) is tuple:
        return (*batch, weights)
    raise ArgumentError(
        "last='pad' adds weights to a batch",
        got=type(batch).__name__,
        expected="a dict (a new key) or a tuple (a new last item)",
    )
