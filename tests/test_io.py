# SPDX-License-Identifier: Apache-2.0
"""Files by the operating system, and what the other mode needs."""

from __future__ import annotations

import sys

import pytest

from batiste import io
from batiste.errors import AlreadyExistsError


def test_directories_and_files(tmp_path) -> None:
    for _ in range(2):
        io.makedirs(tmp_path / "a" / "b")
    with io.GFile(tmp_path / "a" / "f.txt", "w") as file:
        file.write("four")
    assert sorted(io.listdir(tmp_path / "a")) == ["b", "f.txt"]
    assert io.isdir(tmp_path / "a" / "b") and not io.isdir(tmp_path / "a" / "f.txt")
    assert io.exists(tmp_path / "a" / "f.txt") and not io.exists(tmp_path / "c")
    assert io.getsize(tmp_path / "a" / "f.txt") == 4
    assert io.glob(str(tmp_path / "a" / "*.txt")) == [str(tmp_path / "a" / "f.txt")]
    io.remove(tmp_path / "a" / "f.txt")
    io.rmtree(tmp_path / "a")
    assert io.listdir(tmp_path) == []


@pytest.mark.parametrize("move", [io.copy, io.rename])
def test_what_is_there_is_overwritten_on_request_only(move, tmp_path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with pytest.raises(AlreadyExistsError, match="Trying overwrite an existing file"):
        move(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    move(tmp_path / "new", tmp_path / "old", overwrite=True)
    assert (tmp_path / "old").read_text() == "new"
    assert (tmp_path / "new").exists() == (move is io.copy)
    with pytest.raises(io.NotFoundError):
        move(tmp_path / "none", tmp_path / "other")


def test_the_mode_tf_needs_tensorflow(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with io.override_mode(io.BackendMode.TF), pytest.raises(ImportError, match="tensorflow"):
        io.exists(tmp_path)
    assert io.io_mode is io.BackendMode.DEFAULT and io.exists(tmp_path)
