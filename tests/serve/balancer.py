# SPDX-License-Identifier: Apache-2.0
"""A balancer on loopback that keeps the rule of `docs/deploy/`: round robin; where a replica does not answer, the next.

A request is tried again, once at each replica, if the connection was refused or broke before an answer was whole, or if
the answer was 502 or 503. A replica that failed is passed over for a moment. Models have no memory of requests, so that
one that was computed twice does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

AGAIN = (b"502", b"503")
PASSED_OVER = 0.3  # seconds
NOBODY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Balancer:
    """Counts what it had to do: `tried` attempts, `failed` of them."""

    def __init__(self, ports: list[int]):
        self.ports, self.port = ports, 0
        self.tried = self.failed = self._turn = 0
        self._until = dict.fromkeys(ports, 0.0)

    async def serve(self, started: threading.Event, stopped: asyncio.Event) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        async with server:
            await stopped.wait()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = await whole(reader)
            head, _, body = request.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            writer.write(await self._answer(b"\r\n".join([*lines, b"connection: close"]) + b"\r\n\r\n" + body))
            await writer.drain()
        writer.close()

    async def _answer(self, request: bytes) -> bytes:
        answer = NOBODY
        for port in self._order():
            self.tried += 1
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                answer = await asked(port, request)
                if answer.split(b" ", 2)[1] not in AGAIN:
                    return answer
            self.failed += 1
            self._until[port] = time.monotonic() + PASSED_OVER
        return answer

    def _order(self) -> list[int]:
        """Round robin; those that have just failed come last."""
        self._turn += 1
        turned = [self.ports[(self._turn + i) % len(self.ports)] for i in range(len(self.ports))]
        return sorted(turned, key=lambda port: self._until[port] > time.monotonic())


async def whole(reader: asyncio.StreamReader) -> bytes:
    """A message with its body; an error if it ends before."""
    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(int(sizes[0]) if sizes else 0)


async def asked(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        return await whole(reader)
    finally:
        writer.close()


@contextlib.contextmanager
def balancing(*ports: int) -> Iterator[Balancer]:
    """A balancer in a thread."""
    balancer, started, loop = Balancer(list(ports)), threading.Event(), asyncio.new_event_loop()
    stopped = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(balancer.serve(started, stopped)))
    thread.start()
    try:
        assert started.wait(10)
        yield balancer
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()
