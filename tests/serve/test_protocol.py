# SPDX-License-Identifier: Apache-2.0
"""Requests of the Open Inference Protocol: what is read, what is refused, and that the field is named."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from batiste.export import ShapeDtype, Signature
from batiste.graph.errors import ArgumentError, DtypeError, ShapeError
from batiste.serve.errors import Refusal
from batiste.serve.protocol import DATATYPES, Asked, read, write

SIGNATURE = Signature(
    {"x": ShapeDtype.of("float32[batch, 2]"), "ids": ShapeDtype.of("int32[batch, length] < 100")},
    {"y": ShapeDtype.of("float32[batch, 2]")},
)
X = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
IDS = {"name": "ids", "shape": [1, 3], "datatype": "INT32", "data": [1, 2, 3]}


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def test_flat_and_nested_data_and_bytes_are_one() -> None:
    nested = {**IDS, "data": [[1, 2, 3]]}
    raw = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    head = body(raw, nested, id="7")
    found = read(head + np.array([1, 2], "<f4").tobytes(), str(len(head)), SIGNATURE)
    again = read(body(X, IDS, id="7", parameters={"timeout": 2_000_000}), None, SIGNATURE)
    assert found.id == again.id == "7" and again.timeout == 2.0 and found.timeout is None
    for name in ("x", "ids"):
        np.testing.assert_array_equal(found.arrays[name], again.arrays[name])
        assert found.arrays[name].dtype == SIGNATURE.inputs[name].numpy_dtype()


@pytest.mark.parametrize("dtype", DATATYPES)
def test_each_datatype_goes_there_and_back(dtype: str) -> None:
    if dtype in ("float64", "int64", "uint64"):
        values = np.array([[0, 1]], dtype)
    else:
        values = np.array([[0, 1]]).astype(np.dtype(getattr(jnp, dtype, dtype)))
    signature = Signature({"x": ShapeDtype(("n", 2), dtype)}, {"x": ShapeDtype(("n", 2), dtype)})
    for binary in (False, True):
        parts, length = write("m", "1", Asked({}, {"x": binary}, None, None), {"x": values}, signature)
        answer = json.loads(parts[0])
        request = json.dumps({"inputs": answer["outputs"]}).encode()
        found = read(b"".join([request, *parts[1:]]), str(len(request)), signature)
        np.testing.assert_array_equal(found.arrays["x"], values)
        assert found.arrays["x"].dtype == values.dtype and (length is None) == (not binary)


DEEP = b'{"inputs":' + b"[" * 200_000
REFUSED: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "no JSON"),
    "no text": (b"\xff\xfe", "no JSON"),
    "nothing": (b"", "no JSON"),
    "NaN": (body({**X, "data": [float("nan"), 1.0]}, IDS), "no number of JSON"),
    "infinity": (body({**X, "data": [float("inf"), 1.0]}, IDS), "no number of JSON"),
    "1e400": (body(X, IDS).replace(b"1.0", b"1e400"), "input 'x'.*too large"),
    "too large for float32": (body({**X, "data": [1e39, 0.0]}, IDS), "input 'x'.*too large"),
    "a key twice": (b'{"inputs":[],"inputs":[]}', "stands twice"),
    "depth": (DEEP, "nested too deep|no JSON"),
    "digits": (body(X, IDS).replace(b"[1, 2, 3]", b"[" + b"9" * 5000 + b"]"), "no JSON|ids"),
    "a list": (b"[]", "JSON object"),
    "no inputs": (b"{}", "'inputs' is a list"),
    "inputs of numbers": (b'{"inputs":[1]}', "list of objects"),
    "a missing input": (body(X), "lacks ids"),
    "an input twice": (body(X, X), "once each"),
    "another name": (body({**X, "name": "z"}, IDS), "names 'z'"),
    "a name that is a list": (body({**X, "name": []}, IDS), r"names \[\]"),
    "another datatype": (body({**X, "datatype": "FP64"}, IDS), "input 'x'.*FP64.*FP32"),
    "BYTES": (body({**X, "datatype": "BYTES"}, IDS), "BYTES"),
    "no shape": (body({k: v for k, v in X.items() if k != "shape"}, IDS), "no list of sizes"),
    "a negative size": (body({**X, "shape": [-1, 2]}, IDS), "no list of sizes"),
    "a size that is true": (body({**X, "shape": [True, 2]}, IDS), "no list of sizes"),
    "2^40": (body({**X, "shape": [1 << 40, 2]}, IDS), "no list of sizes"),
    "many claimed": (body({**X, "shape": [1 << 30, 2]}, IDS), "'data' holds 2 numbers"),
    "another rank": (body({**X, "shape": [2]}, IDS), "input 'x': the shape"),
    "a fixed size": (body({**X, "shape": [1, 3]}, IDS), "input 'x': the shape"),
    "too few": (body({**X, "data": [1.0]}, IDS), "holds 1 numbers"),
    "too many": (body({**X, "data": [1.0] * 3}, IDS), "holds 3 numbers"),
    "texts": (body({**X, "data": ["1", "2"]}, IDS), "not all of FP32"),
    "null": (body({**X, "data": [None, 1.0]}, IDS), "not all of FP32"),
    "truth": (body({**X, "data": [True, False]}, IDS), "not all of FP32"),
    "objects": (body({**X, "data": [{}, {}]}, IDS), "not all of FP32"),
    "ragged": (body({**X, "data": [[1.0], [1.0, 2.0]]}, IDS), "ragged"),
    "data that is a number": (body({**X, "data": 1.0}, IDS), "list of numbers"),
    "half a token": (body(X, {**IDS, "data": [1.5, 2.0, 3.0]}), "input 'ids'.*INT32"),
    "beyond int32": (body(X, {**IDS, "data": [1 << 31, 0, 0]}), "outside INT32"),
    "beyond int64": (body(X, {**IDS, "data": [1 << 70, 0, 0]}), "not all of INT32"),
    "bytes claimed and not there": (
        body({"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}, IDS),
        "8 bytes are claimed and 0",
    ),
    "bytes of another size": (
        body({"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 4}}, IDS),
        "expected 8",
    ),
    "both": (body({**X, "parameters": {"binary_data_size": 8}}, IDS), "binary_data_size"),
    "parameters": (body({**X, "parameters": []}, IDS), "is an object"),
    "outputs of another name": (body(X, IDS, outputs=[{"name": "z"}]), "'outputs' names 'z'"),
    "a million outputs": (body(X, IDS, outputs=[{"name": "y"}] * 100_000), "'outputs' names 'y'"),
    "classification": (body(X, IDS, outputs=[{"name": "y", "parameters": {"classification": 3}}]), "classification"),
    "an id": (body(X, IDS, id=3), "'id'"),
    "a long id": (body(X, IDS, id="a" * 300), "'id'"),
    "a timeout": (body(X, IDS, parameters={"timeout": -1}), "'timeout'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_with_its_name(case: str) -> None:
    data, expected = REFUSED[case]
    with pytest.raises(Refusal, match=f"(?s){expected}") as caught:
        read(data, None, SIGNATURE)
    assert caught.value.status in (400, 422) and len(str(caught.value)) < 400


@pytest.mark.parametrize("header", ["-1", "x", "99999", "1e3", "٣", ""])
def test_a_header_that_is_no_length_within_the_body_is_refused(header: str) -> None:
    with pytest.raises(Refusal, match="no length within the body"):
        read(body(X, IDS), header, SIGNATURE)


def test_bytes_that_nobody_asked_for_are_refused() -> None:
    head = body(X, IDS)
    with pytest.raises(Refusal, match="3 bytes follow"):
        read(head + b"abc", str(len(head)), SIGNATURE)


def test_what_json_cannot_say_is_not_sent_as_json() -> None:
    answer = {"y": np.array([[np.inf, 1]], np.float32)}
    with pytest.raises(Refusal, match="ask for it as bytes"):
        write("m", "1", Asked({}, {"y": False}, None, None), answer, SIGNATURE)
    assert write("m", "1", Asked({}, {"y": True}, None, None), answer, SIGNATURE)[1]


# ---------------------------------------------------------------- two hundred more, made from a table
NUMBERS = {"a number": 3, "a text": "x", "a list": [], "an object": {}, "null": None, "truth": True}
WRONG: dict[str, dict[str, Any]] = {  # of an entry of 'inputs': its field, and what it is not
    "datatype": NUMBERS | {"small": "fp32", "wide": "FP64", "BYTES": "BYTES", "a space": "FP32 ", "long": "F" * 10_000},
    "shape": NUMBERS | {
        "negative": [-1, 2], "-0.5": [-0.5, 2], "a float": [1.0, 2], "truth in it": [True, 2], "2^31": [1 << 31, 2],
        "2^40": [1 << 40, 2], "2^63": [1 << 63, 2], "2^300": [1 << 300, 2], "texts": ["1", "2"], "nested": [[1], 2],
        "a rank less": [2], "a rank more": [1, 2, 1], "no rows": [0, 2], "a thousand dims": [1] * 1000,
    },
    "data": NUMBERS | {
        "one": [1], "many": [1] * 1000, "words": ["1", "2", "3"], "nulls": [None] * 3, "truths": [True] * 3,
        "objects": [{}] * 3, "ragged": [[1], [1, 2]], "lists of nothing": [[], []], "deep": [[[[[[1]]]]]],
        "mixed": [1, "2", None], "NaN": [float("nan")] * 3, "infinite": [float("inf")] * 3, "10^400": [10**400] * 3,
    },
    "name": {k: v for k, v in NUMBERS.items() if v != "x"} | {
        "another": "z", "empty": "", "large": "X",
        "a zero": "x\0", "long": "x" * 10_000,
    },
    "parameters": {k: v for k, v in NUMBERS.items() if v not in ({}, None)} | {
        f"binary_data_size {size!r}": {"binary_data_size": size}
        for size in (-1, 0, 7, 8, "8", 8.0, True, 1 << 70, [])
    },
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {  # of the request
    "inputs": NUMBERS | {"numbers": [1], "nulls": [None], "lists": [[]], "empty": [{}], "a thousand": [X] * 1000},
    "outputs": {k: v for k, v in NUMBERS.items() if v not in ([], None)} | {
        "numbers": [1], "lists": [[]], "nameless": [{}], "another": [{"name": "z"}], "an input": [{"name": "x"}],
        "twice": [{"name": "y"}] * 2, "a list as name": [{"name": []}], "parameters": [{"name": "y", "parameters": 3}],
    },
    "id": {k: v for k, v in NUMBERS.items() if v not in ("x", None)} | {"long": "a" * 257},
    "parameters": {k: v for k, v in NUMBERS.items() if v not in ({}, None)} | {
        f"timeout {given!r}"[:40]: {"timeout": given} for given in (-1, 0.5, "1", True, [], {}, 1 << 60, 10**400)
    },
}  # fmt: skip


def payloads() -> dict[str, tuple[bytes, str | None, str]]:
    """Body, header and the word that the refusal says."""
    found: dict[str, tuple[bytes, str | None, str]] = {}
    entries = {"x": X, "ids": IDS}
    for name, entry in entries.items():
        for field, values in WRONG.items():
            for kind, value in values.items():
                given = entries | {name: {**entry, field: value}}
                word = "'inputs' names" if field == "name" else "no number" if kind in ("NaN", "infinite") else name
                found[f"{name}: {field}: {kind}"] = body(*given.values()), None, word
    for field, values in WHOLE.items():
        for kind, value in values.items():
            word = {"parameters": "y", "timeout": "timeout"}.get(kind.partition(" ")[0], field)
            found[f"{field}: {kind}"] = body(*entries.values(), **{field: value}), None, word
    for token in (-1, 100, 1 << 30, -(1 << 31)):
        found[f"token {token}"] = body(X, {**IDS, "data": [1, token, 2]}), None, "ids"
    whole = body(X, IDS)
    for cut in range(0, len(whole), 10):
        found[f"cut at {cut}"] = whole[:cut], None, "no JSON"
    raw = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    head = body(raw, IDS)
    for there in (0, 1, 7, 9, 16):
        found[f"{there} bytes in place of 8"] = head + bytes(there), str(len(head)), "x" if there < 8 else "bytes"
    for nan in (b"\x00\x00\xc0\x7f" * 2, b"\x00\x00\x80\xff" * 2):
        found[f"bytes of {np.frombuffer(nan, '<f4')[0]}"] = head + nan, str(len(head)), "x"
    return found


def test_two_hundred_payloads_from_a_table_are_refused_with_their_field() -> None:
    answered, unnamed, given = [], [], payloads()
    for case, (data, header, word) in given.items():
        try:
            SIGNATURE.check(read(data, header, SIGNATURE).arrays)
            answered.append(case)
        except (Refusal, ArgumentError, ShapeError, DtypeError) as error:  # all but the first are answered with 422
            if getattr(error, "status", 422) not in (400, 422) or word not in str(error) or len(str(error)) > 400:
                unnamed.append((case, str(error)))
    assert not answered and not unnamed
    assert len(given) >= 200
    print(f"SV2: {len(given)} payloads refused")


def test_numbers_that_are_not_finite_come_as_bytes_if_the_server_lets_them() -> None:
    head = body({"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}, IDS)
    given = np.array([[np.nan, -np.inf]], np.float32)
    found = read(head + given.tobytes(), str(len(head)), SIGNATURE, finite=False)
    np.testing.assert_array_equal(found.arrays["x"], given)
