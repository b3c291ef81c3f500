# SPDX-License-Identifier: Apache-2.0
"""Nothing that is read can run code: the package has no call that could, and no file of a stranger leaves a trace."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from batiste import checkpoint
from batiste.graph.errors import BatisteError

PACKAGE = Path(__file__).parents[2] / "batiste"
LOADERS = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
RUNS = {"eval", "exec", "compile", "__import__"}
SYSTEM = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.load", "runpy.run_path", "runpy.run_module"}
KNOWN = {
    ("as_flax.py", "exec"): "the user's own program, named on the command line",
    ("as_flax.py", "compile"): "the same",
}


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls that run, or may run, what they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        module, _, method = name.rpartition(".")
        if name in RUNS | SYSTEM or (module in LOADERS and method in ("load", "loads", "Unpickler")):
            yield name
        if (module and method in ("extract", "extractall")) or name == "Unpickler":
            yield name
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "shell") and getattr(keyword.value, "value", True) is not False:
                yield f"{name}({keyword.arg}=)"


def test_the_package_has_no_call_that_runs_what_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = {(str(path.relative_to(PACKAGE)), name) for path in files for name in dangers(ast.parse(path.read_text()))}
    assert len(files) > 100
    assert found == set(KNOWN)


def test_the_search_finds_what_it_is_for() -> None:
    code = """
pickle.loads(x); marshal.load(f); eval(x); exec(x); os.system(x); yaml.load(f); np.load(f, allow_pickle=True)
subprocess.run(x, shell=True); archive.extractall(); torch.load(f); pickle.Unpickler(f).load()
np.load(f, allow_pickle=False); re.compile(x); model.eval()
"""
    assert len(list(dangers(ast.parse(code)))) == 11


# ---------------------------------------------------------------- canaries


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def archive(names: list[str], content: bytes, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            for name in names:
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def objects(canary: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return out.getvalue()


def canaries(canary: Path) -> dict[str, bytes]:
    """Contents of files that would make a file, were they trusted."""
    code = f"open({str(canary)!r}, 'w')"
    pickles = {f"pickle {protocol}": pickle.dumps(Canary(canary), protocol) for protocol in range(6)}
    climbing = ["../canary", str(canary), "a/../../canary", "canary"]
    head = json.dumps({"__metadata__": {"code": code}, "w": {"dtype": code, "shape": [1], "data_offsets": [0, 4]}})
    return {
        **pickles,
        "npy of objects": objects(canary),
        "npz of objects": archive(["w.npy"], objects(canary), "zip"),
        "zip that climbs": archive(climbing, b"x", "zip"),
        "tar that climbs": archive(climbing, b"x", "tar"),
        "zip with a pickle": archive(["archive/data.pkl"], pickles["pickle 2"], "zip"),
        "program": f"#!/bin/sh\ntouch {canary}\n".encode(),
        "python": code.encode(),
        "configuration": json.dumps({"class_name": "Lambda", "config": {"function": code}}).encode(),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']".encode(),
        "safetensors": len(head).to_bytes(8, "little") + head.encode() + bytes(4),
        "msgpack with a pickle": b"\x81\xa1w\xc7" + bytes([len(pickles["pickle 4"]), 1]) + pickles["pickle 4"],
    }


SUFFIXES = (".ckpt", ".safetensors", ".npz", ".msgpack", "")


@pytest.mark.parametrize("suffix", SUFFIXES, ids=lambda suffix: suffix or "none")
def test_no_canary_sings(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    tried = canaries(tmp_path / "canary")
    for name, content in tried.items():
        path = folder / f"{name}{suffix}"
        path.write_bytes(content)
        for read in (checkpoint.load, checkpoint.verify, checkpoint.peek, checkpoint.load_weights):
            try:
                read(path)
            except (BatisteError, OSError, ImportError):
                continue
    assert len(tried) * len(SUFFIXES) >= 40
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*canary*")) == []


def test_a_manifest_names_no_path_and_a_link_is_only_read(tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "run"
    secret.write_text("of another")
    target.mkdir()
    os.symlink(secret, target / "0000000003.ckpt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.Manager(target).restore_latest()
    checkpoint.save(target / "0000000003.ckpt", {"../../secret": np.ones(1)})
    assert secret.read_text() == "of another", "a save replaces a link, not what it leads to"
    assert checkpoint.load(target / "0000000003.ckpt")[".."]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "secret"]
