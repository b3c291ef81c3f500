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

from batiste.checkpoint import verify

HERE = Path(__file__).parent
LAUNCH = (sys.executable, "-m", "batiste.distributed", "launch", "--grace", "1", "--devices")


def run(program: str, *args: object, processes: int = 2, devices: int = 4) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, str(devices), "-n", str(processes), str(HERE / program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def losses(ended: subprocess.CompletedProcess[str], process: int = 0) -> dict[int, float]:
    found = re.findall(rf"^\[{process}\] step (\d+) loss (\S+)$", ended.stdout, re.M)
    return {int(step): float(loss) for step, loss in found}


def figure(ended: subprocess.CompletedProcess[str]) -> float:
    return float(re.findall(r"^\[0\] evaluation (\S+)$", ended.stdout, re.M)[0])


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

    folder = tmp_path / "lost"
    lost = run("train_mlp.py", folder, "--die-at", 6)
    assert lost.returncode == 137, lost.stderr
    assert list(losses(lost)) == list(losses(lost, 1)) == [1, 2, 3, 4, 5]
    assert losses(lost) == losses(lost, 1)
    names = sorted(path.name.partition("-")[0] for path in folder.glob("*.ckpt*"))
    assert names == ["0000000002.ckpt", "0000000002.ckpt.1", "0000000004.ckpt", "0000000004.ckpt.1"]

    resumed = run("train_mlp.py", folder, processes=1, devices=2)
    assert resumed.returncode == 0, resumed.stderr
    assert list(losses(resumed)) == [5, 6]
    assert {**losses(lost), **losses(resumed)} == pytest.approx(expected, rel=1e-5)
    assert figure(resumed) == pytest.approx(figure(whole), rel=1e-5), "both have all rows, none twice"
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6, 6], "one process writes"
    assert [path.name for path in sorted(folder.glob("*.ckpt"))] == ["0000000004.ckpt", "0000000006.ckpt"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    ended = run("train_mlp.py", tmp_path, "--stop-at", 3, "--save-every", 999, "--steps", 400, devices=2)
    assert ended.returncode == 143, ended.stderr
    first, second = losses(ended), losses(ended, 1)
    assert first == second and 3 <= max(first) < 400
    (path,) = tmp_path.glob("*.ckpt")
    assert verify(path)["step"] == max(first)
