# SPDX-License-Identifier: Apache-2.0
"""Files that somebody made on purpose, with a correct seal: they are read as what they say, or refused, cheaply."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import resource
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batiste import checkpoint
from batiste.checkpoint.sealed import END, HEAD
from batiste.graph.errors import BatisteError

LONG = os.environ.get("BATISTE_FAULTS") == "long"
DATA = np.arange(6, dtype="f4").tobytes() + np.arange(2, dtype="u4").tobytes()
ARRAY = ["w", "float32", [2, 3], [[[0, 0], [2, 3], [zlib.crc32(DATA[:24])]]], None]
KEY = ["k", "uint32", [2], [[[0], [2], [zlib.crc32(DATA[24:])]]], "threefry2x32"]
MANIFEST: dict[str, Any] = {
    "format": 1,
    "versions": {"batiste": "0.1.0"},
    "step": 3,
    "healthy": True,
    "metrics": {"loss": 0.5},
    "entries": [ARRAY, KEY, ["n", "int", "4"], ["f", "float", "0x1.8p+0"], ["c", "complex", "0x1p+0 0x1p+0"]],
}


def sealed(manifest: bytes | dict[str, Any], data: bytes = DATA) -> bytes:
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    length = struct.pack("<Q", len(content))
    return HEAD + data + content + length + hashlib.sha256(content + length).digest() + END


def having(**changes: Any) -> dict[str, Any]:
    return {**MANIFEST, **changes}


def array(data: bytes = b"", **changes: Any) -> bytes:
    """A file with one array of which something is as it is told."""
    names = ("name", "dtype", "shape", "parts", "impl")
    entry = {**dict(zip(names, ARRAY)), **changes}
    return sealed(having(entries=[[entry[name] for name in names]]), data or DATA[:24])


def box(start: list[int], shape: list[int], *checks: int) -> list[list[int]]:
    return [start, shape, list(checks)]


HUGE, ZEROS = 1 << 40, zlib.crc32(bytes(12))
CASES = {
    "no entries": sealed({"format": 1}),
    "a later format": sealed(having(format=2)),
    "a format that is text": sealed(having(format="1")),
    "a format that is true": sealed(having(format=True)),
    "a list": sealed(b"[]"),
    "nothing": sealed(b""),
    "no text": sealed(b"\xff\xfe{}"),
    "not a number": sealed(json.dumps(having(metrics={"loss": float("nan")})).encode()),
    "infinity": sealed(json.dumps(having(metrics={"loss": float("-inf")})).encode()),
    "a key twice": sealed(json.dumps(MANIFEST).replace('"step"', '"format": 1, "step"').encode()),
    "deep": sealed(b"[" * 100_000 + b"]" * 100_000),
    "deep entries": sealed(
        json.dumps(having(entries=0)).replace(": 0}", ": " + "[" * 50_000 + "]" * 50_000 + "}").encode()
    ),
    "a number of many digits": sealed(json.dumps(having(step=0)).replace(": 0,", ": " + "9" * 50_000 + ",").encode()),
    "a step below zero": sealed(having(step=-1)),
    "a step that is true": sealed(having(step=True)),
    "no health": sealed(having(healthy=1)),
    "metrics of text": sealed(having(metrics={"loss": "low"})),
    "entries of a dict": sealed(having(entries={"w": ARRAY})),
    "an entry too short": sealed(having(entries=[["w"]])),
    "an entry of text": sealed(having(entries=["array"])),
    "a name twice": sealed(having(entries=[["n", "int", "1"], ["n", "int", "2"]]), b"\0" * 0),
    "an empty name": sealed(having(entries=[["", "int", "1"]]), b""),
    "a long name": sealed(having(entries=[["n" * 5000, "int", "1"]]), b""),
    "a name that is a number": sealed(having(entries=[[1, "int", "1"]]), b""),
    "a kind nobody knows": sealed(having(entries=[["n", "eval", "1"]]), b""),
    "a kind that is a list": sealed(having(entries=[["n", [], "1"]]), b""),
    "code": sealed(having(entries=[["n", "int", "__import__('os')"]]), b""),
    "an int of many digits": sealed(having(entries=[["n", "int", "9" * 100_000]]), b""),
    "a float too large": sealed(having(entries=[["n", "float", "0x1p+99999"]]), b""),
    "half a complex": sealed(having(entries=[["n", "complex", "0x1p+0"]]), b""),
    "a truth that is none": sealed(having(entries=[["n", "bool", "1"]]), b""),
    "more data than said": sealed(MANIFEST, DATA + b"\0"),
    "less data than said": sealed(MANIFEST, DATA[:-1]),
    "objects": array(dtype="object"),
    "text": array(dtype="str96"),
    "times": array(dtype="datetime64[s]"),
    "a dtype that is a list": array(dtype=["float32"]),
    "a dtype with code": array(dtype="__import__('os').system('true')"),
    "shape below zero": array(shape=[-2, 3]),
    "shape of floats": array(shape=[2.0, 3.0]),
    "shape of truths": array(shape=[True, True]),
    "shape of text": array(shape="23"),
    "a bomb": array(shape=[HUGE], parts=[box([0], [HUGE], 0)]),
    "a bomb of zero sides": array(shape=[0, HUGE, HUGE], parts=[box([0, 0, 0], [0, HUGE, HUGE])]),
    "a bomb without parts": array(shape=[HUGE], parts=[]),
    "overflow": array(shape=[1 << 61, 8], parts=[]),
    "beyond 64 bits": array(shape=[1 << 70], parts=[]),
    "too many dims": array(shape=[1] * 33, parts=[box([0] * 33, [1] * 33, 0)]),
    "overlap": array(parts=[box([0, 0], [1, 3], ZEROS), box([0, 0], [1, 3], ZEROS)], data=bytes(24)),
    "beyond the array": array(parts=[box([1, 0], [2, 3], 0)]),
    "a hole": array(parts=[box([0, 0], [1, 3], ZEROS)], data=bytes(12)),
    "an L of parts": array(parts=[box([0, 0], [1, 3], ZEROS), box([1, 0], [1, 2], 0), box([1, 2], [1, 1], 0)]),
    "a part of other dims": array(parts=[box([0], [6], 0)]),
    "no checksum": array(parts=[box([0, 0], [2, 3])]),
    "two checksums": array(parts=[box([0, 0], [2, 3], 1, 2)]),
    "a wrong checksum": array(parts=[box([0, 0], [2, 3], 1)]),
    "a checksum of text": array(parts=[[[0, 0], [2, 3], ["1"]]]),
    "parts that are none": array(parts=[None]),
    "parts of a number": array(parts=7),
    "a key of floats": array(impl="threefry2x32"),
    "a key nobody knows": sealed(having(entries=[[*KEY[:4], "mine"]]), DATA[24:]),
    "a key of too many words": sealed(having(entries=[[*KEY[:4], "rbg"]]), DATA[24:]),
    "a key without words": sealed(having(entries=[["k", "uint32", [], [box([], [], 0)], "rbg"]]), DATA[:4]),
    "a length beyond the file": HEAD + struct.pack("<Q32s8s", 1 << 63, b"", END),
    "only the head": HEAD,
    "a pickle": pickle.dumps({"w": 1}),
    "a pickle in a manifest": sealed(pickle.dumps({"w": 1})),
    "nothing at all": b"",
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_made_to_harm_is_refused_before_it_can(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(CASES[case])
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(checkpoint.CorruptError, match="damaged") as caught:
        checkpoint.load(path)
    assert time.perf_counter() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
    assert len(str(caught.value)) < 2000
    assert str(path) in str(caught.value)


def test_the_file_that_the_others_differ_from_is_sound(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(sealed(MANIFEST))
    loaded = checkpoint.load(tmp_path / "x.ckpt")
    assert loaded["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (loaded["n"], loaded["f"], loaded["c"]) == (4, 1.5, 1 + 1j)


def test_names_are_names_and_no_paths(tmp_path: Path) -> None:
    names = ["../up", "/etc/passwd", "a\0b", "...", "__class__/x", "\ud800"]
    (tmp_path / "x.ckpt").write_bytes(sealed(having(entries=[[name, "int", "1"] for name in names]), b""))
    assert set(checkpoint.peek(tmp_path / "x.ckpt")["entries"]) == set(names)
    checkpoint.load(tmp_path / "x.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    (tmp_path / "y.ckpt").write_bytes(sealed(having(entries=[["a", "int", "1"], ["a/b", "int", "1"]]), b""))
    with pytest.raises(BatisteError, match="the beginning of another's at a/b"):
        checkpoint.load(tmp_path / "y.ckpt")


def test_a_link_to_itself_and_a_folder_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "loop.ckpt").symlink_to(tmp_path / "loop.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for name in ("loop.ckpt", "folder.ckpt"):
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(tmp_path / name)


STRANGE = (
    None,
    True,
    -1,
    0,
    1 << 30,
    1 << 65,
    1.5,
    "",
    "x",
    "0x1p+0",
    [],
    [[]],
    {},
    [0],
    [2, 3],
    "float32",
    "uint32",
    "int",
)


def mutated(tree: Any, rng: random.Random) -> Any:
    """The manifest with one part of it, somewhere, replaced, dropped, doubled or moved."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return tree
        key = rng.choice(keys)
        if isinstance(node[key], list | dict) and rng.random() < 0.8:
            node = node[key]
            continue
        kind = rng.choice(("replace", "replace", "drop", "double", "move"))
        if kind == "replace":
            node[key] = rng.choice(STRANGE)
        elif kind == "drop":
            del node[key]
        elif kind == "double" and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
        elif kind == "move":
            other = rng.choice(keys)
            node[key], node[other] = node[other], node[key]
        return tree


def test_generated_manifests_load_or_are_refused(tmp_path: Path) -> None:
    rng, path = random.Random(6), tmp_path / "x.ckpt"
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000 if LONG else 500):
        manifest = MANIFEST
        for _ in range(rng.randint(1, 3)):
            manifest = mutated(manifest, rng)
        path.write_bytes(sealed(manifest))
        try:
            checkpoint.load(path)
        except BatisteError:
            refused += 1
    assert refused > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
