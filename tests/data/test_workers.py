# SPDX-License-Identifier: Apache-2.0
"""Worker processes: the same batches as without, and every fault named with its record, within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from batiste.data import DataError, DataTimeout, Loader, SlowDataWarning, WorkerError, prefetch
from batiste.graph.errors import ArgumentError
from tests.data.records import Squares, noisy, opened


def test_the_batches_do_not_depend_on_the_workers_before_and_after_a_restore() -> None:
    alone = list(Loader(Squares(), 5, record=noisy).feed(epochs=2))
    with Loader(Squares(), 5, record=noisy, workers=2).feed(epochs=2) as feed:
        some = [next(feed) for _ in range(3)]
        position = feed.state()
        more = [next(feed) for _ in range(2)]
        feed.restore(position)
        rest = list(feed)
    jax.tree.map(np.testing.assert_array_equal, alone, some + rest)
    jax.tree.map(np.testing.assert_array_equal, alone[3:5], more)


def test_the_workers_stay_for_the_next_epoch() -> None:
    loader = Loader(Squares(), 8, workers=1)
    assert len(list(loader)) == 3
    (workers,) = loader.idle
    process = workers.workers[0].process
    assert len(list(loader)) == 3
    assert loader.idle == [workers]
    assert process.is_alive()
    del loader
    assert not process.is_alive()


RECORDS = (3, 8, 13, 19) if os.environ.get("BATISTE_FAULTS") == "long" else (3,)


@pytest.mark.parametrize("bad", RECORDS)
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", DataError, "OSError: the image is truncated at record {}, epoch 0, batch {}"),
        ("killed", WorkerError, "was killed by SIGKILL at record {}, worker 0"),
        ("exit", WorkerError, "ended with exit code 3 at record {}, worker 0"),
        ("hang", DataTimeout, "takes too long at record {}, worker 0: got 1.. s, expected at most 1.0 s"),
    ],
)
def test_a_fault_is_named_with_its_record_within_seconds(
    how: str, error: type[Exception], message: str, bad: int
) -> None:
    loader = Loader(Squares(bad=bad, how=how), 2, shuffle=False, workers=1, timeout=1.0)
    with prefetch(loader.feed()) as feed:
        next(feed)
        since = time.monotonic()
        with pytest.raises(error, match=message.format(bad, bad // 2)) as raised:
            list(feed)
    assert time.monotonic() - since < 5
    assert raised.value.record == bad  # pyright: ignore[reportAttributeAccessIssue]
    assert any(f"epoch': 0, 'step': {bad // 2}" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("bad", RECORDS)
def test_a_slow_record_is_named_in_a_warning_and_waited_for(bad: int) -> None:
    loader = Loader(Squares(bad=bad, how="slow"), 2, shuffle=False, workers=1, slow=0.2)
    with (
        pytest.warns(SlowDataWarning, match=rf"worker 0 has been reading record {bad} for 0\.\d s"),
        loader.feed() as feed,
    ):
        assert len([next(feed) for _ in range(bad // 2 + 2)]) == bad // 2 + 2


def test_what_cannot_be_sent_to_a_worker_is_explained() -> None:
    feed = Loader(Squares(), 4, record=lambda record, rng: record, workers=1).feed()
    with pytest.raises(ArgumentError, match=r"Fix: define what reads the records at the top level of a module"):
        next(feed)


def test_a_batch_that_cannot_be_sent_is_explained() -> None:
    feed = Loader(Squares(), 4, record=opened, workers=1).feed()
    with pytest.raises(DataError, match=r"cannot pickle '_thread.lock' object"):
        next(feed)


PROGRAM = """
import os, signal
from batiste.data import Loader
from tests.data.records import Squares

if __name__ == "__main__":
    feed = Loader(Squares(bad=12, how="hang"), 4, shuffle=False, workers=1).feed()
    next(feed)
    print(feed._workers.workers[0].process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, env=env, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stderr == "", "reading until the worker's end of stderr shows that it has ended"


def test_a_feed_that_is_dropped_takes_its_workers_with_it() -> None:
    feed: Any = Loader(Squares(), 4, workers=1).feed()
    next(feed)
    process = feed._workers.workers[0].process
    assert process.is_alive()
    del feed
    assert not process.is_alive()
