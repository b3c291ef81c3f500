# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol, version 2: tensors as JSON or, after it, as raw bytes.

Source: KServe, "Open Inference Protocol", and Triton's extension for binary tensor data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from batiste.export import ShapeDtype, Signature
from batiste.graph.strict import parse_json

from .errors import Refusal

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "bfloat16": "BF16",
}  # fmt: skip
LENGTH = "inference-header-content-length"


class Asked(NamedTuple):
    """A request: its inputs, the outputs that it wants and which of them as bytes, its name, and seconds it waits."""

    arrays: dict[str, np.ndarray]
    outputs: dict[str, bool]
    id: str | None
    timeout: float | None


def described(spec: Mapping[str, ShapeDtype]) -> list[dict[str, Any]]:
    """Of the metadata: name, datatype and shape, with -1 for open sizes."""
    return [{"name": name, "datatype": DATATYPES.get(x.dtype, x.dtype.upper()),
             "shape": [n if isinstance(n, int) else -1 for n in x.shape]} for name, x in spec.items()]  # fmt: skip


# ---------------------------------------------------------------- reading
def read(body: bytes, header: str | None, signature: Signature, *, finite: bool = True) -> Asked:
    """The request in a body; `header` says how much of it is JSON, where bytes follow.

    Args:
        finite: refuses NaN and infinities, which JSON cannot say, in bytes too.

    Raises:
        Refusal: 400 or 422; it names the tensor.
    """
    cut = len(body)
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) < 12 and int(header) <= len(body)):
            raise Refusal(400, f"The header {LENGTH} is no length within the body")
        cut = int(header)
    try:
        asked, rest = parse_json(body[:cut]), memoryview(body)[cut:]
    except ValueError as error:
        raise Refusal(400, f"The body is no JSON: {str(error)[:200]}") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "The body is a JSON object")
    parameters = _object(asked.get("parameters"), "parameters")
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(entry, dict) for entry in inputs):
        raise Refusal(400, "'inputs' is a list of objects")
    arrays: dict[str, np.ndarray] = {}
    for entry in inputs:
        name = entry.get("name")
        if not isinstance(name, str) or name not in signature.inputs or name in arrays:
            raise Refusal(422, f"'inputs' names {_shown(name)}; expected once each: {', '.join(signature.inputs)}")
        x, rest = _tensor(entry, name, signature.inputs[name], rest)
        if finite and jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
            raise Refusal(422, f"input {name!r}: a number is not finite")
        arrays[name] = x
    if missing := [name for name in signature.inputs if name not in arrays]:
        raise Refusal(422, f"'inputs' lacks {', '.join(missing)}")
    if len(rest):
        raise Refusal(400, f"{len(rest)} bytes follow the last tensor")
    return Asked(arrays, _wanted(asked.get("outputs"), parameters, signature), _name(asked.get("id")),
                 _timeout(parameters.get("timeout")))  # fmt: skip


def _tensor(entry: dict[str, Any], name: str, spec: ShapeDtype, rest: memoryview) -> tuple[np.ndarray, memoryview]:
    shape, wanted = entry.get("shape"), DATATYPES.get(spec.dtype)
    if entry.get("datatype") != wanted:
        raise Refusal(422, f"input {name!r}: the datatype is {_shown(entry.get('datatype'))}, expected {wanted}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise Refusal(422, f"input {name!r}: the shape is no list of sizes")
    if len(shape) != len(spec.shape) or any(isinstance(b, int) and a != b for a, b in zip(shape, spec.shape)):
        raise Refusal(422, f"input {name!r}: the shape is {_shown(shape)}, expected {spec}")
    dtype, count = spec.numpy_dtype(), math.prod(shape)
    size = _object(entry.get("parameters"), f"parameters of {name!r}").get("binary_data_size")
    if size is not None:
        if type(size) is not int or size != count * dtype.itemsize or "data" in entry:
            raise Refusal(422, f"input {name!r}: binary_data_size is {_shown(size)}, expected {count * dtype.itemsize}")
        if size > len(rest):
            raise Refusal(422, f"input {name!r}: {size} bytes are claimed and {len(rest)} are there")
        return np.frombuffer(rest[:size], dtype).reshape(shape), rest[size:]
    return _numbers(entry.get("data"), name, dtype, count).reshape(shape), rest


def _numbers(data: Any, name: str, dtype: np.dtype, count: int) -> np.ndarray:
    if not isinstance(data, list):
        raise Refusal(422, f"input {name!r}: 'data' is a list of numbers")
    try:
        found = np.asarray(data)
    except ValueError:
        raise Refusal(422, f"input {name!r}: 'data' is ragged") from None
    whole, real = jnp.issubdtype(dtype, jnp.integer), jnp.issubdtype(dtype, jnp.floating)
    kinds = "iu" if whole else "iuf" if real else "b"
    if found.size != count:
        raise Refusal(422, f"input {name!r}: 'data' holds {found.size} numbers, and the shape {count}")
    if count and found.dtype.kind not in kinds:
        raise Refusal(422, f"input {name!r}: 'data' is not all of {DATATYPES[dtype.name]}")
    if whole and count:
        range_ = jnp.iinfo(dtype)
        if int(found.min()) < range_.min or int(found.max()) > range_.max:
            raise Refusal(422, f"input {name!r}: a number is outside {DATATYPES[dtype.name]}")
    with np.errstate(over="ignore"):
        cast = found.astype(dtype)
    if real and not np.isfinite(cast).all():
        raise Refusal(422, f"input {name!r}: a number is too large for {DATATYPES[dtype.name]}")
    return cast


def _wanted(given: Any, parameters: dict[str, Any], signature: Signature) -> dict[str, bool]:
    usual = parameters.get("binary_data_output") is True
    if given is None or given == []:
        return dict.fromkeys(signature.outputs, usual)
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise Refusal(400, "'outputs' is a list of objects")
    wanted: dict[str, bool] = {}
    for entry in given:
        name = entry.get("name")
        if not isinstance(name, str) or name not in signature.outputs or name in wanted:
            raise Refusal(422, f"'outputs' names {_shown(name)}; expected: {', '.join(signature.outputs)}")
        own = _object(entry.get("parameters"), f"parameters of {name!r}")
        if "classification" in own:
            raise Refusal(422, f"output {name!r}: classification is not offered")
        wanted[name] = own.get("binary_data", usual) is True
    return wanted


def _object(given: Any, name: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise Refusal(400, f"{name} is an object")
    return given or {}


def _name(given: Any) -> str | None:
    if given is not None and not (isinstance(given, str) and len(given) <= 256):
        raise Refusal(400, "'id' is a text of at most 256 characters")
    return given


def _timeout(given: Any) -> float | None:
    """In the protocol, microseconds."""
    if given is None or given == 0:
        return None
    if type(given) is not int or not 0 < given < 1 << 53:
        raise Refusal(400, "'timeout' is a number of microseconds")
    return given / 1e6


def _shown(given: Any) -> str:
    return repr(given)[:64]


# ---------------------------------------------------------------- writing
def write(model: str, version: str, asked: Asked, outputs: Mapping[str, np.ndarray],
          signature: Signature) -> tuple[Sequence[bytes], int | None]:  # fmt: skip
    """The parts of the answer's body, and how long its JSON is where bytes follow."""
    entries, parts = [], []
    for name, binary in asked.outputs.items():
        x = np.ascontiguousarray(outputs[name])
        entry: dict[str, Any] = {"name": name, "datatype": DATATYPES.get(x.dtype.name), "shape": list(x.shape)}
        if binary:
            parts.append(x.tobytes())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            real = jnp.issubdtype(x.dtype, jnp.floating)
            if real and not np.isfinite(x).all():
                raise Refusal(500, f"The output {name!r} holds what JSON cannot say: ask for it as bytes")
            entry["data"] = (x.astype(np.float64) if real and x.dtype.itemsize < 4 else x).ravel().tolist()
        entries.append(entry)
    head: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if asked.id is not None:
        head["id"] = asked.id
    text = json.dumps(head, allow_nan=False, separators=(",", ":")).encode()
    return [text, *parts], len(text) if parts else None
