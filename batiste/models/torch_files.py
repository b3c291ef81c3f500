# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files (.pt, .pth, .bin, and TorchScript archives) as named tensors, by numpy alone and without any code.

Two forms. Since 1.6 a file is a zip archive of members that are stored as they are: `data.pkl` says what there is, and
`data/0`, `data/1`, … hold values. Before, pickles stand one after the other, and values behind them. Nested dicts,
lists and TorchScript objects give names with dots. Nothing of a value is read before it is called for.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from .pickled import Machine, Record
from .safetensors import index_of
from .tensors import Tensor, Weights, WeightsError, checked_shape, file_size

MOST_PICKLE = 1 << 26
MOST_VALUES = 1 << 17
DEEPEST = 64
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
STORAGES = {
    "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}  # fmt: skip


class Kind(NamedTuple):
    """The class of a storage."""

    dtype: np.dtype


class Storage(NamedTuple):
    """Values that tensors share: the name of their place in the file, their dtype, how many there are."""

    key: str
    dtype: np.dtype
    size: int


class View(NamedTuple):
    """A tensor: which elements of a storage it is made of."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(path: str | Path) -> Weights:
    """The tensors of a file, or of a folder with `pytorch_model.bin` or its index; `about` has numbers and strings.

    Raises:
        WeightsError: the file is damaged, claims what it does not hold, or names code that is no part of weights.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / INDEX).exists():
            return open_torch(path / SINGLE)
        return index_of(path / INDEX, open_torch)
    total = file_size(path)
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        views, about, places = (_archive if start == b"PK\3\4" else _legacy)(path, file, total)
    return Weights({name: _tensor(path, name, view, places) for name, view in views.items()}, about)


# ---------------------------------------------------------------- the two forms
Found = tuple[dict[str, View], dict[str, Any], Mapping[str, tuple[int, int]]]


def _archive(path: Path, file: BinaryIO, total: int) -> Found:
    """Names and views, and where in the file each storage lies: its start and length."""
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, UnicodeError) as error:
        raise WeightsError("the archive is damaged", at=str(path), got=str(error)[:80],
                           fix="fetch the file again") from None  # fmt: skip
    by_name: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename or member.filename in by_name:
            raise WeightsError("a member of the archive has a name that no weights have", at=str(path),
                               got=repr(member.filename[:80]), fix="do not use this file")  # fmt: skip
        by_name[member.filename] = member
    roots = [name.removesuffix("data.pkl") for name in by_name if PurePosixPath(name).parts[1:] == ("data.pkl",)]
    if len(roots) != 1:
        raise WeightsError("the archive has no data.pkl", at=str(path), got=f"{len(roots)} of them",
                           fix="is it a file of weights?")  # fmt: skip
    order = by_name.get(roots[0] + "byteorder")
    if order is not None and _content(path, file, order, total) != b"little":
        raise WeightsError("the values are not in little-endian order", at=str(path), fix="save it again")
    said = Machine(str(path), KNOWN, _storage).run(
        io.BytesIO(_content(path, file, by_name[roots[0] + "data.pkl"], total))
    )
    views, about = _named(said, str(path))
    keys = {view.storage.key for view in views.values()}
    lacking = [key for key in keys if f"{roots[0]}data/{key}" not in by_name]
    if lacking:
        raise WeightsError("the archive lacks the values of a tensor", at=str(path), got=f"no data/{lacking[0][:80]}",
                           fix="fetch the file again")  # fmt: skip
    places = {key: _place(path, file, by_name[f"{roots[0]}data/{key}"], total) for key in keys}
    return views, about, places


def _place(path: Path, file: BinaryIO, member: zipfile.ZipInfo, total: int) -> tuple[int, int]:
    """Start and length of a member's bytes, which lie in the file as they are."""
    at = f"{path}: {member.filename}"
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size or member.flag_bits & 1:
        raise WeightsError("a member of the archive is packed or encrypted, which weights are not", at=at,
                           fix="save it again with torch.save")  # fmt: skip
    file.seek(min(max(member.header_offset, 0), total))
    head = file.read(30)
    if member.header_offset < 0 or len(head) < 30 or head[:4] != b"PK\3\4":
        raise WeightsError("a member of the archive is not where its list says", at=at, fix="fetch the file again")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if start + member.file_size > total:
        raise WeightsError("a member lies past the end of the file", at=at, got=f"end {start + member.file_size}",
                           expected=f"at most {total}", fix="fetch the file again")  # fmt: skip
    return start, member.file_size


def _content(path: Path, file: BinaryIO, member: zipfile.ZipInfo, total: int) -> bytes:
    start, length = _place(path, file, member, total)
    if length > MOST_PICKLE:
        raise WeightsError("what describes the tensors is not that long", at=f"{path}: {member.filename}",
                           got=f"{length} bytes", expected=f"at most {MOST_PICKLE}")  # fmt: skip
    file.seek(start)
    return file.read(length)


def _legacy(path: Path, file: BinaryIO, total: int) -> Found:
    at = str(path)
    if not total:
        raise WeightsError("the file is empty", at=at, fix="fetch the file again")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # reads no further than its end

        def value() -> Any:
            return Machine(at, KNOWN, _storage).run(content)  # type: ignore[arg-type]

        if content[:1] != b"\x80" or value() != LEGACY_MAGIC:
            raise WeightsError("this is no file of PyTorch's", at=at, got=repr(content[:8]),
                               fix="is it a file of weights?")  # fmt: skip
        value()  # the version of the form
        about_system = value()
        if not isinstance(about_system, dict) or about_system.get("little_endian") is not True:
            raise WeightsError("the values are not in little-endian order", at=at, fix="save it again")
        said, keys = value(), value()
        views, about = _named(said, at)
        storages = {view.storage.key: view.storage for view in views.values()}
        if not isinstance(keys, list) or set(map(str, keys)) != set(storages) or len(keys) != len(storages):
            raise WeightsError("the list of values does not fit the tensors", at=at, fix="fetch the file again")
        places, start = {}, content.tell()
        for key in keys:
            storage = storages[key]
            if start + 8 > total or int.from_bytes(content[start : start + 8], "little") != storage.size:
                raise WeightsError("the values of a tensor are not where they should be", at=f"{at}: {key}",
                                   expected=f"{storage.size} values", fix="fetch the file again")  # fmt: skip
            places[key] = (start + 8, storage.size * storage.dtype.itemsize)
            start += 8 + places[key][1]
    if start != total:
        raise WeightsError("the file does not end where its last values end", at=at, got=f"{total} bytes",
                           expected=str(start), fix="fetch the file again")  # fmt: skip
    return views, about, places


# ---------------------------------------------------------------- what a pickle may say
def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in sizes):
        raise TypeError("a tensor is a storage, a place, sizes and strides")
    return View(storage, offset, tuple(shape), tuple(strides))


def _storage(said: Any) -> Storage:
    word, kind, key, _, size = said[:5]
    if (
        word != "storage"
        or getattr(kind, "call", None) not in KINDS
        or not isinstance(key, str)
        or type(size) is not int
    ):
        raise TypeError("a reference that is no storage")
    if len(said) > 5 and said[5] is not None:
        raise TypeError("a view of a storage, as none is written since 2017")
    return Storage(key, kind.call().dtype, size)


def _ordered(pairs: Any = ()) -> dict[str, Any]:
    found = list(pairs)
    if not all(isinstance(key, (str, int)) for key, _ in found):
        raise TypeError("a key is no name")
    return {str(key): value for key, value in found}


def _first(value: Any = None, *rest: Any) -> Any:
    return value


def _sizes(dims: Any = ()) -> tuple[Any, ...]:
    return tuple(dims)


def _kind(name: str) -> Callable[[], Kind]:
    return functools.partial(Kind, np.dtype(STORAGES[name]))


KINDS_BY_NAME = {f"torch {name}Storage": _kind(name) for name in STORAGES}
KINDS = tuple(KINDS_BY_NAME.values())
KNOWN: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor": _rebuilt,
    "torch._utils _rebuild_tensor_v2": _rebuilt,
    "torch._utils _rebuild_parameter": _first,
    "torch Size": _sizes,
    "torch device": _first,
    "torch.jit._pickle build_intlist": _first,
    "torch.jit._pickle build_doublelist": _first,
    "torch.jit._pickle build_boollist": _first,
    "torch.jit._pickle build_tensorlist": _first,
    "torch.jit._pickle restore_type_tag": _first,
    "__torch__.*": lambda *args: Record(),
    **KINDS_BY_NAME,
}
"""What a pickle may name, and what is made of it."""


def _named(said: Any, at: str) -> tuple[dict[str, View], dict[str, Any]]:
    """All tensors under the names of where they stand; and the numbers and strings."""
    views: dict[str, View] = {}
    about: dict[str, Any] = {}
    for count, (name, value) in enumerate(_walk(said, at)):
        if count >= MOST_VALUES:
            raise WeightsError("a file of weights has not that many values", at=at, got=f"more than {count}")
        if isinstance(value, View):
            views[name] = value
        elif isinstance(value, (str, int, float)):
            about[name] = value
    return views, about


def _walk(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """What stands in dicts, lists and tuples, and each of these, in their order, with the names of the places."""
    left = [("", 0, value)]
    while left:
        name, depth, value = left.pop()
        yield name, value
        if isinstance(value, dict):
            parts = list(value.items())
        elif isinstance(value, (list, tuple)) and not isinstance(value, _LEAVES):
            parts = list(enumerate(value))
        else:
            continue
        if depth == DEEPEST:
            raise WeightsError("the values are nested too deeply, or hold themselves", at=at, got=f"{DEEPEST} levels")
        left += [(f"{name}.{key}" if name else str(key), depth + 1, part) for key, part in reversed(parts)]


_LEAVES = (View, Storage, Kind)


def _tensor(path: Path, name: str, view: View, places: Mapping[str, tuple[int, int]]) -> Tensor:
    at, storage = f"{path}: {name}", view.storage
    (start, length), itemsize = places[storage.key], storage.dtype.itemsize
    shape = checked_shape(view.shape, at, length // itemsize)
    last = view.offset + sum((n - 1) * stride for n, stride in zip(shape, view.strides)) if math.prod(shape) else 0
    fits = len(view.strides) == len(shape) and last < max(storage.size, 1) and storage.size * itemsize == length
    if not fits or (math.prod(shape) and last * itemsize >= length):
        raise WeightsError("a tensor's elements do not lie in its values", at=at,
                           got=f"place {view.offset}, shape {shape}, strides {view.strides}",
                           expected=f"within {storage.size} values, {length} bytes",
                           fix="fetch the file again")  # fmt: skip
    span = (last + 1 - view.offset) if math.prod(shape) else 0
    strides = tuple(stride * itemsize for stride in view.strides)

    def decode(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        values = raw.view(storage.dtype)
        if not span:
            return np.zeros(shape, storage.dtype)
        return np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)

    return Tensor(path, start + view.offset * itemsize, span * itemsize, shape, decode)
