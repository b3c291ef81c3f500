# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in production, many times over: mangled requests, clients that leave, too many of them at once.

BATISTE_FAULTS=long takes the counts of the long tier.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time

import httpx
import numpy as np

from batiste.serve.chat.engine import Engine, Refused
from batiste.serve.chat.sampling import Sampling

LONG = os.environ.get("BATISTE_FAULTS") == "long"
TYPE = "content-type: application/json\r\n"
HELLO = [{"role": "user", "content": "Hello!"}]
ENDLESS = {"255": -100, "253": -100}
GOOD = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 1,
        "stop": ["x"], "stream": False, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}}  # fmt: skip


def resident() -> float:
    """MiB of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def free(engine: Engine) -> bool:
    until = time.monotonic() + 10
    while (engine.figures.live or engine.figures.waiting) and time.monotonic() < until:
        time.sleep(0.01)
    return not engine.figures.live


def raw(address: str, data: bytes) -> bytes:
    """What a server says to these bytes: an answer, or nothing where it closes or waits for more."""
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port or 80), timeout=0.3) as connection:
        try:
            connection.sendall(data)
            return connection.recv(4096)
        except OSError:
            return b""


def mangled(random: np.random.Generator) -> bytes:
    """A good request with some of its bytes, or some of its values, changed."""
    kind = random.integers(4)
    body: dict = dict(GOOD)
    values = [None, True, -1, 0, 2**63, 1e308, "", "x" * 3000, [], {}, [[]], {"a": {}}, "\ud800", 0.1, "\0", -0.0]
    if kind == 0:
        body[str(random.choice(list(body)))] = values[random.integers(len(values))]
    if kind == 1:
        body[str(random.integers(1000))] = values[random.integers(len(values))]
    text = bytearray(json.dumps(body).encode())
    if kind == 2:
        for _ in range(random.integers(1, 6)):
            text[random.integers(len(text))] = random.integers(256)
    if kind == 3:
        del text[random.integers(len(text)) :]
    path = "chat/completions" if random.random() < 0.8 else "completions"
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: x\r\n{TYPE}connection: close\r\n"
    data = bytearray(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
    if random.random() < 0.2:
        for _ in range(random.integers(1, 4)):
            data[random.integers(min(len(data), 150))] = random.integers(256)
    return bytes(data)


def test_mangled_requests_are_never_a_fault_of_the_server(address, api) -> None:
    """No 5xx, no trace of the program, no slot that is kept; the next good request is answered."""
    random, count = np.random.default_rng(0), 10_000 if LONG else 300
    began, codes = resident(), {}
    for _ in range(count):
        data = mangled(random)
        said = raw(address, data)
        code = said[9:12].decode("latin-1") if said.startswith(b"HTTP/1.1 ") else ""
        codes[code] = codes.get(code, 0) + 1
        assert not code.startswith("5"), (data, said)
        assert b"Traceback" not in said and b".py" not in said
    print(codes)
    assert codes["400"] > count / 4 and codes["200"] > 0
    assert free(api.models["tiny"].engine)
    assert httpx.post(f"{address}/chat/completions", json=GOOD, timeout=30).status_code == 200
    assert resident() - began < 16 + 16 * LONG


def test_clients_that_leave_leave_nothing_behind(address, api) -> None:
    engine, count = api.models["tiny"].engine, 1000 if LONG else 40
    handles, threads, before = len(os.listdir("/proc/self/fd")), threading.active_count(), engine.figures
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": True, "logit_bias": ENDLESS}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{TYPE}content-length: {len(body)}"
    url = httpx.URL(address)
    for i in range(count):
        with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + (body if i % 4 else body[:-5]))
            if i % 2:
                connection.recv(100)
    assert free(engine)
    after = engine.figures
    asked = sum(after.ended.values()) - sum(before.ended.values()) + after.refused - before.refused
    assert asked <= count and after.tokens - before.tokens < 100 * count
    assert httpx.post(f"{address}/chat/completions", json=GOOD, timeout=30).status_code == 200
    until = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > handles + 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= handles + 3 and threading.active_count() <= threads + 2


def test_an_answer_is_the_same_in_any_company_many_times(slots, answer) -> None:
    """Pairs: alone, and in whatever company the queue makes; greedy and drawn, short and long."""
    random, count = np.random.default_rng(1), 1000 if LONG else 100
    slots.clear()
    with Engine(slots, waiting=4096) as engine:
        cases = []
        for i in range(count):
            prompt = random.integers(0, 256, random.integers(1, 50)).tolist()
            setting = Sampling(temperature=float(random.choice([0, 0.7, 1.2])), top_p=float(random.choice([1, 0.9])),
                               top_k=int(random.choice([0, 20])), frequency=float(random.choice([0, 0.5])),
                               seed=i, logprobs=bool(i % 5 == 0))  # fmt: skip
            cases.append((prompt, int(random.integers(1, 14)), setting))
        alone = []
        for case in cases:
            engine.submit((one := answer(*case)).job)
            alone.append(one.ids)
        order = random.permutation(count)
        together = [answer(*cases[i], client=str(i % 7)) for i in order]
        for one in together:
            engine.submit(one.job)
            if random.random() < 0.1:
                one.began.wait(10)
        assert [one.ids for one in together] == [alone[i] for i in order]


def test_at_ten_times_the_load_the_slots_stay_busy_and_the_rest_is_told_at_once(slots, answer, monkeypatch) -> None:
    """Open loop: jobs come ten times as fast as they can be answered, each with a second of time.

    Whoever is let in is answered in time, the rest is refused within 50 ms, and nothing of it lasts. A step takes 20 ms
    more than this tiny model needs, so that it is the slots that are short, not the test's own time.
    """
    slots.clear()
    step = slots.step
    monkeypatch.setattr(slots, "step", lambda live: (time.sleep(0.02), step(live))[1])
    seconds = 20.0 if LONG else 2.0
    with Engine(slots, waiting=64) as engine:
        for _ in range(2):  # the second time, the clock of the jobs has settled
            warm = [answer([1, 2, 3], 5) for _ in range(16)]
            began = time.monotonic()
            engine.submit(*(one.job for one in warm))
            assert all(one.ids for one in warm)
            peak = 16 / (time.monotonic() - began)
        admitted, refused, times = [], 0, []
        began, sent = time.monotonic(), 0
        while (now := time.monotonic()) - began < seconds:
            while sent < (now - began) * 10 * peak:
                one, sent = answer([1, 2, 3], 5, deadline=now + 1), sent + 1
                asked = time.monotonic()
                try:
                    engine.submit(one.job)
                    admitted.append(one)
                except Refused as error:
                    refused += error.after > 0
                times.append(time.monotonic() - asked)
            time.sleep(0.002)
        assert all(one.over.wait(10) for one in admitted)
        ended = time.monotonic() - began
        good = sum(one.why == "length" for one in admitted)
        goodput = good / ended / peak
        print(f"sent {sent}, answered {good} of {len(admitted)}, refused {refused}, goodput {goodput:.2f} of the peak")
        assert refused > sent / 2 and {one.why for one in admitted} <= {"length", "late"}
        if LONG:  # figures of time, for which a machine should have nothing else to do
            assert good >= 0.95 * len(admitted) and goodput > 0.9 and np.percentile(times, 99) < 0.05
        began = time.monotonic()
        engine.submit((last := answer([1, 2, 3], 5)).job)
        assert last.ids and time.monotonic() - began < (1 if LONG else 10)
