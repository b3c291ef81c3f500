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
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from batiste import export, nnx
from batiste.serve import Batcher, Servable, Server

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


def started(seconds: float = 0.0, *words: str) -> Any:
    return processes.running(sys.executable, SERVE / "stub.py", "PORT", seconds, *words)


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


class Clients:
    """Connections that are kept, by the bytes: whoever asks ten times as often as can be answered has to be quick."""

    REQUEST = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n\r\n".encode() + ROW

    def __init__(self, port: int):
        self.port, self.idle = port, []

    async def ask(self) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers; the whole answer has been read."""
        own = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = own
        writer.write(self.REQUEST)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        await reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection") == b"close":
            writer.close()
        else:
            self.idle.append(own)
        return int(head[9:12]), headers

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


async def load(port: int, rate: float, seconds: float) -> Seen:
    """Requests at a rate that does not wait for answers."""
    statuses: Counter[int] = Counter()
    took: list[float] = []
    without = 0
    clients = Clients(port)

    async def one() -> None:
        nonlocal without
        start = time.monotonic()
        try:
            status, headers = await asyncio.wait_for(clients.ask(), 5)
        except (OSError, EOFError, TimeoutError):
            statuses[0] += 1
            return
        statuses[status] += 1
        if status == 200:
            took.append(time.monotonic() - start)
        elif b"retry-after" not in headers:
            without += 1

    tasks, start = [], time.monotonic()
    for i in range(int(rate * seconds)):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(max(start + (i + 1) / rate - time.monotonic(), 0))
    offered = len(tasks) / (time.monotonic() - start)
    await asyncio.gather(*tasks)
    elapsed = time.monotonic() - start
    clients.close()
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
        in_time, all_ = answered_within(server, "1.0" if LONG else "2.5")  # a server without a core is late, not wrong
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


# ---------------------------------------------------------------- engines that die
def engine_of(server: Any) -> int:
    """The process id of the one process that the server has started."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    (child,) = [child for task in tasks for child in (task / "children").read_text().split()]
    return int(child)


def is_gone(process: int) -> bool:
    """Whether there is no such process any more, or soon; one that nobody has buried counts as gone."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if " Z " not in Path(f"/proc/{process}/stat").read_text():
                time.sleep(0.01)
                continue
        return True
    return False


def test_an_engine_that_dies_takes_nobody_along_but_those_it_was_computing() -> None:
    kinds: list[Any] = ["kill -9", stub.HANG, *stub.FATAL] if LONG else ["kill -9"]
    told, back, lost = [], [], 0
    with started(0.3, "process") as server:
        for deaths in range(1, 37 if LONG else 2):
            kind = kinds[deaths % len(kinds)]
            rows = [[[float(deaths)] * 4]] * 12  # one is computed, then four of those that wait
            if kind != "kill -9":
                rows[3] = [[kind, *np.random.default_rng(deaths).normal(size=3).tolist()]]
            found: list[Any] = []
            ask = lambda row, found=found: found.append((*server.infer(row)[:2], time.monotonic()))
            threads = [threading.Thread(target=ask, args=(row,)) for row in rows]
            for i, thread in enumerate(threads):
                thread.start()
                time.sleep(0.05 if i == 0 else 0)
            time.sleep(0.4)
            killed = time.monotonic()
            if kind == "kill -9":
                os.kill(engine_of(server), signal.SIGKILL)
                while server.get("/readyz") != 503:
                    assert server.get("/livez") == 200 and time.monotonic() - killed < 5
            for thread in threads:
                thread.join()
            refused = [at for status, headers, at in found if status == 503 and "retry-after" in headers]
            assert {status for status, _, _ in found} <= {200, 503}, found
            assert 1 <= len(refused) == [status for status, _, _ in found].count(503) <= 4, found
            lost += len(refused)
            told += [at - killed for at in refused] if kind == "kill -9" else []  # the others die when they like
            back.append(min(at for status, _, at in found if status == 200 and at > refused[0]) - refused[0])
            assert (server.get("/livez"), server.get("/readyz")) == (200, 200)
        assert max(told) < 1.5 and max(back) < 15  # 1 and 5 on a quiet machine
        text = server.ask("GET", "/metrics")[2].decode()
        assert sum(map(float, re.findall(r"batiste_engine_deaths_total\{.*\} (\S+)", text))) == len(back)
        engine = engine_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0 and is_gone(engine)
    print(f"SV7: {len(back)} deaths: {lost} in flight told 503 in {np.median(told):.3f} s (at most {max(told):.3f});"
          f" the next answer after {np.median(back):.2f} s (at most {max(back):.2f}); nobody else lost")  # fmt: skip


# ---------------------------------------------------------------- sizes, reloads, hours
def bundle(path: Path, seed: int, spec: str = "float32[batch, 4]") -> Path:
    export.export(nnx.Linear(4, 3, rngs=nnx.Rngs(seed)), {"x": spec}, path)
    return path


def asked(x: np.ndarray) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}]}


def test_random_sizes_compile_nothing(tmp_path: Path) -> None:
    count, chance = 10_000 if LONG else 60, random.Random(3)
    buckets = {"batch": (1, 4, 8), "length": (4, 16)}
    path = bundle(tmp_path / "b", 0, "float32[batch, length, 4]")
    server = Server([Servable.of_bundle(path, "net", buckets=buckets, allow_unsigned=True)]).warm()
    client, statuses = TestClient(server.app()), Counter[int]()
    for i in range(count):
        if i == count // 10:
            before = memory()
        x = np.ones((chance.randint(1, 10), chance.randint(1, 18), 4), np.float32)
        status = client.post("/v2/models/net/infer", json=asked(x)).status_code
        assert status == (200 if len(x) <= 8 and x.shape[1] <= 16 else 422)
        statuses[status] += 1
    figures = client.get("/metrics").text
    assert 'batiste_programs{model="net"} 6.0' in figures
    assert 'batiste_programs_after_warming{model="net"} 0.0' in figures
    grown = memory() - before
    assert grown < 64 and len(statuses) == 2
    server.close(1)
    print(f"SV8: {count} requests of random sizes {dict(statuses)}: 6 programs, 0 after warming, {grown:.1f} MiB more")


def memory() -> float:
    """MiB of this process."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def test_reloading_keeps_answering_and_a_bad_bundle_changes_nothing(tmp_path: Path) -> None:
    path, good, bad = tmp_path / "b", 0, 0
    models = [bundle(tmp_path / str(seed), seed) for seed in range(2)]
    shutil.copytree(models[0], path)
    load = partial(Servable.of_bundle, path, "net", buckets={"batch": (1, 4)}, allow_unsigned=True)
    server = Server([load], keys=["k"], admin=True).warm()
    client = TestClient(server.app(), headers={"x-api-key": "k"})
    ask = lambda: client.post("/v2/models/net/infer", json=asked(np.ones((1, 4))))
    statuses, over = Counter[int](), threading.Event()

    def many() -> None:
        while not over.is_set():
            statuses[ask().status_code] += 1

    threads = [threading.Thread(target=many, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert server.reload() == [], "the same digest"
        for round_ in range(10 if LONG else 2):
            before = ask().json()["outputs"]
            shutil.rmtree(path)
            shutil.copytree(models[(round_ + 1) % 2], path)
            assert client.post("/v2/repository/models/net/load").json() == {"changed": ["net"]}
            changed = ask().json()["outputs"]
            assert changed != before
            good += 1
            files = sorted(file for file in path.iterdir() if file.is_file())
            file = files[round_ % len(files)]
            data = bytearray(file.read_bytes())
            data[len(data) * (round_ + 1) // 12] ^= 1
            file.write_bytes(data)
            refused = client.post("/v2/repository/models/net/load")
            assert refused.status_code == 409 and "BundleError" in refused.json()["error"], file
            assert ask().json()["outputs"] == changed
            bad += 1
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200} and statuses.total() > 5
    server.close(1)
    print(f"SV9: {good} reloads and {bad} of damaged bundles, {statuses.total()} requests meanwhile: none failed")


class Held(NamedTuple):
    """What a process holds: MiB of it and of its engine, open files, threads."""

    rss: float
    files: int
    threads: int

    @classmethod
    def by(cls, server: Any) -> Held:
        own = Path(f"/proc/{server.process.pid}")
        return cls(server.rss(), len(list((own / "fd").iterdir())), len(list((own / "task").iterdir())))


async def soak(server: Any, rate: float, seconds: float) -> tuple[Counter[int], list[float], list[Held]]:
    """Healthy requests at a rate; beside them, in turns, mangled ones, clients that go away, poison and reloads."""
    chance, statuses, took, held = random.Random(4), Counter[int](), [], []
    loop, start = asyncio.get_running_loop(), time.monotonic()

    def hostile(i: int) -> None:
        match i % 4:
            case 0:
                server.raw(mangled(chance).replace(b"Host: x", b"Host: x\r\nConnection: close"), 0.25)
            case 1:
                with socket.create_connection(("127.0.0.1", server.port)) as gone:
                    gone.sendall(
                        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n\r\n".encode() + ROW
                    )
            case 2:
                server.infer([[chance.choice([stub.POISON, stub.NAN]), 1.0, 2.0, 3.0]])
            case _:
                if i % 80 == 3:
                    server.process.send_signal(signal.SIGHUP)

    async def others() -> None:
        for i in range(int(4 * seconds)):
            await asyncio.to_thread(hostile, i)
            await asyncio.sleep(max(start + (i + 1) / 4 - time.monotonic(), 0))

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:

        async def one() -> None:
            begun = time.monotonic()
            answer = await client.post(PATH, content=ROW)
            statuses[answer.status_code] += 1
            took.append(time.monotonic() - begun)

        beside, tasks = asyncio.create_task(others()), []
        for i in range(int(rate * seconds)):
            tasks.append(loop.create_task(one()))
            await asyncio.sleep(max(start + (i + 1) / rate - time.monotonic(), 0))
            if i in (int(rate * seconds * part / 10) for part in (2, 5, 9)):
                held.append(Held.by(server))
        await asyncio.gather(beside, *tasks)
    await asyncio.sleep(3 if LONG else 0.2)
    return statuses, took, [*held, Held.by(server)]


def test_a_server_holds_no_more_after_hours_than_after_minutes() -> None:
    seconds = 600.0 if LONG else 1.5
    with started(0.05, *(["process"] if LONG else [])) as server:
        statuses, took, held = asyncio.run(soak(server, 40.0, seconds))
        third = len(took) // 3
        early, late = (float(np.quantile(part, 0.99)) for part in (took[:third], took[-third:]))
        assert server.infer([[1.0] * 4])[0] == 200
    print(f"SV10: {seconds:.0f} s: {dict(statuses)}, 99 % {early:.3f} s early and {late:.3f} s late; {held}")
    assert set(statuses) <= {200, 429, 503, 504} and statuses[200] >= 0.9 * statuses.total()
    assert held[-1].rss - held[0].rss < (8 if LONG else 16)
    assert held[-1].files <= held[0].files + 8 and held[-1].threads <= held[0].threads + 8
