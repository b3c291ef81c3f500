# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own: the same answers, deaths of all kinds, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from batiste.graph.errors import ArgumentError
from batiste.serve import Batcher, Refusal, Servable
from batiste.serve import apart as module
from batiste.serve.apart import Apart
from batiste.serve.errors import Died
from batiste.serve.region import Region, nameless

from .conftest import HERE, Running, running
from .stub import FATAL, HANG, POISON
from .stub import model as stub
from .test_batcher import rows, status
from .test_process import request


def apart(**options: Any) -> Servable:
    sys.path.insert(0, str(HERE))  # where the process finds the stub
    try:
        return Servable.in_process("stub:model", **options)
    finally:
        sys.path.remove(str(HERE))


def engine(batcher: Batcher) -> Apart:
    assert batcher.servable.apart is not None
    return batcher.servable.apart


def pid(batcher: Batcher) -> int:
    return engine(batcher).wait().process.pid


def is_gone(process: int, seconds: float = 5.0) -> bool:
    """Whether there is no such process, or soon none: one that nobody has buried counts as gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if " Z " in Path(f"/proc/{process}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def batcher() -> Iterator[Batcher]:
    made = Batcher(apart(), linger=0.02, patience=0.5)
    made.warm()
    yield made
    process = pid(made)
    made.close(5)
    assert is_gone(process)


@pytest.fixture
def server() -> Iterator[Running]:
    with running(sys.executable, HERE / "stub.py", "PORT", "0.02", "process") as started:
        yield started


def children(server: Running) -> list[str]:
    """The process ids of all that it started, whichever of its threads did."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def test_arrays_go_through_shared_memory_as_they_are() -> None:
    region = Region(nameless())
    other = Region(os.dup(region.file))
    given = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3), "none": np.zeros((0, 3), np.int8), "one": np.bool_(True),
    }  # fmt: skip
    for size in (1, 5000):  # it grows
        given["large"] = np.arange(size)
        layout, _ = region.put(given)
        for name, x in other.get(json.loads(json.dumps(layout))).items():
            np.testing.assert_array_equal(x, given[name])
            assert x.dtype == given[name].dtype
    with pytest.raises((ValueError, TypeError)):
        other.get({"x": ("float32", [1 << 30], 0)})
    region.close()
    other.close()


def test_answers_are_those_of_the_same_process(batcher: Batcher) -> None:
    random, here = np.random.default_rng(0), Batcher(stub(), linger=0.02)
    given = [{"x": random.normal(size=(1 + i % 4, 4)).astype(np.float32)} for i in range(40)]
    for there, item in [(batcher.submit(x, 10), here.submit(x, 10)) for x in given]:
        np.testing.assert_array_equal(there.future.result(10)["y"], item.future.result(10)["y"])
    bad = [batcher.submit(rows(POISON if i == 2 else i), 5) for i in range(4)]
    assert [status(item) for item in bad] == [200, 200, 500, 200], "a model that raises is not dead"
    assert engine(batcher).deaths == 0 and batcher.up and not batcher.back
    here.close()


def test_a_row_that_kills_is_found_and_refused_and_its_neighbours_are_answered(batcher: Batcher) -> None:
    deaths = engine(batcher).deaths
    fatal = next(iter(FATAL))
    spoilt = {"x": np.array([[1.0] * 4, [fatal] * 4], np.float32)}
    first = [batcher.submit(rows(3.0, 2), 20), batcher.submit(spoilt, 20)]
    assert [status(item) for item in first] == [503, 503]
    told = first[0].future.exception()
    assert isinstance(told, Refusal) and 0 < (told.after or 0) < 10
    second = [batcher.submit(x, 20) for x in (rows(3.0, 2), spoilt, rows(4.0), spoilt)]
    expected = [200, 503, 200, 422]  # each row alone; who waits is computed afterwards, or refused
    assert [status(item) for item in second] == expected
    for company in (spoilt, {"x": spoilt["x"][1:]}):
        with pytest.raises(Refusal, match="as it did before") as caught:
            batcher.submit(company, 20)
        assert caught.value.status == 422
    assert status(batcher.submit(rows(1.0), 20)) == 200, "its neighbour has been cleared"
    assert engine(batcher).deaths == deaths + 2 and batcher.suspects.convicted == 1


def test_an_engine_that_hangs_is_killed(batcher: Batcher) -> None:
    told: list[str] = []
    engine(batcher).told = told.append
    item, waiting = batcher.submit(rows(HANG, 4), 20), batcher.submit(rows(7.0), 20)
    assert (status(item), status(waiting)) == (503, 200)
    assert told == ["hung"]


def test_nobody_is_admitted_who_could_not_wait_for_the_next_engine(batcher: Batcher) -> None:
    os.kill(pid(batcher), signal.SIGKILL)
    until = time.monotonic() + 5
    while batcher.up and time.monotonic() < until:
        time.sleep(0.001)
    assert batcher.back > 0
    with pytest.raises(Refusal, match="being started again") as caught:
        batcher.submit(rows(1.0), 0.05)
    assert caught.value.status == 503 and "retry-after" in caught.value.headers
    assert status(batcher.submit(rows(1.0), 20)) == 200, "nothing had begun: nothing was lost"


def test_what_cannot_be_started_says_why() -> None:
    with pytest.raises(ArgumentError, match="has no attribute 'modell'"):
        Servable.in_process("tests.serve.stub:modell")
    with pytest.raises(ArgumentError, match="cannot be told to another process"):
        Servable.in_process("tests.serve.stub:model", seconds=object())


class Short:
    """In place of an engine: it loads, and dies while it is warmed."""

    about: ClassVar[dict[str, Any]] = {
        "name": "m", "version": "1", "digest": "", "programs": 0, "buckets": {"n": [1]},
        "inputs": {"x": [["n"], "float32", None]}, "outputs": {"y": [["n"], "float32", None]},
    }  # fmt: skip
    begun: ClassVar[list[float]] = []
    others: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *_: Any):
        self.process, self.over = self, threading.Event()
        self.begun.append(time.monotonic())

    def loaded(self) -> dict[str, Any]:
        return self.about | (self.others.pop(0) if self.others else {})

    def warm(self) -> None:
        raise Died("in the middle of it")

    def wait(self) -> None:
        self.over.wait()

    def stop(self) -> None:
        self.over.set()

    def buried(self) -> str:
        return "SIGSEGV"


def test_an_engine_that_dies_again_and_again_is_started_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Engine", Short)
    monkeypatch.setattr(module, "PAUSE", 0.02)
    monkeypatch.setattr(Short, "begun", [])
    monkeypatch.setattr(Short, "others", [{}, {}, {"buckets": {"n": [2]}}])
    told: list[str] = []
    apart = Apart("a:b", {})
    apart.told = told.append
    apart.wait().stop()
    until = time.monotonic() + 5
    while len(Short.begun) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    waits = np.diff(Short.begun)
    assert (waits[1:] > [0.08, 0.16, 0.32]).all(), waits
    assert not apart.up and set(told) == {"SIGSEGV"} and apart.deaths == len(told) >= 4
    apart.close()
    with pytest.raises(Died, match="closed"):
        apart.run({})


def test_an_engine_that_computes_for_ever_ends_with_its_server(server: Running) -> None:
    (engine,) = map(int, children(server))
    threading.Thread(target=lambda: server.raw(request(HANG)), daemon=True).start()
    time.sleep(0.2)
    server.process.kill()
    server.process.wait(15)
    assert is_gone(engine)
