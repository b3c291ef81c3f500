# SPDX-License-Identifier: Apache-2.0
"""A server on an address, until a signal: SIGTERM and SIGINT close without loss, SIGHUP reloads."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from typing import Any

from batiste.graph.optional import need

from .server import Server

log = logging.getLogger("batiste.serve")
HEADERS = 64 << 10


def serve(server: Server, *, host: str = "127.0.0.1", port: int = 8000, grace: float = 30.0, settle: float = 0.2,
          idle: float = 5.0) -> int:  # fmt: skip
    """Answers until SIGTERM or SIGINT; gives the exit code.

    The port is open while models are compiled, and `/readyz` says 503 until they are.

    Args:
        grace: seconds in which what has been accepted is answered after a signal. A second signal ends at once.
        settle: seconds for which `/readyz` says 503 before the port closes, so that balancers look elsewhere.
        idle: seconds in which a request's headers must have come.
    """
    uvicorn = need("uvicorn", extra="serve")
    config = uvicorn.Config(server.app(), host=host, port=port, log_config=None, access_log=False, lifespan="off",
                            server_header=False, date_header=False, timeout_keep_alive=round(idle),
                            http=_protocol(idle), backlog=2048)  # fmt: skip
    running = _closing(uvicorn.Server, server, grace, settle)(config)
    threading.Thread(target=_warmed, args=(server, running), daemon=True).start()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=_reloaded, args=(server,), daemon=True).start())
    running.run()
    server.close(timeout=1.0)
    return 0 if running.started and not running.broken else 3


def _warmed(server: Server, running: Any) -> None:
    try:
        start = time.monotonic()
        server.warm()
        log.info("ready after %.1f s", time.monotonic() - start)
    except BaseException:
        log.exception("a model could not be compiled")
        running.broken = running.should_exit = True


def _reloaded(server: Server) -> None:
    try:
        log.info("reloaded: %s", ", ".join(server.reload()) or "nothing had changed")
    except Exception:
        log.error("not everything was reloaded; see above")


def _closing(base: Any, server: Server, grace: float, settle: float) -> Any:
    class Closing(base):
        """Between the first signal and the end: not ready, no new requests, the begun ones answered."""

        broken = False
        asked = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.asked:
                self.should_exit = self.force_exit = True
                return
            self.asked = server.gate.draining = True
            threading.Thread(target=self._drained, daemon=True).start()

        def _drained(self) -> None:
            begun = time.monotonic()
            time.sleep(settle)
            while server.gate.running and time.monotonic() - begun < grace:
                time.sleep(0.02)
            server.close(max(grace - (time.monotonic() - begun), 0.1))
            self.config.timeout_graceful_shutdown = 1
            self.should_exit = True

    return Closing


def _protocol(idle: float) -> Any:
    """HTTP as uvicorn speaks it, with bounds for headers: in size, and in time."""
    base = need("uvicorn.protocols.http.httptools_impl", extra="serve").HttpToolsProtocol

    class Bounded(base):
        waiting: Any = None
        before = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def _expect(self) -> None:
            self.before = 0
            self.waiting = asyncio.get_running_loop().call_later(idle, self._late)

        def _late(self) -> None:
            self._refused(b"408 Request Timeout")

        def _refused(self, status: bytes) -> None:
            if self.transport.is_closing():
                return
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

        def data_received(self, data: bytes) -> None:
            if self.waiting is None and (self.cycle is None or self.cycle.response_complete):
                self._expect()
            if self.waiting is not None:
                self.before += len(data)
                if self.before > HEADERS and not self._begun(data):
                    self._refused(b"431 Request Header Fields Too Large")
                    return
            super().data_received(data)

        def _begun(self, data: bytes) -> bool:
            return b"\r\n\r\n" in data[:HEADERS]

        def on_headers_complete(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None
            super().connection_lost(exc)

    return Bounded
