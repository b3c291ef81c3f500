# SPDX-License-Identifier: Apache-2.0
"""A run that is killed or told to stop, and started again, ends as if nothing had happened: bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

LONG = os.environ.get("BATISTE_FAULTS") == "long"
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.faults.interrupted"]


def start(folder: Path, *args: object, devices: int = 1) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
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
    assert lines[0].startswith("seen 1 ")  # after step 14 or 21 of 12 an epoch, whose batches are drawn again
    first = next(line for line in lines if line.startswith("step"))
    assert first in ("step 22", "step 15"), "the save after step 21 may not have been whole yet"


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


VARIANTS = {
    "stateful": [],
    "functional, sync": ["--functional", "--sync"],
    "stateful, sync": ["--sync"],
    "functional": ["--functional"],
    "stateful, 8 devices": ["--workers", 0],
}


@pytest.mark.parametrize("variant", list(VARIANTS) if LONG else ["functional, sync"])
def test_a_run_that_is_killed_again_and_again_is_the_run_that_is_not(variant: str, tmp_path: Path) -> None:
    """20 kills in 400 steps of two epochs; of a run on 8 devices 4, each time with other data workers."""
    spread = "devices" in variant
    kills = (4 if spread else 20) if LONG else 1
    size = ["--steps", 200 if LONG else 12, "--epochs", 2]
    folders = [tmp_path / name for name in ("whole", "killed")]
    options, devices = [*VARIANTS[variant], *size], 8 if spread else 1
    code, lines, err = ended(start(folders[0], *options, devices=devices))
    assert code == 0, err
    rng = random.Random(variant)
    for number, step in enumerate(sorted(rng.sample(range(9, 400 if LONG else 24), kills))):
        others = ["--workers", number % 3] if spread else []
        code, _, err = ended(start(folders[1], *options, *others, "--kill-at", step, devices=devices))
        assert code == -signal.SIGKILL, err
    code, again, err = ended(start(folders[1], *options, devices=devices))
    assert code == 0, err
    assert result(again) == result(lines)
    assert len({(folder / "metrics.jsonl").read_bytes() for folder in folders}) == 1


if LONG:  # minutes each

    @pytest.mark.parametrize("seed", range(10))
    def test_signals_at_any_time_save_the_last_step_that_was_made(seed: int, tmp_path: Path) -> None:
        """Five signals to one run, half of them SIGINT; the first of them while it saves."""
        options = ["--slow", "--sync", "--steps", 40, "--epochs", 2]
        rng, last = random.Random(seed), 0
        for number in range(5):
            process = start(tmp_path, *options)
            sent = signal.SIGTERM if rng.random() < 0.5 else signal.SIGINT
            wait_for(process.stdout, f"step {last // 7 * 7 + 7}" if number == 0 else f"step {last + rng.randint(1, 6)}")
            time.sleep(0 if number == 0 else rng.uniform(0, 0.06))
            process.send_signal(sent)
            since = time.monotonic()
            code, lines, err = ended(process)
            assert code == 128 + sent, err
            assert time.monotonic() - since < 10
            made = [int(line.split()[1]) for line in lines if line.startswith("step")]
            (newest,) = {max(int(path.stem) for path in (tmp_path / "checkpoints").glob("*.ckpt"))}
            assert newest == (made[-1] if made else newest) > last
            last = newest
        code, lines, err = ended(start(tmp_path, *options))
        assert code == 0, err
        code, whole, err = ended(start(tmp_path / "whole", *options))
        assert code == 0, err
        assert result(lines) == result(whole)

    def test_a_supervised_run_that_is_killed_every_20_seconds_makes_its_way(tmp_path: Path) -> None:
        """The supervisor starts the program anew as long as it does not end well; it is killed nine times."""
        options = ["--slow", "--steps", 600, "--epochs", 2]
        began, kills, seen = time.monotonic(), 0, []
        while True:
            process = start(tmp_path / "killed", *options)
            try:
                out, err = process.communicate(timeout=20 if kills < 9 else 300)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                kills += 1
            seen.append([int(line.split()[1]) for line in out.splitlines() if line.startswith("step")])
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, err
        taken = time.monotonic() - began
        code, lines, err = ended(start(tmp_path / "whole", *options))
        assert code == 0, err
        assert result(out.splitlines()) == result(lines)
        again = [before[-1] + 1 - after[0] for before, after in itertools.pairwise(filter(None, seen))]
        assert max(again, default=0) <= 2 * 7, "a save every 7 steps, one of them under way"
        print(f"{kills} kills, {sum(again)} steps made again of {sum(map(len, seen))}, {taken:.0f} s")
