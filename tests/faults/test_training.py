# SPDX-License-Identifier: Apache-2.0
"""A run that is killed or told to stop, and started again, ends as if nothing had happened: bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.faults.interrupted"]


def start(folder: Path, *args: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*COMMAND, str(folder), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT, env=env)  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), err


def result(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("digest"))


def wait_for(stream: IO[str] | None, line: str) -> None:
    assert stream is not None
    for got in stream:
        if got.strip() == line:
            return
    raise AssertionError(f"the program ended before {line!r}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, lines, err = ended(start(folder))
    assert code == 0, err
    return result(lines), (folder / "metrics.jsonl").read_bytes()


def test_kill_9_loses_nothing_that_was_saved_and_changes_nothing(
    tmp_path: Path, uninterrupted: tuple[str, bytes]
) -> None:
    for step in (10, 26):
        code, _, err = ended(start(tmp_path, "--kill-at", step))
        assert code == -signal.SIGKILL, err
    code, lines, err = ended(start(tmp_path))
    assert code == 0, err
    assert (result(lines), (tmp_path / "metrics.jsonl").read_bytes()) == uninterrupted
    assert lines[0].startswith("seen 1 ")  # after step 21 of 12 an epoch, whose batches are drawn again
    assert next(line for line in lines if line.startswith("step")) == "step 22"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_after_the_step_and_a_second_run_goes_on(
    number: int, code: int, tmp_path: Path, uninterrupted: tuple[str, bytes]
) -> None:
    process = start(tmp_path, "--slow")
    wait_for(process.stdout, "step 9")
    process.send_signal(number)
    got, lines, err = ended(process)
    assert got == code, err
    assert "Traceback" not in err
    last = max(int(line.split()[1]) for line in ["step 9", *lines] if line.startswith("step"))
    got, lines, err = ended(start(tmp_path))
    assert got == 0, err
    assert next(line for line in lines if line.startswith("step")) == f"step {last + 1}"
    assert (result(lines), (tmp_path / "metrics.jsonl").read_bytes()) == uninterrupted


def test_a_second_signal_ends_a_run_that_hangs(tmp_path: Path) -> None:
    process = start(tmp_path, "--stuck-at", 3)
    wait_for(process.stdout, "step 3")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.communicate()
