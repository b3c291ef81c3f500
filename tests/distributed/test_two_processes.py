# SPDX-License-Identifier: Apache-2.0
"""Two processes of four CPU devices: batches and barriers; a run that loses one goes on with another number of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
LAUNCH = (sys.executable, "-m", "batiste.distributed", "launch", "--grace", "1", "--devices")


def run(program: str, *args: object, processes: int = 2, devices: int = 4) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, str(devices), "-n", str(processes), str(HERE / program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def losses(ended: subprocess.CompletedProcess[str], process: int = 0) -> dict[int, float]:
    found = re.findall(rf"^\[{process}\] step (\d+) loss (\S+)$", ended.stdout, re.M)
    return {int(step): float(loss) for step, loss in found}


def test_rows_batches_and_barriers_of_two_processes() -> None:
    ended = run("check_world.py")
    assert ended.returncode == 0, ended.stderr
    seen = [json.loads(text) for text in sorted(re.findall(r"^\[\d\] (\{.*)$", ended.stdout, re.M))]
    first, second = sorted(seen, key=lambda seen: seen["world"])
    total = float(np.sum(np.arange(32.0) ** 2))
    assert [first["world"], second["world"]] == [[0, 2], [1, 2]]
    assert first["again"] and second["again"]
    assert [first["data"], second["data"]] == [[0, 8, 16, total], [8, 16, 16, total]]
    assert first["tensor"] == second["tensor"] == [0, 16, 16, total], "both need all rows"
    assert [first["even"], second["even"]] == [0, 8]
    missing, text = first["barrier"]
    assert missing == [1]
    assert text.startswith("the barrier 'lunch' was given up after 0.5 s: process 1 of 2 did not come.\n  Fix: look at")


def test_a_run_that_lost_a_process_goes_on_with_another_number_of_them(tmp_path: Path) -> None:
    whole = run("train_mlp.py", tmp_path / "whole", "--save-every", 99, processes=1, devices=8)
    assert whole.returncode == 0, whole.stderr
    expected = losses(whole)
    assert list(expected) == [1, 2, 3, 4, 5, 6]

    lost = run("train_mlp.py", tmp_path / "lost", "--die-at", 5)
    assert lost.returncode == 137, lost.stderr
    assert list(losses(lost)) == [1, 2, 3, 4]
    assert losses(lost) == losses(lost, 1)
    assert sorted(path.name for path in (tmp_path / "lost").iterdir()) == ["step-2", "step-4"]

    for processes in (1, 2):
        resumed = run("train_mlp.py", tmp_path / "lost", "--save-every", 99, processes=processes)
        assert resumed.returncode == 0, resumed.stderr
        both = {**losses(lost), **losses(resumed)}
        assert list(losses(resumed)) == [5, 6]
        assert both == pytest.approx(expected, rel=1e-5)
