# SPDX-License-Identifier: Apache-2.0
"""Prefetching: on the devices, ahead, with the position of what was handed out; errors where they belong."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from batiste import sharding
from batiste.data import DataTimeout, Loader, SlowDataWarning, feed, prefetch
from batiste.graph.errors import ArgumentError, ShapeError


def test_reading_overlaps_with_the_step() -> None:
    def reading() -> Iterator[int]:
        for i in range(10):
            time.sleep(0.02)
            yield i

    batches, since = prefetch(reading, 2), time.monotonic()
    for _ in batches:
        time.sleep(0.02)
    assert time.monotonic() - since < 0.36, "one after the other it would be 0.4 s"


def test_it_reads_no_further_ahead_than_asked_and_knows_what_was_handed_out() -> None:
    read: list[int] = []

    def reading() -> Iterator[int]:
        for i in range(10):
            read.append(i)
            yield i

    with prefetch(reading, 2) as batches:
        next(batches)
        time.sleep(0.1)
        assert read == [0, 1, 2], "one is handed out, two are ready"
        assert batches.state() == {"epoch": 0, "item": 1}


@pytest.mark.parametrize("n", [0, 2])
def test_it_goes_on_exactly_when_closed_or_restored(n: int) -> None:
    batches = prefetch(Loader(np.arange(12), 2, shuffle=False).feed(), n)
    assert next(batches).tolist() == [0, 1]
    position = batches.state()
    batches.close()
    assert next(batches).tolist() == [2, 3]
    batches.restore(position)
    assert [x[0].item() for x in batches] == [2, 4, 6, 8, 10]


def test_a_loader_stays_what_it_is() -> None:
    loader = prefetch(Loader(np.arange(12), 4), 1)
    assert len(loader) == 3
    first, second = ([x.tolist() for x in loader] for _ in range(2))
    assert first != second
    assert [x.tolist() for x in feed(loader, epochs=2)] == first + second


def test_batches_lie_where_the_plan_says() -> None:
    batch = {"x": np.ones((8, 4), np.float32), "name": np.array(["a"] * 8)}
    plan = sharding.data_parallel()
    for place in (plan, plan.mesh and jax.NamedSharding(plan.mesh, jax.P("data"))):
        found = next(prefetch([{"x": batch["x"]}], 1, place))
        assert found["x"].sharding.spec[0] == "data"
    found = next(prefetch([batch], 1))
    assert isinstance(found["x"], jax.Array)
    assert found["name"] is batch["name"]


def test_with_several_processes_each_passes_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        jax, "process_count", lambda: 2
    )  # all devices are of this process, so its rows are all there are
    found = next(prefetch([{"x": np.arange(16.0, dtype=np.float32)}], 1, sharding.data_parallel()))
    assert found["x"].sharding.spec[0] == "data"
    np.testing.assert_array_equal(found["x"], np.arange(16))


def test_a_batch_that_cannot_be_shared_is_an_error_with_its_position() -> None:
    batches = prefetch(Loader(np.ones((12, 2), np.float32), 8).feed(), 2, sharding.data_parallel())
    next(batches)
    with pytest.raises(ShapeError) as error:
        next(batches)
    assert "'step': 1" in error.value.__notes__[0]


def test_errors_come_in_their_place_with_the_position() -> None:
    def reading() -> Iterator[int]:
        yield from range(3)
        raise OSError("no such record")

    batches = prefetch(reading, 2)
    assert [next(batches).item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no such record") as error:
        next(batches)
    assert error.value.__notes__ == ["while reading the batch behind position {'epoch': 0, 'item': 3}"]


def test_a_source_that_hangs_is_reported() -> None:
    going_on = threading.Event()

    def reading() -> Iterator[int]:
        yield 0
        going_on.wait()

    batches = prefetch(reading, 1, slow=0.2, timeout=0.6)
    next(batches)
    with (
        pytest.warns(SlowDataWarning, match=r"no batch for 0\.\d s behind position"),
        pytest.raises(DataTimeout, match=r"No batch comes at position .*'item': 1"),
    ):
        next(batches)
    going_on.set()


def test_a_feed_that_is_dropped_ends_its_thread() -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "batiste-prefetch"}

    before, batches = threads(), prefetch([1, 2, 3, 4, 5], 1)
    next(batches)
    (thread,) = threads() - before
    del batches
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ArgumentError, match="got -1, expected 0 or more"):
        prefetch([1], -1)


LEFT = """
import itertools
import jax
import numpy as np
from batiste.data import prefetch

product = jax.jit(lambda x: x @ x.T)

def put(batch):
    for _ in range(100):
        batch = np.asarray(product(batch))
    return batch

for batch in prefetch((np.ones((64, 64), np.float32) for _ in itertools.count()), place=put):
    break
"""


def test_a_program_that_ends_while_batches_are_put_on_the_devices() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
