# SPDX-License-Identifier: Apache-2.0
"""safetensors: 8 bytes with the length of a JSON header, the header, the values. Read and written with numpy alone.

A folder may hold several files and `model.safetensors.index.json`, which says in which of them each tensor lies. In
models of diffusion, `model` is `diffusion_pytorch_model`.

Source: the format's description, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from batiste.graph.strict import parse_json

from .tensors import Tensor, Weights, WeightsError, checked_shape, file_size

HEADER_LIMIT = 100_000_000
SHARD_BYTES = 5_000_000_000  # the most of one file, if nothing else is said
STEMS = ("model", "diffusion_pytorch_model")
FILE, INDEX = "{}.safetensors", "{}.safetensors.index.json"
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def open_safetensors(path: str | Path) -> Weights:
    """The tensors of a file, or of the folder of a model; nothing but headers is read.

    Raises:
        WeightsError: a file is missing, damaged, or claims what it does not hold.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_file(path)
    for stem in STEMS:
        if (path / INDEX.format(stem)).is_file():
            return index_of(path / INDEX.format(stem), _open_file)
        if (path / FILE.format(stem)).is_file():
            return _open_file(path / FILE.format(stem))
    return _open_file(path / FILE.format(STEMS[0]))


def index_of(path: Path, open_file: Callable[[Path], Weights]) -> Weights:
    """The tensors of all files that an index names, which lie beside it.

    Raises:
        WeightsError: it is damaged, a file is missing or lacks a tensor, or a name leads out of the folder.
    """
    file_size(path)
    places = _json(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError("the index says in which file each tensor lies", at=str(path),
                           expected='{"weight_map": {"name": "file"}}')  # fmt: skip
    opened: dict[str, Weights] = {}
    for name in sorted(set(places.values())):
        if not name or Path(name).name != name or "\\" in name or "\0" in name:
            raise WeightsError("the index names a file outside its folder", at=str(path), got=repr(name[:80]),
                               fix="do not use this checkpoint")  # fmt: skip
        opened[name] = open_file(path.parent / name)
    missing = [tensor for tensor, name in places.items() if tensor not in opened[name].tensors]
    if missing:
        raise WeightsError("a file lacks a tensor that the index says it has",
                           at=str(path.parent / places[missing[0]]),
                           got=f"no {missing[0]!r}, and {len(missing) - 1} others",
                           fix="fetch the file again")  # fmt: skip
    return Weights({tensor: opened[name].tensors[tensor] for tensor, name in places.items()}, {})


def _open_file(path: Path) -> Weights:
    total = file_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(total - 8, HEADER_LIMIT):
            raise WeightsError("the header does not fit the file", at=str(path), got=f"{length} bytes of header",
                               expected=f"at most {max(0, min(total - 8, HEADER_LIMIT))}",
                               fix="fetch the file again; is it a safetensors file?")  # fmt: skip
        header = _json(file.read(length), str(path))
    start, tensors = 8 + length, {}
    about = header.pop("__metadata__", {})
    for name, entry in header.items():
        tensors[name] = _tensor(path, name, entry, start, total - start)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset - start != end:
            raise WeightsError("tensors overlap, or leave holes", at=f"{path}: {name}",
                               got=f"start {tensor.offset - start}",
                               expected=f"start {end}", fix="fetch the file again")  # fmt: skip
        end += tensor.size
    if end != total - start:
        raise WeightsError("the file does not end where its last tensor ends", at=str(path), got=f"{total} bytes",
                           expected=f"{start + end}", fix="fetch the file again")  # fmt: skip
    return Weights(tensors, about if isinstance(about, dict) else {})


def _tensor(path: Path, name: str, entry: Any, start: int, room: int) -> Tensor:
    at = f"{path}: {name}"
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    known = DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
    if known is None:
        raise WeightsError("a tensor's dtype is none that is known", at=at, got=str(entry)[:80],
                           expected=", ".join(DTYPES))  # fmt: skip
    dtype = np.dtype(known)
    shape = checked_shape(entry.get("shape"), at, room // dtype.itemsize)
    size = math.prod(shape) * dtype.itemsize
    fits = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    if not fits or not 0 <= offsets[0] <= offsets[1] <= room or offsets[1] - offsets[0] != size:  # type: ignore[index]
        raise WeightsError("a tensor's bytes do not fit its shape and the file", at=at, got=f"data_offsets {offsets}",
                           expected=f"{size} bytes within {room}", fix="fetch the file again")  # fmt: skip
    values = lambda raw, shape: raw.view(dtype).reshape(shape)
    return Tensor(path, start + offsets[0], size, shape, values, dtype)  # type: ignore[index]


def _json(text: bytes, at: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise WeightsError("the header is no JSON", at=at, got=str(error)[:80], fix="fetch the file again") from None
    if not isinstance(found, dict):
        raise WeightsError("the header is no JSON object", at=at, got=type(found).__name__)
    return found


# ---------------------------------------------------------------- writing
class Spec(NamedTuple):
    """A tensor that will be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(folder: str | Path, specs: Iterable[Spec], values: Iterable[np.ndarray],
                      shard_bytes: int = SHARD_BYTES, stem: str = STEMS[0]) -> list[Path]:  # fmt: skip
    """Writes the tensors in this order, to files of at most `shard_bytes` (but for a larger tensor), and the index.

    `values` is gone through once: it may make each tensor when its turn comes.
    """
    folder, shards = Path(folder), list[list[Spec]]([])
    folder.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        if not shards or sum(s.size for s in shards[-1]) + spec.size > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    n, values = len(shards), iter(values)
    names = [FILE.format(f"{stem}-{i + 1:05}-of-{n:05}" if n > 1 else stem) for i in range(n)]
    index = folder / INDEX.format(stem)
    for name, shard in zip(names, shards):
        _write_file(folder / name, shard, values)
    if n > 1:
        places = {spec.name: name for name, shard in zip(names, shards) for spec in shard}
        total = sum(spec.size for shard in shards for spec in shard)
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))
    else:
        index.unlink(missing_ok=True)
    return [folder / name for name in names]


def _write_file(path: Path, specs: list[Spec], values: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.size]
        header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            np.ascontiguousarray(next(values), dtype=spec.dtype).reshape(spec.shape).tofile(file)
    unfinished.replace(path)


def of_arrays(arrays: Mapping[str, np.ndarray]) -> list[Spec]:
    """What `write_safetensors` is told of arrays that exist.

    >>> of_arrays({"a": np.zeros((2, 3), np.float32)})
    [Spec(name='a', shape=(2, 3), dtype=dtype('float32'))]
    """
    return [Spec(name, x.shape, x.dtype) for name, x in arrays.items()]
