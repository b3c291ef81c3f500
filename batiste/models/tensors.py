# SPDX-License-Identifier: Apache-2.0
"""What every reader of weight files shares: named tensors that lie in a file, checked before they are read."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batiste.graph.errors import ArgumentError

ALIGNMENT = 64
PAGED = 1 << 21  # bytes that are worth pages of their own
NEAR, ROWS = 1 << 18, 64  # what is read at a time: so many bytes, or so many rows, if that is more
LARGEST = 1 << 48  # elements; also where a dim of 0 hides the others


class WeightsError(ArgumentError):
    """A file of weights is damaged, incomplete, hostile, or of another model."""


class Tensor(NamedTuple):
    """A tensor in a file: its bytes are read, and no others, when it is called for.

    `dtype` is that of the values, if they lie in the file as they are.
    """

    file: Path
    offset: int
    size: int
    shape: tuple[int, ...]
    decode: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    dtype: np.dtype | None = None

    def read(self) -> np.ndarray:
        """The values, as an array of their shape."""
        raw = room(self.size)
        with self._opened() as file:
            self._fill(raw, file)
        return self.decode(raw, self.shape)

    def read_into(self, out: np.ndarray) -> None:
        """Writes the values into an array of their shape, of any layout and dtype; both halves of many at once."""
        if self.dtype is None:
            out[...] = self.read()
            return
        out = out.reshape(out.shape or (1,))
        half = len(out) // 2
        if self.size < PAGED or not half:
            return self._read_rows(out, 0)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._read_rows, (out[:half], out[half:]), (0, half)))

    def _read_rows(self, out: np.ndarray, start: int) -> None:
        """Rows from `start` on: some at a time, so that they are still near when they are laid out anew."""
        assert self.dtype is not None
        each = math.prod(out.shape[1:]) * self.dtype.itemsize
        with self._opened(start * each) as file:
            if out.dtype == self.dtype and out.flags.c_contiguous:
                return self._fill(out.reshape(-1).view(np.uint8), file)
            rows = max(ROWS, NEAR // max(1, each))
            raw = room(min(rows, len(out)) * each)
            for first in range(0, len(out), rows):
                part = out[first : first + rows]
                self._fill(raw[: len(part) * each], file)
                part[...] = raw[: len(part) * each].view(self.dtype).reshape(part.shape)

    def _opened(self, behind: int = 0) -> FileIO:
        file = self.file.open("rb", buffering=0)
        file.seek(self.offset + behind)
        return file

    def _fill(self, raw: np.ndarray, file: FileIO) -> None:
        done = 0
        while done < raw.size and (read := file.readinto(raw.data[done:])):
            done += read
        if done != raw.size:
            raise WeightsError("the file became shorter while it was read", at=str(self.file))


def room(size: int) -> np.ndarray:
    """Bytes that begin where JAX wants them to: on a CPU an array in them is used as it is, not copied.

    Many are asked of the system in small pages: numpy asks for huge ones, which have to be found together first. That
    takes a multiple of the time, where memory is in pieces.
    """
    if size >= PAGED:
        return np.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), np.uint8)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


class Weights(NamedTuple):
    """The tensors of a model by name, of one file or many, and what the file says of the model."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


def checked_shape(dims: Any, at: str, most: int) -> tuple[int, ...]:
    """The dims as a shape of at most `most` elements.

    Raises:
        WeightsError: they are no sizes, or claim more than the file can hold.
    """
    fits = isinstance(dims, (list, tuple)) and len(dims) <= 8 and all(type(dim) is int and dim >= 0 for dim in dims)
    if not fits or math.prod(dims) > most or math.prod(max(dim, 1) for dim in dims) > LARGEST:
        raise WeightsError("a tensor's shape is no shape that the file can hold", at=at, got=str(dims)[:80],
                           expected=f"up to 8 sizes, {most} values together",
                           fix="fetch the file again")  # fmt: skip
    return tuple(dims)


def file_size(path: Path) -> int:
    """Bytes of the file.

    Raises:
        WeightsError: there is none.
    """
    if not path.is_file():
        raise WeightsError("there is no such file of weights", at=str(path), fix="fetch it, or check the path")
    return path.stat().st_size
