# SPDX-License-Identifier: Apache-2.0
"""Arrays as the bytes of a safetensors file, and back without a copy; also dtypes that the format does not know.

Those lie in the file as what their bits are: whole numbers of 4 bits as bytes of two each (the first one low), random
keys as uint32. What they mean stands beside the file, as `name -> ShapeDtype`.

Source: the format's description, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph.strict import parse_json, want

from .errors import BundleError, ExportError
from .signature import KEYS, ShapeDtype

NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
ALIGNED = 64  # what JAX asks of memory that it takes without a copy
OTHERS = ("complex128", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = {name: np.dtype(getattr(jnp, name, name)) for name in (*NAMES, *OTHERS)}
NIBBLES = {"int4": np.dtype(jnp.int4), "uint4": np.dtype(jnp.uint4)}


def stored(x: Any, at: str) -> tuple[ShapeDtype, np.ndarray, str]:
    """What an array is, the array that lies in the file for it, and the name of that one's dtype there.

    Raises:
        ExportError: no file can hold it.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ExportError("An array lies on devices of other processes", at=at, fix="gather it, or export on one host")
    spec = ShapeDtype.of(x if hasattr(x, "dtype") else np.asarray(x), at)
    if spec.is_key:
        return spec, np.asarray(jax.random.key_data(x)), "U32"
    x = np.ascontiguousarray(x).reshape(np.shape(x))
    if spec.dtype in NIBBLES:
        flat = x.reshape(-1).astype(np.int8).view(np.uint8) & 15
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        return spec, flat[::2] | flat[1::2] << 4, "U8"
    if spec.dtype in OTHERS:
        return spec, x.reshape(-1).view(np.uint8), "U8"
    if spec.dtype not in NAMES:
        raise ExportError("A bundle cannot hold this dtype", at=at, got=spec.dtype)
    return spec, x, NAMES[spec.dtype]


def restored(spec: ShapeDtype, x: np.ndarray) -> Any:
    """The array that `stored` was given."""
    shape: Any = spec.shape
    if spec.is_key:
        return jax.random.wrap_key_data(jnp.asarray(x), impl=KEYS[spec.dtype][0])
    if spec.dtype in NIBBLES:
        both = np.stack([x & 15, x >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
        signed = (both ^ 8).astype(np.int8) - 8 if spec.dtype == "int4" else both
        return signed.astype(NIBBLES[spec.dtype]).reshape(shape)
    return x.view(DTYPES[spec.dtype]).reshape(shape) if spec.dtype in OTHERS else x


def encode(arrays: Mapping[str, Any]) -> tuple[dict[str, ShapeDtype], Iterator[Any]]:
    """What the arrays are, and the pieces of the file."""
    specs: dict[str, ShapeDtype] = {}
    parts, header, offset = [], {}, 0
    found = {name: stored(x, name) for name, x in arrays.items()}
    for name in sorted(found, key=lambda name: found[name][1].nbytes % ALIGNED != 0):  # the others keep their place
        specs[name], part, dtype = found[name]
        header[name] = {"dtype": dtype, "shape": list(part.shape), "data_offsets": [offset, offset + part.nbytes]}
        offset += part.nbytes
        parts.append(part)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    return specs, iter([len(text).to_bytes(8, "little") + text, *(part.reshape(-1).view(np.uint8) for part in parts)])


def decode(content: Any, specs: Mapping[str, ShapeDtype], file: str) -> dict[str, Any]:
    """The arrays that a file should hold: exactly these, end to end, and nothing else. They are views of it.

    Raises:
        BundleError: it holds others, or claims what it does not hold.
    """
    view = memoryview(content)
    length = int.from_bytes(view[:8], "little")
    try:
        want(len(view) >= 8 and length <= min(len(view) - 8, 100 << 20), "its header does not fit")
        parsed: Any = parse_json(bytes(view[8 : 8 + length]))
        want(type(parsed) is dict and set(parsed) == set(specs), "it holds other arrays than the bundle says")
        header: dict[str, Any] = parsed
        arrays, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            arrays[name], end = _array(view[8 + length :], name, entry, specs[name], end)
        want(8 + length + end == len(view), "it does not end where its last array ends")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"The bundle is malformed: {error!s:.200}", at=file) from None
    return {name: restored(specs[name], arrays[name]) for name in specs}


def _array(data: memoryview, name: str, entry: Any, spec: ShapeDtype, start: int) -> tuple[np.ndarray, int]:
    """The array of a header's entry, which begins at `start`, and where it ends."""
    dtype, shape = _layout(spec)
    count = math.prod(shape)
    end = start + count * dtype.itemsize
    expected = {"dtype": _code(spec), "shape": list(shape), "data_offsets": [start, end]}
    want(entry == expected and end <= len(data), f"{name!r:.99} is not what the bundle says, or lies elsewhere")
    return np.frombuffer(data[start:end], dtype, count).reshape(shape), end


def _code(spec: ShapeDtype) -> str:
    return "U32" if spec.is_key else NAMES.get(spec.dtype, "U8")


def _layout(spec: ShapeDtype) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape that an array of this kind has in the file."""
    shape: Any = spec.shape
    if spec.is_key:
        return np.dtype(np.uint32), (*shape, KEYS[spec.dtype][1])
    if spec.dtype in NIBBLES:
        return np.dtype(np.uint8), (-(-math.prod(shape) // 2),)
    dtype = DTYPES.get(spec.dtype)
    want(dtype is not None, f"the dtype {spec.dtype!r:.40}")
    assert dtype is not None
    return (np.dtype(np.uint8), (math.prod(shape) * dtype.itemsize,)) if spec.dtype in OTHERS else (dtype, shape)
