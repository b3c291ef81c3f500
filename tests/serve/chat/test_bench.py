# SPDX-License-Identifier: Apache-2.0
"""The benchmark of slots runs, and its contenders give the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench" / "chat.py"


def test_slots_give_the_answers_of_generate() -> None:
    sizes = ["--model", "tiny", "--slots", "3", "--requests", "2", "--tokens", "4", "--length", "32", "--rounds", "1"]
    ended = subprocess.run([sys.executable, BENCH, *sizes, "--json"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])["chat"]
    assert [row["same"] for row in found.values()] == [2, 2] and all(row["ratio"] > 0 for row in found.values())
