# SPDX-License-Identifier: Apache-2.0
"""The classifier of the examples: a few verses, the interval, and wrong arguments."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "sentence_classifier.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_says_how_sure_it_is_and_misses_a_threshold() -> None:
    ended = run("--each", 12, "--steps", 20, "--require", 1.0)
    assert ended.returncode == 1, ended.stderr
    for words in ("72 verses of 6 parts as vectors of 384", "step   20: loss", "95 % interval", "always one part"):
        assert words in ended.stdout
    assert "below the required" in ended.stderr


def test_wrong_arguments_end_with_2_and_a_reason(tmp_path: Path) -> None:
    for args, message in ((("--each", 0), "above zero"), (("--encoder", tmp_path, "--each", 1), "cannot load")):
        ended = run(*args)
        assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr


def test_the_interval_holds_the_accuracy_and_widens_with_like_verses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    interval = importlib.import_module("sentence_classifier").interval
    right, rng = np.arange(400) % 4 > 0, np.random.default_rng(0)
    low, high = interval(right, np.arange(400), rng)
    assert 0.70 < low < 0.75 < high < 0.80
    wide_low, wide_high = interval(np.sort(right), np.arange(400) // 20, rng)
    assert wide_high - wide_low > 2 * (high - low)
