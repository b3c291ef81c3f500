# SPDX-License-Identifier: Apache-2.0
"""The language model of the examples: every switch at once, and wrong arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("--steps", 2, "--batch", 16, "--length", 16, "--features", 16, "--hidden", 16, "--sample", 2)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "lm.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_trains_with_every_switch_and_says_what_came_of_it() -> None:
    switches = ("--plan", "fsdp_tensor", "--tensor", 2, "--precision", "bfloat16", "--remat", "dots", "--accumulate", 2,
                "--parallel", "--kv-heads", 1, "--z-loss", 1e-4, "--run", "unroll", "--require", 1.0)  # fmt: skip
    ended = run(*TINY, *switches)
    assert ended.returncode == 1, ended.stderr
    for words in ("tokens/s", "held-out loss", "perplexity", "sample:", "above the required 1.000"):
        assert words in ended.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch", 7, "--accumulate", 2), "no multiple"),
        (("--text", "nowhere.txt"), "cannot read --text"),
        (("--length", 10**6), "too few"),
        (("--steps", 0), "above zero"),
        ((*TINY, "--heads", 3, "--kv-heads", 3), "the heads do not divide the features"),
    ],
)
def test_wrong_arguments_end_with_2_and_a_reason(args: tuple[object, ...], message: str) -> None:
    ended = run(*args)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
