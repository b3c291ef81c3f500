# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that are kept: used again, never those of somebody else, and never those for another machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.export import Bundle, executables, export, load_bundle
from batiste.graph.errors import ArgumentError

X = np.ones((2, 4), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "bundle"
    export(lambda x: jnp.cumsum(x, 1), {"x": "float32[batch, 4]"}, path, buckets={"batch": (2,)})
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of executables that were written, one for each program that was compiled."""
    names: list[str] = []
    put = executables.Executables.put
    monkeypatch.setattr(
        executables.Executables, "put", lambda self, name, *x: (names.append(name), put(self, name, *x))
    )
    return names


def run(folder: Path, kept: Path) -> Bundle:
    bundle = load_bundle(folder, executables=kept)
    np.testing.assert_allclose(bundle(x=X)["output"], np.cumsum(X, 1))
    return bundle


def test_the_next_start_compiles_nothing(folder: Path, tmp_path: Path, compiled: list[str]) -> None:
    run(folder, tmp_path / "kept")
    bundle = run(folder, tmp_path / "kept")
    assert len(compiled) == 1 and bundle.compile() == bundle.programs == 1
    assert os.stat(tmp_path / "kept").st_mode & 0o777 == 0o700
    assert os.stat(tmp_path / "kept" / "key").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "key", "open key"])
def test_an_executable_that_this_user_did_not_write_is_compiled_again(
    folder: Path, tmp_path: Path, compiled: list[str], damage: str
) -> None:
    kept = tmp_path / "kept"
    run(folder, kept)
    (file,) = kept.glob("*.executable")
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "cut":
        file.write_bytes(content[:40])
    elif damage == "swap":
        sealed = executables.Executables(kept)._seal("another", content[32:])
        file.write_bytes(sealed + content[32:])
    elif damage == "key":
        (kept / "key").write_bytes(b"short")
    else:
        (kept / "key").chmod(0o644)
    run(folder, kept)
    assert len(compiled) == 2
    run(folder, kept)
    assert len(compiled) == 2


def test_a_sealed_executable_of_another_build_is_compiled_again(
    folder: Path, tmp_path: Path, compiled: list[str]
) -> None:
    run(folder, tmp_path)
    (file,) = tmp_path.glob("*.executable")
    content = b"not what XLA writes"
    file.write_bytes(executables.Executables(tmp_path)._seal(file.stem, content) + content)
    run(folder, tmp_path)
    assert len(compiled) == 2


def test_a_folder_that_others_may_write_is_refused(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ArgumentError, match="go-w"):
        load_bundle(folder, executables=tmp_path)


@pytest.mark.parametrize("change", ["flags", "chip", "sizes", "bundle"])
def test_the_name_tells_what_the_executable_depends_on(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"bundle": "a", "program": "p", "room": {"n": 1}}
    before = executables.executable_name(**arguments)
    assert before == executables.executable_name(**arguments)
    if change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    elif change == "chip":
        monkeypatch.setattr(executables, "cpu_features", lambda: "avx1024")
    else:
        arguments |= {"sizes": {"room": {"n": 2}}, "bundle": {"bundle": "b"}}[change]
    assert executables.executable_name(**arguments) != before
    assert jax.devices()[0].platform == "cpu"
