# SPDX-License-Identifier: Apache-2.0
"""`batiste export`, `verify` and `reexport`: what they write, print and end with."""

from __future__ import annotations

from pathlib import Path

import pytest

from batiste.cli import main
from batiste.export import load_bundle

PROGRAM = str(Path(__file__).with_name("to_export.py"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "key").write_bytes(b"a secret of 16 bytes\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bundle_is_written_verified_and_written_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"{PROGRAM}:right", "--out", "bundle", "--key-file", "key"]) == 0
    assert "bundle: (x: float32[batch, 4]) -> (output: float32[batch, 4])" in capsys.readouterr().out
    assert main(["verify", "bundle", "--key-file", "key"]) == 0
    assert "golden outputs agree" in capsys.readouterr().out
    assert main(["reexport", "bundle", "--out", "new", "--key-file", "key"]) == 0
    assert load_bundle("new").verify() == 0

    assert main(["reexport", "bundle", "--out", "newer"]) == 2
    assert "names code to run" in capsys.readouterr().err
    (place / "other").write_bytes(b"another secret, long")
    assert main(["verify", "bundle", "--key-file", "other"]) == 1
    assert "not signed with this key" in capsys.readouterr().err
    assert main(["verify", "bundle", "--key-file", "nothing"]) == 2
    (place / "bundle" / "program.bin").write_bytes(b"changed")
    assert main(["verify", "bundle"]) == 1
    assert "program.bin" in capsys.readouterr().err
    assert main(["reexport", "bundle", "--out", "newest", "--builder", "to_export:model"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify"], "needs a bundle"),
        (["verify", "nowhere"], "There is no bundle"),
        (["export", f"{PROGRAM}:right"], "needs --out"),
        (["export", f"{PROGRAM}:alone", "--out", "b"], "no export"),
        (["export", f"{PROGRAM}:wrong", "--out", "b"], "float33"),
    ],
)
def test_what_is_wrong_with_a_command(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
