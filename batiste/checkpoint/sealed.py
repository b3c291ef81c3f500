# SPDX-License-Identifier: Apache-2.0
"""The file format: arrays as they lie in memory, then a manifest that knows a checksum of each piece, then the seal.

    HEAD (16 bytes) | pieces of arrays, end to end | manifest (JSON) | its length | SHA-256 of the two | END (8 bytes)

Where several processes save together each writes such a file, the first one last: its manifest names the other files
and their digests, so that it is whole, or is none, with them.

A piece is at most 4 MiB of one part of an array, a part one device's share. Nothing is compressed, nothing padded, no
offset is stored: so the arrays of a file never need more memory than the file has bytes, every byte is under a
checksum, and no two arrays can overlap. Reading evaluates nothing and imports nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
BESIDE = re.compile(r"([^/]+)\.\d{1,6}-[0-9a-f]{6,16}\.part")

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
    """A box of an array: where it begins, its sides, its offset, the checksums of its pieces, and in which file."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    checks: tuple[int, ...]
    file: int = 0


Box = tuple[slice, ...]


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


def write(fs: Fs, file: int, leaves: Iterable[Written], about: Callable[[bool], dict[str, Any]]) -> str:
    """Writes a whole checkpoint into an empty file, and returns the digest of its manifest.

    Args:
        about: what else goes into the manifest; it is called when the arrays are written, with whether all is finite.
    """
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
    versions = {"batiste": __version__, "jax": jax.__version__, "numpy": np.__version__}
    manifest = json.dumps({"format": FORMAT, "versions": versions, **about(finite), "entries": entries}).encode()
    foot = struct.pack("<Q", len(manifest))
    digest = hashlib.sha256(manifest + foot).digest()
    write_all(fs, file, memoryview(manifest + foot + digest + END))
    return digest.hex()


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


class File:
    """One file, open for reading: the seal of its manifest is checked before memory is taken.

    Raises:
        CorruptError: it is not one that was written whole.
    """

    def __init__(self, fs: Fs, path: Path):
        self.path, self._fs = path, fs
        self._file = fs.open(path)
        try:
            self._size = fs.size(self._file)
            self.bytes, self.digest, self._content = self._sealed()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._file >= 0:
            self._file = self._fs.close(self._file) or -1

    def refuse(self, problem: str, entry: str | None = None, **more: Any) -> NoReturn:
        what = f"The entry {entry[:200]!r} is damaged: {problem}" if entry else f"The checkpoint is damaged: {problem}"
        raise CorruptError(what, at=str(self.path), fix="load an older checkpoint, or copy this one anew", **more)

    def read(self, into: np.ndarray, offset: int, what: str | None = None) -> None:
        """Fills an array of bytes from an offset on."""
        view: memoryview = into.data
        while view:
            try:
                count = self._fs.read(self._file, view, offset)
            except OSError as error:
                self.refuse(f"it cannot be read: {error.strerror}", what)
            if not count:
                self.refuse("the file ends early", what)
            view, offset = view[count:], offset + count

    def _bytes(self, offset: int, count: int) -> bytes:
        into = np.empty(count, np.uint8)
        self.read(into, offset)
        return into.tobytes()

    def _sealed(self) -> tuple[int, str, bytes]:
        """How many bytes of arrays there are, the digest, and the content of the manifest."""
        least = len(HEAD) + FOOT.size
        if self._size < least or self._bytes(0, len(HEAD)) != HEAD:
            self.refuse("it does not begin as checkpoints of batiste do")
        length, digest, end = FOOT.unpack(self._bytes(self._size - FOOT.size, FOOT.size))
        if end != END or length > min(self._size - least, MANIFEST_LIMIT):
            self.refuse("its end is not that of a whole file")
        content = self._bytes(self._size - FOOT.size - length, length)
        if hashlib.sha256(content + struct.pack("<Q", length)).digest() != digest:
            self.refuse("the manifest is not what was sealed")
        return self._size - least - length, digest.hex(), content

    def manifest(self, number: int) -> tuple[dict[str, Entry], dict[str, Any]]:
        """The entries, whose parts are in file `number`, and what else the manifest says."""
        try:
            manifest: Any = parse_json(self._content)
            version: Any = manifest.pop("format") if type(manifest) is dict else None
            want(type(version) is int and version > 0, "no format")
            want(version <= FORMAT, f"format {version}, which a later release wrote")
            entries, offset = _entries(manifest.pop("entries", None), number)
            want(_is_about(manifest), "what is said about it is malformed")
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            self.refuse(f"the manifest is malformed ({error!s:.200})")
        if offset != len(HEAD) + self.bytes:
            self.refuse("sizes", got=f"{self.bytes} bytes of arrays", expected=offset - len(HEAD))
        return entries, manifest


class Sealed:
    """A checkpoint, open for reading: seals are checked before memory is taken, each piece after it is read.

    Raises:
        CorruptError: a file of it is missing, or not one that was written whole.
    """

    def __init__(self, fs: Fs, path: Path, max_bytes: int | None = None):
        self.path = path
        self._files = [File(fs, path)]
        try:
            self.entries, self.about = self._manifests(fs, max_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _manifests(self, fs: Fs, max_bytes: int | None) -> tuple[dict[str, Entry], dict[str, Any]]:
        first = self._files[0]
        self._allowed(max_bytes)
        entries, about = first.manifest(0)
        for number, (name, digest) in enumerate(about.get("files", ()), 1):
            try:
                self._files.append(file := File(fs, self.path.with_name(name)))
            except FileNotFoundError:
                first.refuse(f"the file {name} is missing, which another process wrote")
            if file.digest != digest:
                file.refuse("it belongs to another save")
            self._allowed(max_bytes)
            for entry in file.manifest(number)[0].values():
                if entry._replace(parts=()) != entries.get(entry.name, entry)._replace(parts=()):
                    file.refuse("it has another shape", entry.name)
                mine = entries.get(entry.name)
                if mine is None:
                    file.refuse("the first file does not know it", entry.name)
                entries[entry.name] = mine._replace(parts=mine.parts + entry.parts)
        for entry in entries.values():
            if entry.dtype is not None and not _cover(entry.shape, entry.parts):
                first.refuse("the manifest is malformed (the parts do not make up the array)", entry.name)
        return entries, about

    def _allowed(self, max_bytes: int | None) -> None:
        size = sum(file.bytes for file in self._files)
        if max_bytes is not None and size > max_bytes:
            raise CorruptError(
                "The checkpoint is larger than max_bytes",
                at=str(self.path),
                got=f"{size} bytes",
                expected=f"at most {max_bytes}",
            )

    def read(self, entry: Entry, boxes: Sequence[Box] | None = None) -> Any:
        """The value of an entry: a host array (of a random key: its bits), or a Python value.

        Args:
            boxes: what is wanted of the array; all else is neither read nor filled in.
        """
        if entry.dtype is None:
            return entry.scalar
        whole = np.empty(entry.shape, entry.dtype)
        for part in entry.parts:
            if boxes is not None and not any(_meet(part, box, entry.shape) for box in boxes):
                continue
            alone = part.shape == entry.shape
            box = whole if alone else np.empty(part.shape, entry.dtype)
            self._read_part(box.reshape(-1).view(np.uint8), part, entry.name)
            if not alone:
                whole[tuple(slice(a, a + n) for a, n in zip(part.start, part.shape))] = box
        return whole

    def _read_part(self, content: np.ndarray, part: Part, name: str) -> None:
        file = self._files[part.file]
        for i, (piece, check) in enumerate(zip(_pieces(content), part.checks)):
            file.read(piece, part.offset + i * PIECE, name)
            if zlib.crc32(piece.data) != check:
                file.refuse("its checksum is another", name)

    def verify(self) -> None:
        """Reads everything, keeping nothing.

        Raises:
            CorruptError: the first entry that is damaged.
        """
        room = np.empty(PIECE, np.uint8)
        for entry in self.entries.values():
            for part in entry.parts:
                left = math.prod(part.shape) * (entry.dtype.itemsize if entry.dtype else 0)
                self._read_in(room, left, part, entry.name)

    def _read_in(self, room: np.ndarray, left: int, part: Part, name: str) -> None:
        """Reads a part of `left` bytes in a room for one piece."""
        for i, check in enumerate(part.checks):
            piece = room[: min(PIECE, left - i * PIECE)]
            self._files[part.file].read(piece, part.offset + i * PIECE, name)
            if zlib.crc32(piece.data) != check:
                self._files[part.file].refuse("its checksum is another", name)


def _meet(part: Part, box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a part and a box of an array have an element in common."""
    spans = [cut.indices(n)[:2] for cut, n in zip(box, shape)]
    return all(a < end and begin < a + n for a, n, (begin, end) in zip(part.start, part.shape, spans))


def _is_about(about: dict[str, Any]) -> bool:
    step, metrics, versions = about.get("step"), about.get("metrics", {}), about.get("versions", {})
    files: Any = about.get("files", [])
    return (
        type(files) is list
        and all(type(pair) is list and len(pair) == 2 and all(type(x) is str for x in pair) for pair in files)
        and all(beside(other) for other, _ in files)
        and len({other for other, _ in files}) == len(files)
        and (step is None or (type(step) is int and step >= 0))
        and type(about.get("healthy")) is bool
        and all(type(table) is dict for table in (metrics, versions))
        and all(type(x) is float for x in metrics.values())
        and all(type(x) is str for x in versions.values())
    )


def beside(name: str) -> str | None:
    """The name of the checkpoint to which a file belongs, by its name, that another process than the first one wrote.

    >>> beside("0000000002.ckpt.1-0f3a9c.part")
    '0000000002.ckpt'
    """
    found = BESIDE.fullmatch(name)
    return found and found[1]


def _counts(x: Any, what: str) -> tuple[int, ...]:
    want(type(x) is list and all(type(n) is int and 0 <= n < 1 << 62 for n in x), what)
    return tuple(x)


def _entries(listed: Any, number: int) -> tuple[dict[str, Entry], int]:
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
            entries[name], offset = _array_entry(item, offset, number)
    return entries, offset


def _array_entry(item: list[Any], offset: int, number: int) -> tuple[Entry, int]:
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
        boxes.append(Part(start, size, offset, checks, number))
        offset += count
    return Entry(name, kind, sides, tuple(boxes), impl), offset


def _cover(shape: tuple[int, ...], boxes: Sequence[Part]) -> bool:
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
