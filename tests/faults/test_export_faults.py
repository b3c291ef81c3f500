# SPDX-License-Identifier: Apache-2.0
"""Whatever happens while a bundle is written, it is absent or whole; whatever happens to it later, it is noticed.

Nothing of a bundle is parsed before its digest is right: a damaged program would bring down the process. The short tier
draws fewer random faults than the long tier (`make faults`), which also tries them in a process of its own.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batiste.checkpoint import SaveError
from batiste.checkpoint.files import Fs
from batiste.export import Bundle, BundleError, ExportError, export, load_bundle, reexport
from batiste.export.sealed import read_folder, write_folder
from batiste.graph.errors import ArgumentError, BatisteError
from tests.export import builders
from tests.faults.disks import ERRORS, Counted, Crash, Crashing, Forgetful, Refusing

LONG = os.environ.get("BATISTE_FAULTS") == "long"
ROOT = Path(__file__).parents[2]
KEY, OTHER = b"a secret of 16 bytes", b"a secret of others"
FILES = {"program.bin": [b"program", b"me"], "bundle.json": [b"{}"], "weights.safetensors": [bytes(100)]}
TOKENS = np.array([[1, 2, 0]], np.int32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, signed."""
    path = tmp_path_factory.mktemp("whole") / "bundle"
    export(builders.classifier(), {"tokens": "int32[batch, length] < 8"}, path, key=KEY)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


# ---------------------------------------------------------------- while it is written


def write(fs: Fs, folder: Path, ack: Callable[[int], None]) -> None:
    write_folder(fs, folder / "new" / "b", FILES, KEY, lambda part: read_folder(part, KEY, False))
    ack(1)


def found(folder: Path) -> int:
    """1 if the bundle is there; then it is whole."""
    if not (folder / "new" / "b").exists():
        return 0
    _, files = read_folder(folder / "new" / "b", KEY, False)
    assert {name: bytes(content) for name, content in files.items()} == {n: b"".join(c) for n, c in FILES.items()}
    return 1


def finish(folder: Path) -> None:
    """What the next export does: it succeeds, and cleans up."""
    if not found(folder):
        write(Fs(), folder, lambda value: None)
    assert found(folder) == 1


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def operations(folder: Path) -> list[str]:
    fs = Counted()
    folder.mkdir()
    write(fs, folder, lambda value: None)
    return fs.kinds


def test_a_crash_at_any_operation_leaves_nothing_or_all(tmp_path: Path) -> None:
    kinds = operations(tmp_path / "count")
    assert kinds[-2:] == ["rename", "sync_folder"] and kinds.count("sync") == len(FILES) + 2
    for at in range(len(kinds)):
        for late in (False, True):
            folder, acks = tmp_path / f"{at}-{late}", [0]
            folder.mkdir()
            fs = Crashing(at, late)
            with pytest.raises(Crash):
                write(fs, folder, acks.append)
            fs.bury()
            assert acks[-1] <= found(folder)
            if not found(folder):
                finish(folder)
                assert not left_behind(folder)


@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
def test_an_error_of_any_operation_is_one_typed_error(code: int, tmp_path: Path) -> None:
    for at in range(len(operations(tmp_path / "count"))):
        for for_good in (False, True):
            folder, acks = tmp_path / f"{at}-{for_good}", [0]
            folder.mkdir()
            fs = Refusing(at, code, for_good)
            with pytest.raises(SaveError, match=errno.errorcode[code]):
                write(fs, folder, acks.append)
            fs.bury()
            assert acks[-1] <= found(folder)
            assert for_good or not left_behind(folder)
            finish(folder)


def test_a_power_loss_at_any_moment_leaves_what_was_acknowledged(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    fs = Forgetful(disk)
    write(fs, disk, fs.acknowledged)
    assert fs.unsynced(len(fs.journal)) == []
    states = 0
    for upto, after in fs.disks_after_power_loss(tmp_path):
        acked = any(kind == "ack" for kind, *_ in fs.journal[:upto])
        assert acked <= found(after)
        states += 1
    assert states > 100


def test_a_model_that_fails_its_golden_outputs_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        export(lambda x: x / 0 * 0, {"x": "float32[n]"}, tmp_path / "b")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damage


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One change: a bit, a cut, zeros, an insertion, a swap, another file's content."""
    at, length = rng.randrange(len(content)), rng.randrange(1, 64)
    kind = rng.randrange(6)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + bytes(length) + content[at + length :]
    if kind == 3:
        return content[:at] + rng.randbytes(length) + content[at:]
    if kind == 4:
        return content[at:] + content[:at]
    return other


def mutations(folder: Path, count: int, seed: int) -> int:
    """Changes files of a bundle, `count` times; each must be refused before anything is parsed. How many were."""
    rng = random.Random(seed)
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.hmac"}
    refused = 0
    for _ in range(count):
        name, other = rng.sample(sorted(contents), 2)
        changed = mutated(contents[name], contents[other], rng)
        if changed == contents[name]:
            continue
        (folder / name).write_bytes(changed)
        if name == "manifest.json" and _says_the_same(changed, contents[name]):
            load_bundle(folder)
        else:
            with pytest.raises(BundleError):
                load_bundle(folder)(tokens=TOKENS)
        refused += 1
        (folder / name).write_bytes(contents[name])
    return refused


def _says_the_same(changed: bytes, manifest: bytes) -> bool:
    """Whether a change of the manifest is one of white space or case only: without a key, that is no damage."""
    try:
        return json.loads(changed) == json.loads(manifest)
    except (ValueError, RecursionError):
        return False


def test_every_damaged_bundle_is_refused_by_its_digest(folder: Path) -> None:
    count = 3000 if LONG else 300
    assert mutations(folder, count, seed=1) > 0.97 * count
    load_bundle(folder, KEY).verify()


def test_a_damaged_bundle_does_not_bring_down_its_process(folder: Path) -> None:
    program = (
        "import sys, pathlib; from tests.faults.test_export_faults import mutations\n"
        "print(mutations(pathlib.Path(sys.argv[1]), int(sys.argv[2]), seed=2))"
    )
    count = 3000 if LONG else 40
    command = [sys.executable, "-c", program, str(folder), str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0.9 * count


def rehashed(folder: Path) -> bytes:
    """Makes the manifest agree with the files, as somebody would who changed them; the new manifest."""
    files = {
        path.name: [hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size]
        for path in folder.iterdir()
        if not path.name.startswith("manifest")
    }
    manifest = json.dumps({"format": 1, "files": files}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    return manifest


def test_a_bundle_that_was_changed_and_hashed_anew_is_refused_by_its_signature(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(500 if LONG else 100):
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        name = rng.choice([name for name in contents if not name.startswith("manifest")])
        (folder / name).write_bytes(mutated(contents[name], b"evil", rng) + b"!")
        manifest = rehashed(folder)
        forged = rng.choice(["kept", "none", "other key", "empty", "long"])
        if forged == "none":
            (folder / "manifest.hmac").unlink()
        elif forged == "other key":
            theirs = hmac.new(OTHER, b"batiste bundle\0" + manifest, "sha256").hexdigest()
            (folder / "manifest.hmac").write_text(theirs)
        elif forged != "kept":
            (folder / "manifest.hmac").write_text("" if forged == "empty" else "0" * 100)
        with pytest.raises(BundleError, match="signed"):
            load_bundle(folder, KEY)


def test_an_unsigned_bundle_needs_a_word(folder: Path) -> None:
    load_bundle(folder, KEY, allow_unsigned=True)
    (folder / "manifest.hmac").unlink()
    with pytest.raises(BundleError, match="allow_unsigned"):
        load_bundle(folder, KEY)
    load_bundle(folder, KEY, allow_unsigned=True).verify()
    with pytest.raises(ArgumentError, match="short"):
        load_bundle(folder, b"short")


# ---------------------------------------------------------------- made on purpose, and hashed


def test_a_hashed_bundle_of_somebody_is_what_it_says_or_refused(folder: Path) -> None:
    """Without a key anybody can write a bundle: its texts and arrays must not crash the process, nor take memory."""
    rng = random.Random(4)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000 if LONG else 200):
        name = rng.choice(["bundle.json", "weights.safetensors", "golden.safetensors"])
        (folder / name).write_bytes(mutated(contents[name], contents["program.bin"], rng))
        rehashed(folder)
        try:
            bundle = load_bundle(folder)
            if rng.random() < 0.05:
                bundle.verify()
        except BatisteError:
            pass
        (folder / name).write_bytes(contents[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


DEEP = "[" * 100_000 + "]" * 100_000
SHAPES: dict[str, Any] = {
    "a bomb": [[1 << 40], "float32", None],
    "many dims": [[1] * 40, "float32", None],
    "below zero": [[-1], "float32", None],
    "a truth": [[True], "float32", None],
    "a name": [["n"], "float32", None],
    "objects": [[1], "object", None],
    "a text": [[1], "U9", None],
    "no list": "float32[1]",
}
TEXTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"weights: {name}": lambda said, shape=shape: {**said, "weights": {"w": shape}}
        for name, shape in SHAPES.items()
    },
    **{f"golden: {name}": lambda said, shape=shape: {**said, "golden": {"w": shape}} for name, shape in SHAPES.items()},
    "a later format": lambda said: {**said, "format": 2},
    "a format that is text": lambda said: {**said, "format": "1"},
    "one thing more": lambda said: {**said, "extra": 1},
    "one thing less": lambda said: {name: x for name, x in said.items() if name != "labels"},
    "a program elsewhere": lambda said: {**said, "programs": {"../../evil": {}}},
    "an absolute program": lambda said: {**said, "programs": {"/etc/passwd": {}}},
    "no program": lambda said: {**said, "programs": {}},
    "a tokenizer elsewhere": lambda said: {**said, "tokenizer": "../secret"},
    "buckets below zero": lambda said: {**said, "buckets": {"batch": [-1]}},
    "buckets of nothing": lambda said: {**said, "buckets": {"height": [1]}},
    "labels of numbers": lambda said: {**said, "labels": [1]},
    "a list": lambda said: [said],
    "nothing": lambda said: {},
}
RAW: dict[str, bytes] = {
    "deep": DEEP.encode(),
    "no text": b"\xff\xfe",
    "a key twice": b'{"format": 1, "format": 1}',
    "not a number": b'{"format": NaN}',
    "a pickle": pickle.dumps({"w": 1}),
    "empty": b"",
}


@pytest.mark.parametrize("case", [*TEXTS, *RAW])
def test_a_description_made_to_harm_is_refused(case: str, folder: Path) -> None:
    said = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_bytes(RAW[case] if case in RAW else json.dumps(TEXTS[case](said)).encode())
    rehashed(folder)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((BundleError, ArgumentError)):
        load_bundle(folder).verify()
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000


MANIFESTS: dict[str, Any] = {
    "a path": {"../bundle.json": ["0" * 64, 1]},
    "an absolute path": {"/etc/passwd": ["0" * 64, 1]},
    "a hidden file": {".profile": ["0" * 64, 1]},
    "itself": {"manifest.json": ["0" * 64, 1]},
    "nothing": {},
    "no pair": {"bundle.json": "0" * 64},
    "a size below zero": {"bundle.json": ["0" * 64, -1]},
    "a size that is true": {"bundle.json": ["0" * 64, True]},
    "a digest of numbers": {"bundle.json": [0, 1]},
    "a huge size": {"bundle.json": ["0" * 64, 1 << 60]},
    "a list": ["bundle.json"],
    "an encoded path": {"..%2fbundle.json": ["0" * 64, 1]},
    "another system's path": {"..\\bundle.json": ["0" * 64, 1]},
    "a zero byte": {"bundle.json\0": ["0" * 64, 1]},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_made_to_harm_is_refused(case: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": MANIFESTS[case]}))
    with pytest.raises(BundleError):
        load_bundle(folder)


@pytest.mark.parametrize("kind", ["link", "link outside", "folder", "pipe", "sparse", "missing"])
@pytest.mark.parametrize("name", ["manifest.json", "bundle.json", "weights.safetensors", "program.bin"])
def test_a_file_that_is_no_plain_file_is_refused(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind == "link":
        (folder / "copy").write_bytes(content)
        (folder / name).symlink_to("copy")
    elif kind == "link outside":
        (tmp_path / "copy").write_bytes(content)
        (folder / name).symlink_to(tmp_path / "copy")
    elif kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "sparse":
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(BundleError, match=name):
        load_bundle(folder)


def test_a_bundle_larger_than_allowed_is_refused_before_memory_is_taken(folder: Path) -> None:
    with pytest.raises(BundleError, match="max_bytes"):
        load_bundle(folder, max_bytes=1000)


class Canary:
    """Left in a bundle in every way that other formats run code by: it must not sing."""

    def __init__(self, song: Path):
        self.song = song

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.song),))


@pytest.mark.parametrize("name", ["bundle.json", "weights.safetensors", "golden.safetensors"])
def test_no_file_of_a_bundle_is_run(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "song")))
    rehashed(folder)
    with pytest.raises(BundleError):
        load_bundle(folder).verify()
    assert not (tmp_path / "song").exists()


@pytest.mark.parametrize("field", ["builder", "preprocess", "postprocess", "method", "about", "config", "labels"])
def test_no_name_in_a_bundle_is_called(field: str, folder: Path, tmp_path: Path) -> None:
    said = json.loads((folder / "bundle.json").read_text())
    song = str(tmp_path / "song")
    said |= {"builder": "os:mkdir", "config": {"path": song}, "about": {"run": f"os.mkdir({song!r})"}}
    said[field] = {
        "about": said["about"],
        "config": said["config"],
        "labels": [f"__import__('os').mkdir({song!r})"],
    }.get(field, "os:mkdir")
    (folder / "bundle.json").write_text(json.dumps(said))
    rehashed(folder)
    bundle: Bundle = load_bundle(folder)
    bundle.verify()
    with pytest.raises(ArgumentError, match="names code to run"):
        reexport(folder, tmp_path / "new")
    with pytest.raises(BundleError, match="signed"):
        reexport(folder, tmp_path / "new", key=KEY)
    assert not Path(song).exists()
