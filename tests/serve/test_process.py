# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own: other people's clients, hostile bytes, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from batiste.cli import main
from batiste.serve import Recorder, Servable

from .conftest import HERE, Running, running

GOLDEN = next((HERE.parent / "export" / "golden").glob("*/classifier"))


def test_tritons_client_is_answered_as_json_and_as_bytes(quick: Running) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{quick.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("double")
    assert client.get_model_metadata("double")["inputs"][0]["name"] == "x"
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for there in (True, False):
        for back in (True, False):
            given = triton.InferInput("x", x.shape, "FP32")
            given.set_data_from_numpy(x, binary_data=there)
            wanted = triton.InferRequestedOutput("y", binary_data=back)
            found = client.infer("double", [given], outputs=[wanted], request_id="7")
            np.testing.assert_array_equal(found.as_numpy("y"), 2 * x)
            assert found.get_response()["id"] == "7"


def request(first: float) -> bytes:
    """As bytes: one row."""
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [first] * 4}
    body = json.dumps({"inputs": [entry]}).encode()
    head = f"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


GARBAGE = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"400"),
    "a wrong method": (b"BREW /v2 HTTP/1.1\r\n\r\n", b"400"),
    "two lengths": (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", b"400"),
    "a length and chunks": (
        b"POST /v2 HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"400",
    ),
    "a negative length": (b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
    "a huge length": (
        b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
    "a huge header": (b"GET / HTTP/1.1\r\nA: " + b"a" * (1 << 20), b"431"),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000, b"431"),
    "a path outside": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
}  # fmt: skip


@pytest.mark.parametrize("case", GARBAGE)
def test_hostile_bytes_are_refused_at_once(quick: Running, case: str) -> None:
    data, status = GARBAGE[case]
    start = time.monotonic()
    answer = quick.raw(data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert time.monotonic() - start < 4
    assert not [word for word in (b"Traceback", b"batiste", b"uvicorn") if word in answer]
    assert quick.infer([[1.0] * 4])[0] == 200


def fields(*lines: str, body: bytes = b"", path: str = "/v2/models/double/infer") -> bytes:
    """A request with these lines in its head."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode("latin-1") + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1")


SMUGGLED = b"0\r\n\r\n" + get("/livez")  # a second request, if the first is believed to end before it
LENGTHS = ["2\r\nContent-Length: 2", "2, 3", "+2", "0x2", "2 2", "", "1" + "0" * 30, "-0", "2\r\n 3"]
CODINGS = ["chunked\r\nTransfer-Encoding: chunked\r\nContent-Length: 4", "xchunked", "chunked, identity",
           "\tchunked\r\nContent-Length: 4", "identity, chunked, identity"]  # fmt: skip
LINES = ["Content-Length : 4", "A: b\r\n c: d", "A: b\0c", ": b", "nothing", "A\0: b", "Ä: b"]
CHUNKS = [
    b"zz\r\nab\r\n", b"F" * 17 + b"\r\nab\r\n", b"-1\r\nab\r\n", b"1\r\na\r\n" * 500_000, b"1\r\na\r\n" * 9 + b"\0",
    b"1;" + b"a" * (1 << 20) + b"\r\na\r\n", b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 170_000,
]  # fmt: skip
ABOVE = ["..", "%2e%2e", "..%2f..", "%2e%2e%2f", "....//", "..\\", "%5c..", "%252e%252e", "..;", "%00", "%c0%ae%c0%ae"]
PATHS = ["//etc/passwd", "file:///etc/passwd", "http://other/etc/passwd", "/\xff\xfe", "*", "/" + "a" * (1 << 20)]
RAW = [
    *(fields(f"Content-Length: {length}", body=SMUGGLED) for length in LENGTHS),
    *(fields(f"Transfer-Encoding: {coding}", body=SMUGGLED) for coding in CODINGS),
    *(fields(line, "Content-Length: 5", body=SMUGGLED) for line in LINES),
    *(fields("Transfer-Encoding: chunked", "Connection: close", body=chunk + SMUGGLED) for chunk in CHUNKS),
    *(get(f"{start}{above}/{above}/etc/passwd") for start in ("/", "/v2/models/") for above in ABOVE),
    *map(get, PATHS),
    fields("Expect: 100-continue", "Content-Length: 99999999999"),
    b"GET /v2 HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET /v2 HTTP/1.1\nHost: x\n\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
    b"TRACE /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
]


def test_bytes_from_a_table_are_refused_once_and_at_once(quick: Running) -> None:
    wrong = []
    for data in RAW:
        start = time.monotonic()
        answer = quick.raw(data)
        took, count = time.monotonic() - start, answer.count(b"HTTP/1.1 ")
        shown = [word for word in (b"Traceback", b"batiste", b"uvicorn", b"root:") if word in answer]
        if count != 1 or not answer.startswith(b"HTTP/1.1 4") or took > 2 or shown:
            wrong.append((data[:80], answer[:80], count, took))
    assert not wrong
    assert quick.infer([[1.0] * 4])[0] == 200
    print(f"SV3: {len(RAW) + len(GARBAGE)} raw cases")


def test_those_who_send_slowly_are_sent_away_and_keep_nobody_waiting(quick: Running) -> None:
    count, statuses = 400 if os.environ.get("BATISTE_FAULTS") == "long" else 20, Counter[int]()
    body = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", quick.port), 12)) for _ in range(count)]
        for i, connection in enumerate(slow):
            connection.sendall(body if i % 2 else b"GET / HTTP/1.1\r\nHos")
        while time.monotonic() - start < 1.5:
            statuses[quick.infer([[1.0] * 4])[0]] += 1
        answers = [connection.recv(1 << 12)[:12] for connection in slow]
    assert set(answers) == {b"HTTP/1.1 408"} and 1.9 < time.monotonic() - start < 12
    assert set(statuses) == {200} and statuses[200] >= 10
    print(f"SV3: {count} slow clients: each 408; {statuses[200]} others answered meanwhile in 1.5 s")


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest() -> None:
    with running(sys.executable, HERE / "stub.py", "PORT", "0.1") as server:
        statuses: list[int] = []

        def ask() -> None:
            try:
                statuses.append(server.infer([[1.0] * 4])[0])
            except ConnectionRefusedError:
                statuses.append(0)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.08)
        assert (server.get("/livez"), server.get("/readyz")) == (200, 503)
        refused = server.infer([[1.0] * 4])
        assert refused[0] == 503 and refused[1]["retry-after"] and refused[1]["connection"] == "close"
        for thread in threads:
            thread.join()
        assert server.process.wait(10) == 0
        assert set(statuses) <= {200, 503} and statuses.count(200) >= 8


def test_a_second_signal_ends_at_once() -> None:
    with running(sys.executable, HERE / "stub.py", "PORT", "0.4") as server:
        hanging = threading.Thread(target=lambda: server.raw(request(888.0), 30), daemon=True)
        hanging.start()
        time.sleep(0.3)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None, "one request has not been answered"
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(5)
        assert time.monotonic() - start < 4


def test_the_command_serves_a_bundle_and_listens_to_this_machine_alone() -> None:
    command = (sys.executable, "-m", "batiste", "serve", f"digits={GOLDEN}", "--port", "PORT", "--log", "warning")
    with running(
        *command, "--allow-unsigned", "--buckets", "batch=1,4", "--buckets", "length=8", "--engine", "process"
    ) as server:
        assert server.get("/v2/models/digits") == 200
        listening = Path(f"/proc/{server.process.pid}/net/tcp").read_text()
        own = [line.split()[1] for line in listening.splitlines()[1:] if line.split()[3] == "0A"]
        assert [address for address in own if address.endswith(f":{server.port:04X}")] == [
            f"0100007F:{server.port:04X}"
        ]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "is missing"),
        (["none"], "nothing to serve: got none"),
        ([str(GOLDEN)], "--allow-unsigned"),
        ([str(GOLDEN), "--allow-unsigned", "--buckets", "batch"], "no buckets: got batch"),
        ([str(GOLDEN), "--allow-unsigned", "--api-keys", "none"], "API keys cannot be read"),
    ],
)
def test_what_cannot_be_served_is_an_error_of_the_command(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    assert expected in capsys.readouterr().err


def test_replay_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = Servable.of_bundle(GOLDEN, "digits", buckets={"batch": (2,), "length": (8,)}, allow_unsigned=True)
    recorder = Recorder(tmp_path, share=1.0)
    random = np.random.default_rng(0)
    for i in range(3):
        x = {"tokens": random.integers(0, 2, (2, 8)).astype(np.int32)}
        outputs = served.answer(x)
        recorder.saw(served, x, {name: y + (i == 1) for name, y in outputs.items()})
    recorder.close()
    command = ["replay", str(tmp_path), str(GOLDEN), "--allow-unsigned"]
    assert main(command) == 1
    assert "3 requests: 1 with another answer; the largest difference is 1" in capsys.readouterr().out
    assert main([*command, "--tolerance", "2"]) == 0
    assert main(["replay", str(tmp_path / "none"), str(GOLDEN), "--allow-unsigned"]) == 2
