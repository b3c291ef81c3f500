# SPDX-License-Identifier: Apache-2.0
"""Texts of different lengths, packed into rows of one length."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from batiste.graph.errors import ArgumentError, ShapeError

from .errors import PositionError
from .feed import Feed, Position, feed, integers

Long = Literal["split", "cut", "error"]


def pack(
    documents: Any, length: int, batch: int, *, window: int = 1024, long: Long = "split", pad: int = 0
) -> Feed[dict[str, np.ndarray]]:
    """tokens[batch, length], segment_ids[batch, length], positions[batch, length]: documents packed into rows.

    Segment ids count the documents of a row from 1 and are 0 where it is filled up; positions count from 0 within a
    document. Documents are taken `window` at a time, and each of these lots is packed on its own, longest first, each
    into the fullest row that has room; so a position is that of the lot and a count of rows.

    Args:
        documents: a feed, or what `feed` makes one of, of one-dimensional arrays of tokens.
        length, batch: of the rows. The last batch is filled up with empty rows.
        window: documents of a lot; more fill the rows better, and are read again after a restore.
        long: what becomes of a document longer than a row: it is split, cut off, or an error.
        pad: the token that fills up.

    >>> rows = next(pack([[5, 6, 7], [8, 9], [3]], length=4, batch=2))
    >>> rows["tokens"].tolist(), rows["segment_ids"].tolist()
    ([[5, 6, 7, 3], [8, 9, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]])

    Raises:
        ShapeError: a document is not one-dimensional, or too long and `long="error"`.
    """
    for name, value in (("length", length), ("batch", batch), ("window", window)):
        if value < 1:
            raise ArgumentError(f"pack got a wrong {name}", got=value, expected="1 or more")
    if long not in ("split", "cut", "error"):
        raise ArgumentError("pack got a wrong long", got=repr(long), expected="'split', 'cut' or 'error'")
    return Packed(feed(documents), length, batch, window, long, pad)


class Packed(Feed[dict[str, np.ndarray]]):
    """See `pack`."""

    def __init__(self, source: Feed[Any], length: int, batch: int, window: int, long: Long, pad: int):
        self._source, self._length, self._batch, self._window = source, length, batch, window
        self._long, self._pad = long, pad
        self._lot: Position = source.state()  # the source's position before the lot
        self._rows: list[list[np.ndarray]] = []
        self._row = 0  # rows of the lot that were handed out

    def __next__(self) -> dict[str, np.ndarray]:
        rows = list(itertools.islice(self._following(), self._batch))
        if not rows:
            raise StopIteration
        return laid_out(rows, self._batch, self._length, self._pad)

    def _following(self) -> Iterator[list[np.ndarray]]:
        while True:
            if self._row == len(self._rows):
                self._lot, self._row = self._source.state(), 0
                self._rows = self._next_lot()
                if not self._rows:
                    return
            self._row += 1
            yield self._rows[self._row - 1]

    def _next_lot(self) -> list[list[np.ndarray]]:
        pieces: list[np.ndarray] = []
        for _, document in zip(range(self._window), self._source):
            pieces += self._pieces(np.asarray(document))
        return best_fit([len(piece) for piece in pieces], self._length, pieces)

    def _pieces(self, document: np.ndarray) -> list[np.ndarray]:
        if document.ndim != 1 or (len(document) > self._length and self._long == "error"):
            raise ShapeError(
                "pack got a wrong document",
                at=f"the lot behind position {self._lot}",
                got=document.shape,
                expected=f"one dim of at most {self._length} tokens",
                fix="long='split' or long='cut'" if document.ndim == 1 else "flatten it",
            )
        if self._long == "cut":
            return [document[: self._length]] if len(document) else []
        return [document[begin : begin + self._length] for begin in range(0, len(document), self._length)]

    def state(self) -> Position:
        return {"lot": self._lot, "row": self._row}

    def restore(self, state: Position) -> None:
        (row,) = integers(state, "row")
        lot = state.get("lot")
        self._source.restore(lot)  # pyright: ignore[reportArgumentType]
        self._lot, self._row, self._rows = self._source.state(), 0, []
        if row:
            self._rows = self._next_lot()
            if row > len(self._rows):
                raise PositionError("The position lies past the end of a lot", got=row, expected=len(self._rows))
            self._row = row

    def close(self) -> None:
        self._source.close()


def best_fit(sizes: list[int], length: int, pieces: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Rows of pieces, longest first, each in the fullest row that has room; in the order of their first pieces."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free in which row, sorted
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found = bisect.bisect_left(room, (sizes[piece], -1))
        if found < len(room):
            free, row = room.pop(found)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if free > sizes[piece]:
            bisect.insort(room, (free - sizes[piece], row))
    return [[pieces[i] for i in row] for row in sorted(sorted(row) for row in rows)]


def laid_out(rows: list[list[np.ndarray]], batch: int, length: int, pad: int) -> dict[str, np.ndarray]:
    """Rows of pieces as arrays."""
    dtype = np.result_type(*(piece.dtype for row in rows for piece in row))
    tokens = np.full((batch, length), pad, dtype)
    segments, positions = np.zeros((2, batch, length), np.int32)
    for i, row in enumerate(rows):
        begin = 0
        for number, piece in enumerate(row, 1):
            end = begin + len(piece)
            tokens[i, begin:end], segments[i, begin:end] = piece, number
            positions[i, begin:end] = np.arange(len(piece))
            begin = end
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}
