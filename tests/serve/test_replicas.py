# SPDX-License-Identifier: Apache-2.0
"""Two replicas of `batiste serve` behind a balancer: one dies, a new version comes, and no client notices.

The short tier kills and rolls once; the long one (`make faults`) goes on until ten have died and ten were told to go.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from batiste import export

from .balancer import balancing
from .conftest import Running, free_port

ROUNDS = 10 if os.environ.get("BATISTE_FAULTS") == "long" else 1
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]})


def bundle(folder: Path, version: int) -> Path:
    """Its answer is its version, twice."""
    path = folder / f"version{version}"
    if not path.exists():
        export.export(lambda x: {"y": 0 * x + version}, {"x": "float32[batch, 2]"}, path, buckets={"batch": (1, 4)})
    return path


class Clients:
    """Threads that ask without pause; what they were answered."""

    def __init__(self, port: int, threads: int = 3):
        self.port, self.going, self.answers = port, True, []
        self.threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        while self.going:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            with contextlib.closing(connection):
                connection.request("POST", "/v2/models/m/infer", BODY)
                answer = connection.getresponse()
                content = answer.read()
            time.sleep(0.005)
            version = int(json.loads(content)["outputs"][0]["data"][0]) if answer.status == 200 else 0
            self.answers.append((answer.status, version))

    def more(self, count: int = 20) -> list[tuple[int, int]]:
        """Waits for so many answers more; which those were."""
        begun = len(self.answers)
        until = time.monotonic() + 30
        while len(self.answers) < begun + count:
            assert time.monotonic() < until and all(thread.is_alive() for thread in self.threads)
            time.sleep(0.005)
        return self.answers[begun:]

    def end(self) -> None:
        self.going = False
        for thread in self.threads:
            thread.join()


def started(path: Path, *ports: int) -> list[Running]:
    """Replicas that start at the same time."""
    found: dict[int, Running] = {}

    def start(port: int) -> None:
        command = (sys.executable, "-m", "batiste", "serve", f"m={path}", "--allow-unsigned", "--port", "PORT")
        found[port] = Running(*command, "--log", "warning", port=port)

    threads = [threading.Thread(target=start, args=(port,)) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[port] for port in ports]


@contextlib.contextmanager
def ended(replicas: list[Running]) -> Iterator[None]:
    try:
        yield
    finally:
        for replica in replicas:
            replica.end()


def test_a_kill_and_a_new_version_under_load_lose_no_request(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    replicas = started(bundle(tmp_path, 1), *ports)
    with ended(replicas), balancing(*ports) as balancer:
        clients = Clients(balancer.port)
        try:
            for version in range(2, ROUNDS + 2):
                (first, second), until = replicas[-2:], time.monotonic() + 60
                clients.more()
                first.process.kill()
                assert set(clients.more()) == {(200, version - 1)}
                replicas += started(bundle(tmp_path, version), first.port)
                while (200, version) not in clients.more():
                    assert time.monotonic() < until, "the new replica gets no request"
                second.process.send_signal(signal.SIGTERM)
                assert second.process.wait(20) == 0
                clients.more()
                assert set(clients.more()) == {(200, version)}
                if version <= ROUNDS:
                    replicas += started(bundle(tmp_path, version), second.port)
        finally:
            clients.end()
        statuses = Counter(status for status, _ in clients.answers)
        assert set(statuses) == {200} and balancer.failed > 0, statuses
        print(f"{len(clients.answers)} answers, {balancer.failed} attempts failed and were made elsewhere")
