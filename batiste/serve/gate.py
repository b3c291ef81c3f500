# SPDX-License-Identifier: Apache-2.0
"""In front of every route: keys, limits of size and time, request ids, the access log, closing without loss."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from .errors import Refusal
from .metrics import Metrics
from .tracing import Span, Tracing

access = logging.getLogger("batiste.serve.access")
log = logging.getLogger("batiste.serve")
NAME = re.compile(r"[\w.:-]{1,128}")
OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")  # answered without a key, and while closing


class Gate:
    """An ASGI application around another.

    Args:
        keys: one of these is asked for, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`; none, if empty.
        most_bytes: of a body.
        idle: seconds between two parts of a body.
        most: requests at a time; more are refused at once.
        shown: the body of a refusal, by its path.
        tracing: makes the spans of requests.
    """

    def __init__(self, app: Any, metrics: Metrics, *, keys: Sequence[str] = (), most_bytes: int = 16 << 20,
                 idle: float = 5.0, most: int = 1024,
                 shown: Callable[[str, Refusal], Any] = lambda path, refusal: refusal.body(),
                 tracing: Tracing | None = None):  # fmt: skip
        self.shown, self.tracing = shown, tracing
        self.app, self.metrics, self.most_bytes, self.idle, self.most = app, metrics, most_bytes, idle, most
        self.keys = [key.encode() for key in keys]
        self.running = 0
        self.draining = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        own = given if NAME.fullmatch(given) else secrets.token_hex(8)
        if self.tracing is None or scope["path"] in (*OPEN, "/metrics"):
            await self._answered(scope, receive, send, headers, own, None)
            return
        with self.tracing.request(scope["method"], scope["path"], headers, own) as span:
            await self._answered(scope, receive, send, headers, own, span)

    async def _answered(self, scope: Any, receive: Any, send: Any, headers: dict[str, str], own: str,
                        span: Span | None) -> None:  # fmt: skip
        start, status, sent = time.monotonic(), 500, False
        more = {b"x-request-id": own.encode()} | ({} if span is None else span.headers())

        async def watched(message: Any) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status, sent = message["status"], True
                ours = more | ({b"connection": b"close"} if self.draining else {})
                before = [pair for pair in message.get("headers", []) if pair[0] not in ours]
                message = {**message, "headers": [*before, *ours.items()]}
            await send(message)

        self.running += 1
        try:
            self._check(scope["path"], headers)
            await self.app(scope, self._limited(receive, headers), watched)
        except Refusal as error:
            if not sent:
                await self._answer(watched, scope["path"], error)
        except Exception:
            log.exception("a request failed")
            if not sent:
                await self._answer(watched, scope["path"], Refusal(500, "Something went wrong here"))
        finally:
            self.running -= 1
            took = time.monotonic() - start
            self.metrics.answered(scope["path"], status, took)
            line = {"id": own, "method": scope["method"], "path": scope["path"][:256], "status": status,
                    "ms": round(1e3 * took, 2), "client": (scope.get("client") or ("",))[0]}  # fmt: skip
            if span is not None:
                span.answered(status)
                line["trace"] = span.id
            access.info("%s", json.dumps(line))

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if path in OPEN:
            return
        if self.draining and path != "/metrics":
            raise Refusal(503, "The server is closing", after=1.0)
        if self.keys:
            word, _, bearer = headers.get("authorization", "").partition(" ")
            given = (bearer if word.lower() == "bearer" else headers.get("x-api-key", "")).encode()
            fits = [hmac.compare_digest(given, key) for key in self.keys]  # all are compared, whichever fits
            if not any(fits):
                raise Refusal(401, "A key is needed: Authorization: Bearer KEY")
        if self.running > self.most:
            raise Refusal(503, "Too many requests at a time", after=1.0)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.most_bytes:
            raise Refusal(413, f"The body is larger than {self.most_bytes} bytes")

    def _limited(self, receive: Any, headers: dict[str, str]) -> Any:
        """`receive` for the body: bounded in size, and in time between its parts."""
        length, left, whole = 0, self.most_bytes, False

        async def limited() -> Any:
            nonlocal length, whole
            if whole:
                return await receive()  # waits for the client's end
            try:
                message = await asyncio.wait_for(receive(), self.idle)
            except TimeoutError:
                raise Refusal(408, "The body came too slowly") from None
            length += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if length > left:
                raise Refusal(413, f"The body is larger than {self.most_bytes} bytes")
            return message

        return limited

    async def _answer(self, send: Any, path: str, refusal: Refusal) -> None:
        """A refusal before, or in place of, a route's answer; what remains of the body is not read."""
        body = json.dumps(self.shown(path, refusal)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close",
                   **refusal.headers}  # fmt: skip
        await send({"type": "http.response.start", "status": refusal.status,
                    "headers": [(key.encode(), value.encode()) for key, value in headers.items()]})  # fmt: skip
        await send({"type": "http.response.body", "body": body})


async def gone(receive: Any) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
