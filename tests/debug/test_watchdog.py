# SPDX-License-Identifier: Apache-2.0
"""The watchdog: stacks of a program that hangs, silence about one that does not."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from batiste.debug import watchdog
from batiste.graph.errors import ArgumentError

HANGS = """
import threading, time
from batiste.debug.watchdog import watchdog

def reader_thread():
    time.sleep(60)

def the_step_that_hangs():
    time.sleep(60)

threading.Thread(target=reader_thread, daemon=True).start()
with watchdog(0.3, exit=True) as dog:
    for _ in range(3):
        dog.beat()
    the_step_that_hangs()
"""


def test_a_hang_is_dumped_with_the_stacks_of_all_threads() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "in the_step_that_hangs" in ended.stderr and "in reader_thread" in ended.stderr


def test_an_inner_watchdog_gives_back_and_beats_keep_it_quiet(tmp_path) -> None:
    with (tmp_path / "stacks").open("w+") as file:
        outer, wait = watchdog(0.3, file=file), threading.Event().wait
        with outer:
            with watchdog(60) as inner:
                wait(0.4)
                inner.beat()
                outer.beat()
            file.seek(0)
            assert file.read() == "", "the inner one has the word"
            for _ in range(4):
                wait(0.1)
                outer.step(None)
            file.seek(0)
            assert file.read() == "", "the beats came in time"
            wait(0.5)
            file.seek(0)
            assert "most recent call first" in file.read()
        hook = watchdog(60, file=file)
        hook.start(None), hook.step(None), hook.end(None)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_it_waits_for_some_time(seconds: float) -> None:
    with pytest.raises(ArgumentError, match="expected seconds > 0"):
        watchdog(seconds)
