# SPDX-License-Identifier: Apache-2.0
"""The file format: arrays as they lie in memory, then a manifest that knows a checksum of each piece, then the seal.

    HEAD (16 bytes) | pieces of arrays, end to end | manifest (JSON) | its length | SHA-256 of the two | END (8 bytes)

A piece is at most 4 MiB of one part of an array, a part one device's share. Nothing is compressed, nothing padded, no
offset is stored: so the arrays of a file never need more memory than the file has bytes, every byte is under a
checksum, and no two arrays can overlap. Reading evaluates nothing and imports nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from batiste.checkpoint.errors import CorruptError
from batiste.checkpoint.files import Fs, write_all
from batiste.graph.strict import parse_json, want
from batiste.version import __version__

HEAD = b"batiste\0ckpt\0\1\r\n"
END = b"sealed\r\n"
FOOT = struct.Struct("<Q32s8s")
PIECE = 4 << 20
MANIFEST_LIMIT = 64 << 20
NAME_LIMIT = 4096
FORMAT = 1

DTYPES = {
    name: np.dtype(getattr(jnp, name))
    for name in (
        *("bool_", "int4", "int8", "int16", "int32", "int64", "uint4", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
IMPLS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}  # kinds of random keys, and how many words one has


class Part(NamedTuple):
    """A box of an array: where it begins, its sides, and (in a file) its offset and the checksums of its pieces."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    checks: tuple[int, ...]


class Entry(NamedTuple):
    """What a manifest says of one leaf; `scalar` is a Python value, `impl` the kind of a random key."""

    name: str
    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()
    impl: str | None = None
    scalar: Any = None


class Written(NamedTuple):
    """A leaf that is to be written: its boxes as host arrays, or a Python value."""

    name: str
    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    boxes: tuple[tuple[tuple[int, ...], np.ndarray], ...] = ()
    impl: str | None = None
    scalar: Any = None


# ---------------------------------------------------------------- writing


def write(fs: Fs, file: int, leaves: Iterable[Written], about: dict[str, Any]) -> None:
    """Writes a whole checkpoint into an empty file; `about` goes into the manifest, with whether all is finite."""
    write_all(fs, file, memoryview(HEAD))
    entries, finite = [], True
    for leaf in leaves:
        parts = []
        for start, box in leaf.boxes:
            checks = []
            for piece in _pieces(_bytes(box)):
                checks.append(zlib.crc32(piece.data))
                finite = finite and _finite(piece, leaf)
                write_all(fs, file, piece.data)
            parts.append([list(start), list(box.shape), checks])
        if leaf.dtype is None:
            entries.append([leaf.name, type(leaf.scalar).__name__, _text(leaf.scalar)])
        else:
            entries.append([leaf.name, leaf.dtype.name, list(leaf.shape), parts, leaf.impl])
    if about.get("healthy") is None:
        about = {**about, "healthy": finite}
    versions = {"batiste": __version__, "jax": jax.__version__, "numpy": np.__version__}
    manifest = json.dumps({"format": FORMAT, "versions": versions, **about, "entries": entries}).encode()
    foot = struct.pack("<Q", len(manifest))
    digest = hashlib.sha256(manifest + foot).digest()
    write_all(fs, file, memoryview(manifest + foot + digest + END))


def _bytes(box: np.ndarray) -> np.ndarray:
    """The content of an array, little-endian, in C order."""
    box = np.ascontiguousarray(box, box.dtype.newbyteorder("<"))
    return box.reshape(-1).view(np.uint8)


def _pieces(content: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(0, content.size, PIECE):
        yield content[i : i + PIECE]


def _finite(piece: np.ndarray, leaf: Written) -> bool:
    """No NaN; and no infinity but in a single number, which may well be the best loss so far."""
    if leaf.dtype is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    if leaf.dtype == jnp.bfloat16 and leaf.shape:
        return not bool(((piece.view(np.uint16) & 0x7F80) == 0x7F80).any())
    values = piece.view(leaf.dtype)
    return bool(np.isfinite(values).all()) if leaf.shape else not bool(np.isnan(values).any())


def _text(x: Any) -> str:
    if isinstance(x, float):
        return x.hex()
    return f"{x.real.hex()} {x.imag.hex()}" if isinstance(x, complex) else str(x)


def _complex(real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "bool": {"True": True, "False": False}.__getitem__,
    "int": int,
    "float": float.fromhex,
    "complex": lambda text: _complex(*map(float.fromhex, text.split(" "))),
    "str": str,
}


# ---------------------------------------------------------------- reading


class Sealed:
    """A checkpoint file, open for reading: the seal is checked before memory is taken, each piece after it is read.

    Raises:
        CorruptError: the file is not one that was written whole.
    """

    def __init__(self, fs: Fs, path: Path, max_bytes: int | None = None):
        self.path, self._fs = path, fs
        self._file = fs.open(path)
        try:
            self._size = fs.size(self._file)
            self.entries, self.about = self._manifest(max_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            self._file = self._fs.close(self._file) or -1

    def _refuse(self, problem: str, entry: str | None = None, **more: Any) -> NoReturn:
        what = f"The entry {entry[:200]!r} is damaged: {problem}" if entry else f"The checkpoint is damaged: {problem}"
        raise CorruptError(what, at=str(self.path), fix="load an older checkpoint, or copy this one anew", **more)

    def _read(self, into: np.ndarray, offset: int, what: str | None = None) -> None:
        view: memoryview = into.data
        while view:
            try:
                count = self._fs.read(self._file, view, offset)
            except OSError as error:
                self._refuse(f"it cannot be read: {error.strerror}", what)
            if not count:
                self._refuse("the file ends early", what)
            view, offset = view[count:], offset + count

    def _bytes(self, offset: int, count: int) -> bytes:
        into = np.empty(count, np.uint8)
        self._read(into, offset)
        return into.tobytes()

    def _manifest(self, max_bytes: int | None) -> tuple[dict[str, Entry], dict[str, Any]]:
        least = len(HEAD) + FOOT.size
        if self._size < least or self._bytes(0, len(HEAD)) != HEAD:
            self._refuse("it does not begin as checkpoints of batiste do")
        length, digest, end = FOOT.unpack(self._bytes(self._size - FOOT.size, FOOT.size))
        if end != END or length > min(self._size - least, MANIFEST_LIMIT):
            self._refuse("its end is not that of a whole file")
        content = self._bytes(self._size - FOOT.size - length, length)
        if hashlib.sha256(content + struct.pack("<Q", length)).digest() != digest:
            self._refuse("the manifest is not what was sealed")
        data = self._size - least - length
        if max_bytes is not None and data > max_bytes:
            raise CorruptError(
                "The checkpoint is larger than max_bytes",
                at=str(self.path),
                got=f"{data} bytes",
                expected=f"at most {max_bytes}",
            )
        try:
            manifest: Any = parse_json(content)
            version: Any = manifest.pop("format") if type(manifest) is dict else None
            want(type(version) is int and version > 0, "no format")
            want(version <= FORMAT, f"format {version}, which a later release wrote")
            entries, offset = _entries(manifest.pop("entries", None))
            want(_is_about(manifest), "what is said about it is malformed")
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            self._refuse(f"the manifest is malformed ({error!s:.200})")
        if offset != len(HEAD) + data:
            self._refuse("sizes", got=f"{data} bytes of arrays", expected=offset - len(HEAD))
        return entries, manifest

    def read(self, entry: Entry) -> Any:
        """The value of an entry: a host array (of a random key: its bits), or a Python value."""
        if entry.dtype is None:
            return entry.scalar
        whole = np.empty(entry.shape, entry.dtype)
        for part in entry.parts:
            alone = part.shape == entry.shape
            box = whole if alone else np.empty(part.shape, entry.dtype)
            self._read_part(box.reshape(-1).view(np.uint8), part, entry.name)
            if not alone:
                whole[tuple(slice(a, a + n) for a, n in zip(part.start, part.shape))] = box
        return whole

    def _read_part(self, content: np.ndarray, part: Part, name: str) -> None:
        for i, (piece, check) in enumerate(zip(_pieces(content), part.checks)):
            self._read(piece, part.offset + i * PIECE, name)
            if zlib.crc32(piece.data) != check:
                self._refuse("its checksum is another", name)

    def verify(self) -> None:
        """Reads everything, keeping nothing.

        Raises:
            CorruptError: the first entry that is damaged.
        """
        room = np.empty(PIECE, np.uint8)
        for entry in self.entries.values():
            for part in entry.parts:
                left = math.prod(part.shape) * (entry.dtype.itemsize if entry.dtype else 0)
                for i, check in enumerate(part.checks):
                    piece = room[: min(PIECE, left - i * PIECE)]
                    self._read(piece, part.offset + i * PIECE, entry.name)
                    if zlib.crc32(piece.data) != check:
                        self._refuse("its checksum is another", entry.name)


def _is_about(about: dict[str, Any]) -> bool:
    step, metrics, versions = about.get("step"), about.get("metrics", {}), about.get("versions", {})
    return (
        (step is None or (type(step) is int and step >= 0))
        and type(about.get("healthy")) is bool
        and all(type(table) is dict for table in (metrics, versions))
        and all(type(x) is float for x in metrics.values())
        and all(type(x) is str for x in versions.values())
    )


def _counts(x: Any, what: str) -> tuple[int, ...]:
    want(type(x) is list and all(type(n) is int and 0 <= n < 1 << 62 for n in x), what)
    return tuple(x)


def _entries(listed: Any) -> tuple[dict[str, Entry], int]:
    """The entries by name, and where the last one's bytes end."""
    want(type(listed) is list, "no list of entries")
    items: list[Any] = listed
    entries: dict[str, Entry] = {}
    offset = len(HEAD)
    for item in items:
        want(type(item) is list and len(item) in (3, 5), "an entry that is none")
        name: Any = item[0]
        want(type(name) is str and 0 < len(name) <= NAME_LIMIT and name not in entries, "an entry's name")
        if len(item) == 3:
            kind: Any = item[1]
            text: Any = item[2]
            want(type(kind) is str and kind in _FROM_TEXT and type(text) is str, f"the kind of {name!r:.99}")
            entries[name] = Entry(name, scalar=_FROM_TEXT[kind](text))
        else:
            entries[name], offset = _array_entry(item, offset)
    return entries, offset


def _array_entry(item: list[Any], offset: int) -> tuple[Entry, int]:
    name, dtype, shape, parts, impl = item
    shown = f"{name!r:.99}"
    want(type(dtype) is str and dtype in DTYPES, f"the dtype of {shown}")
    want(impl is None or (type(impl) is str and impl in IMPLS and dtype == "uint32"), f"the kind of the key {shown}")
    kind, sides = DTYPES[dtype], _counts(shape, f"the shape of {shown}")
    want(impl is None or sides[-1:] == (IMPLS[impl],), f"the words of the key {shown}")
    want(len(sides) <= 32 and math.prod(max(n, 1) for n in sides) * kind.itemsize < 1 << 62, f"the shape of {shown}")
    want(type(parts) is list, f"the parts of {shown}")
    boxes = []
    for part in parts:
        want(type(part) is list and len(part) == 3, f"a part of {shown}")
        start, size, checks = (_counts(x, f"a part of {shown}") for x in part)
        want(len(start) == len(size) == len(sides), f"a part of {shown}")
        count = math.prod(size) * kind.itemsize
        want(len(checks) == -(-count // PIECE), f"the checksums of {shown}")
        boxes.append(Part(start, size, offset, checks))
        offset += count
    want(_cover(sides, boxes), f"the parts of {shown} do not make up the array")
    return Entry(name, kind, sides, tuple(boxes), impl), offset


def _cover(shape: tuple[int, ...], boxes: list[Part]) -> bool:
    """Whether boxes are the cells of a grid over an array, each cell once."""
    cells = {(box.start, box.shape) for box in boxes}
    grid = 1
    for axis, side in enumerate(shape):
        spans = sorted({(box.start[axis], box.shape[axis]) for box in boxes})
        ends = [0, *(start + size for start, size in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != side:
            return False
        grid *= len(spans)
    return len(cells) == len(boxes) == grid
