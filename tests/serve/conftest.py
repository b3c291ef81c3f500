# SPDX-License-Identifier: Apache-2.0
"""Real servers on loopback, each in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Running:
    """A server process, asked by plain sockets."""

    def __init__(self, *command: Any, port: int | None = None):
        self.port = free_port() if port is None else port
        words = [str(self.port) if word == "PORT" else str(word) for word in command]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that is full would stop the server
        self.process = subprocess.Popen(words, stdout=self.output, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        while self.get("/readyz") != 200:
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {self.end()}")
            time.sleep(0.05)

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 20, **headers: str) -> Any:
        """Status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def get(self, path: str) -> int:
        try:
            return self.ask("GET", path, timeout=5)[0]
        except OSError:
            return 0

    def infer(self, rows: list[list[float]], timeout: float = 20) -> Any:
        entry = {"name": "x", "shape": [len(rows), 4], "datatype": "FP32", "data": [n for row in rows for n in row]}
        return self.ask("POST", "/v2/models/double/infer", json.dumps({"inputs": [entry]}), timeout)

    def raw(self, data: bytes, timeout: float = 5.0) -> bytes:
        """What comes back until the server closes, or nothing comes for so long."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            found = b""
            with contextlib.suppress(OSError):
                connection.sendall(data)
                while part := connection.recv(1 << 16):
                    found += part
            return found

    def rss(self) -> float:
        """MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the process is gone")

    def end(self) -> str:
        """Kills it; all that it has printed."""
        self.process.kill()
        self.process.wait()
        with self.output as output:
            output.seek(0)
            return output.read()


@contextlib.contextmanager
def running(*command: Any) -> Iterator[Running]:
    started = Running(*command)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="session")
def quick() -> Iterator[Running]:
    """The stub without a wait."""
    with running(sys.executable, HERE / "stub.py", "PORT") as started:
        yield started
