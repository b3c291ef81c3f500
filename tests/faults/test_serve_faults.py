# SPDX-License-Identifier: Apache-2.0
"""Faults of serving, in a real process on loopback: mangled requests, poison, ten times the load, signals."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from batiste.serve import Batcher

LONG = os.environ.get("BATISTE_FAULTS") == "long"
SERVE = Path(__file__).parent.parent / "serve"
ROOT = str(SERVE.parent.parent).encode()


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"serve_{name}", SERVE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub, processes = loaded("stub"), loaded("conftest")
ROW = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
PATH = "/v2/models/double/infer"


def started(seconds: float = 0.0) -> Any:
    return processes.running(sys.executable, SERVE / "stub.py", "PORT", seconds)


def mangled(chance: random.Random) -> bytes:
    """A request with a few bytes changed, cut, doubled or put in."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(ROW)}\r\n\r\n"
    data = bytearray(head.encode() + ROW)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[place] = chance.randrange(256)
            case 1:
                del data[place : place + chance.randint(1, 20)]
            case 2:
                data[place:place] = data[place : place + chance.randint(1, 30)]
            case 3:
                data[place:place] = chance.choice([b"\r\n", b"\0", b"[", b"{", b"1e999", b"-1", b"\xff" * 9])
            case _:
                del data[place:]
        if not data:
            break
    return bytes(data)


def test_mangled_requests_crash_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    count, chance = 10_000 if LONG else 200, random.Random(1)
    statuses: Counter[bytes] = Counter()
    with started() as server:
        before = server.rss()

        def some(requests: list[bytes]) -> None:
            for request in requests:
                # the end of what is sent: a request that was cut is over then
                answer = server.raw(request.replace(b"Host: x", b"Host: x\r\nConnection: close"), 0.25)
                statuses[answer[9:12] or b"closed"] += 1
                assert b"Traceback" not in answer and ROOT not in answer

        requests = [mangled(chance) for _ in range(count)]
        threads = [threading.Thread(target=some, args=(requests[i::8],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.infer([[1.0] * 4])[0] == 200
        grown = server.rss() - before
    assert statuses.total() == count
    assert not [status for status in statuses if status.startswith(b"5")], statuses
    assert grown < 32
    print(f"SV1: {count} mangled requests: {dict(statuses)}, {grown:.1f} MiB more")


@pytest.mark.parametrize("bad", [stub.POISON, stub.NAN, stub.HANG])
def test_no_healthy_request_is_lost_to_a_poisoned_one(bad: float) -> None:
    count, chance = (330 if bad != stub.HANG else 20) if LONG else 10 if bad != stub.HANG else 2, random.Random(2)
    batcher = Batcher(stub.model(), linger=0.02, patience=0.25)
    for _ in range(count):
        place = chance.randrange(4)
        rows = [{"x": np.full((1, 4), bad if i == place else i, np.float32)} for i in range(4)]
        items = [batcher.submit(row, 30) for row in rows]
        for i, (row, item) in enumerate(zip(rows, items)):
            if i == place:
                assert item.future.exception(20) is not None
            else:
                np.testing.assert_array_equal(item.future.result(20)["y"], 2 * row["x"])
    batcher.close()


class Seen(NamedTuple):
    """What became of a load: statuses, seconds of the answered, refusals without advice, answers and asks a second."""

    statuses: Counter[int]
    took: list[float]
    without: int
    rate: float
    offered: float


async def load(port: int, rate: float, seconds: float) -> Seen:
    """Requests at a rate that does not wait for answers."""
    statuses: Counter[int] = Counter()
    took: list[float] = []
    without = 0
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=5) as client:

        async def one() -> None:
            nonlocal without
            start = time.monotonic()
            with contextlib.suppress(httpx.TransportError):
                answer = await client.post(PATH, content=ROW)
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    took.append(time.monotonic() - start)
                elif "retry-after" not in answer.headers:
                    without += 1
                return
            statuses[0] += 1

        tasks, start = [], time.monotonic()
        for i in range(int(rate * seconds)):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(max(start + (i + 1) / rate - time.monotonic(), 0))
        offered = len(tasks) / (time.monotonic() - start)
        await asyncio.gather(*tasks)
        elapsed = time.monotonic() - start
    return Seen(statuses, took, without, statuses[200] / elapsed, offered)


def answered_within(server: Any, seconds: str) -> tuple[float, float]:
    """Of the requests that got an answer: in so many seconds by the server's clock, and all."""
    text = server.ask("GET", "/metrics")[2].decode()
    found = re.findall(r'batiste_request_seconds_bucket\{le="([^"]*)",route="infer",status="200"\} (\S+)', text)
    counts = {edge: float(count) for edge, count in found}
    return counts[seconds], counts["+Inf"]


def test_ten_times_the_load_is_answered_as_well_as_once_the_load() -> None:
    seconds, most = (20.0 if LONG else 3.0), 20  # so slow that the clients can indeed ask ten times as often
    with started(0.2) as server:  # at most 20 rows in a second
        peak = asyncio.run(load(server.port, most, seconds)).rate
        before = server.rss()
        for times in (2, 5, 10) if LONG else (10,):
            statuses, took, without, rate, offered = asyncio.run(load(server.port, times * most, seconds))
            assert offered > 0.8 * times * most
            print(f"SV5: {offered / most:.1f} x: goodput {rate / peak:.2f} of {peak:.1f}/s, {np.median(took):.2f} s,"
                  f" 99 % {np.quantile(took, 0.99):.2f} s, {dict(statuses)}")  # fmt: skip
            assert set(statuses) <= {200, 429, 503} and not without
            assert rate >= (0.9 if LONG else 0.6) * peak  # three seconds hold few batches
        in_time, all_ = answered_within(server, "1.0")
        assert in_time >= 0.99 * all_
        assert server.rss() - before < 32
        start = time.monotonic()
        assert server.infer([[1.0] * 4])[0] == 200
        assert time.monotonic() - start < 1


def test_sigterm_under_load_loses_nothing_that_was_accepted() -> None:
    for round_ in range(50 if LONG else 1):
        with started(0.02) as server:
            accepted: list[int] = []
            turned_away: list[float] = []

            def ask(server: Any = server, accepted: Any = accepted, turned_away: Any = turned_away) -> None:
                while True:
                    try:
                        accepted.append(server.infer([[1.0] * 4])[0])
                    except ConnectionError:  # the port was closing before anything of the request had been read
                        turned_away.append(time.monotonic())
                        return

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            time.sleep(0.2 + 0.01 * (round_ % 7))
            signalled = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(15) == 0
            for thread in threads:
                thread.join()
            assert min(turned_away) - signalled > 0.2, "first the clients were told: 503, and readyz"
            assert set(accepted) <= {200, 503} and accepted.count(200) > 3, Counter(accepted)
