# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment of a save loses no checkpoint that was acknowledged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LONG = os.environ.get("BATISTE_FAULTS") == "long"
ROOT = Path(__file__).parents[2]


def killed(folder: Path, *args: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.killed", str(folder), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=1200)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    return json.loads(ended.stdout)


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".partial"]


@pytest.mark.parametrize("background", [False, True] if LONG else [False], ids=lambda x: "jax" if x else "forked")
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(background: bool, tmp_path: Path) -> None:
    kills = (30 if background else 200) if LONG else 12
    found = killed(tmp_path, "--kills", kills, "--mib", 8 if LONG else 2, *["--jax"] * background)
    assert (found["lost"], found["unreadable"]) == (0, 0)
    assert found["inside"] >= kills / 2
    assert found["acknowledged"] > 0
    assert len(left_behind(tmp_path)) <= 1, "each process removes what the one before left"
