# SPDX-License-Identifier: Apache-2.0
"""GGUF: settings, a list of tensors, then the tensors, some in blocks of 32 values of a few bits. By numpy alone.

Source: the format's description, github.com/ggml-org/ggml, docs/gguf.md; the blocks of ggml-common.h.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from .tensors import Tensor, Weights, WeightsError, checked_shape, file_size

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST_ENTRIES = 1 << 24  # of a list, and tensors


# ---------------------------------------------------------------- blocks of values -> float32
def _halves(packed: np.ndarray) -> np.ndarray:
    """[n, 16] bytes -> [n, 32]: the low halves of all bytes, then the high ones"""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _scales(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(column).view(np.float16).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """d (q - 8)"""
    return _scales(blocks[:, :2]) * (_halves(blocks[:, 2:]) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """d q + m"""
    return _scales(blocks[:, :2]) * _halves(blocks[:, 4:]) + _scales(blocks[:, 2:4])


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """d q"""
    return _scales(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


Decode = Callable[[np.ndarray], np.ndarray]
AT_A_TIME = 1 << 14  # blocks

# number -> name, values and bytes of a block, how one is decoded
FORMATS = {
    0: ("F32", 1, 4, lambda blocks: blocks.view(np.float32)),
    1: ("F16", 1, 2, lambda blocks: blocks.view(np.float16)),
    30: ("BF16", 1, 2, lambda blocks: blocks.view(jnp.bfloat16)),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
}


# ---------------------------------------------------------------- the file
def open_gguf(path: str | Path) -> Weights:
    """The tensors of a file, which are dequantised when they are read, and its settings.

    Raises:
        WeightsError: the file is damaged, claims what it does not hold, or has blocks of another kind.
    """
    path = Path(path)
    total = file_size(path)
    with path.open("rb") as file:
        reader = Reader(file, path, total)
        magic, version = reader.take(4), reader.number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightsError("this is no GGUF file of version 2 or 3", at=str(path), got=f"{magic!r}, {version}")
        n_tensors, n_settings = reader.count(), reader.count()
        about: dict[str, Any] = {}
        for _ in range(n_settings):
            name = reader.string()
            about[name] = reader.value(reader.number("<I"))
        entries = [reader.entry() for _ in range(n_tensors)]
        alignment = about.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise WeightsError("the alignment is none", at=str(path), got=alignment)
        start = file.tell() + -file.tell() % alignment
    tensors = {name: _tensor(path, name, shape, kind, offset, start, total) for name, shape, kind, offset in entries}
    return Weights(tensors, about)


class Reader:
    """Reads values one after the other, and none that lies past the end."""

    def __init__(self, file: BinaryIO, path: Path, total: int):
        self.file, self.path, self.total = file, path, total

    def take(self, n: int) -> bytes:
        if n > self.total - self.file.tell():
            raise WeightsError("the header claims more than the file holds", at=str(self.path), got=f"{n} bytes",
                               expected=f"at most {self.total - self.file.tell()}",
                               fix="fetch the file again")  # fmt: skip
        return self.file.read(n)

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self) -> int:
        """How many entries follow, of a byte or more each."""
        n = self.number("<Q")
        if n > min(MOST_ENTRIES, self.total - self.file.tell()):
            raise WeightsError("the header claims more entries than the file holds", at=str(self.path), got=n,
                               expected=f"at most {min(MOST_ENTRIES, self.total - self.file.tell())}",
                               fix="fetch the file again")  # fmt: skip
        return n

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise WeightsError("a setting is of no known type", at=str(self.path), got=kind)
        of, n = self.number("<I"), self.count()
        if of == STRING:
            return [self.string() for _ in range(n)]
        if of not in SCALARS:
            raise WeightsError("a list of settings is of no known type", at=str(self.path), got=of)
        code = SCALARS[of]
        return np.frombuffer(self.take(n * struct.calcsize(code)), np.dtype(code)).tolist()

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, format and place of a tensor."""
        name, rank = self.string(), self.number("<I")
        dims = [self.number("<Q") for _ in range(min(rank, 9))]  # the fastest first
        shape = checked_shape(dims[::-1], f"{self.path}: {name}", 8 * self.total)
        return name, shape, self.number("<I"), self.number("<Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, total: int) -> Tensor:
    at = f"{path}: {name}"
    if kind not in FORMATS:
        raise WeightsError("a tensor is in a format that is not read here", at=at, got=f"format {kind}",
                           expected=", ".join(name for name, *_ in FORMATS.values()),
                           fix="convert the file, or take one with another quantisation")  # fmt: skip
    _, values, size, decode = FORMATS[kind]
    if (shape[-1] if shape else 1) % values:
        raise WeightsError("a tensor's rows are no whole number of blocks", at=at, got=shape,
                           expected=f"(..., {values} k)")  # fmt: skip
    length = math.prod(shape) // values * size
    if start + offset + length > total:
        raise WeightsError("a tensor lies past the end of the file", at=at, got=f"end {start + offset + length}",
                           expected=f"at most {total}", fix="fetch the file again")  # fmt: skip
    return Tensor(path, start + offset, length, shape, functools.partial(_unpacked, values, size, decode))


def _unpacked(values: int, size: int, decode: Decode, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The blocks of a tensor, some at a time: next to the values, no more than these are in memory."""
    blocks = raw.reshape(-1, size)
    if values == 1:
        return decode(blocks).reshape(shape)
    out = np.empty((len(blocks), values), np.float32)
    with np.errstate(all="ignore"):  # scales may be infinite
        for at in range(0, len(blocks), AT_A_TIME):
            out[at : at + AT_A_TIME] = decode(blocks[at : at + AT_A_TIME])
    return out.reshape(shape)
