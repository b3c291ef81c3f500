# SPDX-License-Identifier: Apache-2.0
"""Which records make which batch: a pure function of the seed, the epoch and the step.

The batch is the global one. Each process takes its share of the rows, so that the global batches stay the same when
the number of processes changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from batiste.graph.errors import ArgumentError

Last = Literal["partial", "drop", "pad"]


class Task(NamedTuple):
    """One batch of one process: `rows` of the data, of which the first `filled` count and the rest fill up."""

    epoch: int
    step: int
    rows: np.ndarray
    filled: int


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of `size` records.

    >>> order = Order(size=7, batch=4, shuffle=False, seed=0, last="pad")
    >>> order.steps, order.task(0, 1, None, share=(0, 1)).rows.tolist()
    (2, [4, 5, 6, 6])
    """

    size: int
    batch: int
    shuffle: bool
    seed: int
    last: Last

    def __post_init__(self) -> None:
        for name, value, expected, right in (
            ("batch", self.batch, "1 or more", self.batch >= 1),
            ("last", self.last, "'partial', 'drop' or 'pad'", self.last in ("partial", "drop", "pad")),
            ("seed", self.seed, "0 or more", self.seed >= 0),
            ("source", f"{self.size} records", "1 or more", self.size >= 1),
            ("batch", self.batch, f"at most the {self.size} records", self.last != "drop" or self.batch <= self.size),
        ):
            if not right:
                raise ArgumentError(f"Loader got a wrong {name}", got=repr(value), expected=expected)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.size // self.batch if self.last == "drop" else -(-self.size // self.batch)

    def permutation(self, epoch: int) -> np.ndarray | None:
        """The order of the records in an epoch; None if it is their own."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.size) if self.shuffle else None

    def task(self, epoch: int, step: int, permutation: np.ndarray | None, share: tuple[int, int]) -> Task:
        """The rows of process `share[0]` of `share[1]`."""
        each = self.batch // share[1]
        begin = min(step * self.batch + share[0] * each, self.size)
        end = min(begin + each, self.size)
        rows = np.arange(begin, end) if permutation is None else permutation[begin:end]
        if self.last == "pad" and len(rows) < each:
            rows = np.concatenate([rows, np.full(each - len(rows), rows[-1] if len(rows) else 0)])
        return Task(epoch, step, rows, end - begin)


def share_of_process(batch: int, last: Last, index: int | None, count: int | None, ask: Callable) -> tuple[int, int]:
    """Which part of each batch this process reads: `(index, count)`; JAX is asked for what is not given."""
    index, count = (given if given is not None else asked for given, asked in zip((index, count), ask()))
    if not 0 <= index < count:
        raise ArgumentError("Loader got a wrong process_index", got=index, expected=f"0 to {count - 1}")
    if batch % count:
        raise ArgumentError("A batch cannot be shared evenly", got=batch, expected=f"a multiple of {count} processes")
    if count > 1 and last == "partial":
        raise ArgumentError(
            "With several processes the last batch must be as large as the others",
            got="last='partial'",
            fix="last='pad' (nothing is lost, weights mark the filling) or last='drop'",
        )
    return index, count
