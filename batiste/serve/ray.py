# SPDX-License-Identifier: Apache-2.0
"""The same bundle as an application of Ray Serve, in as many replicas as a cluster has room for.

serve run batiste.serve.ray:application path=bundle/ name=digits replicas=2 buckets=1,8,32 key_file=bundle.key

Ray places the replicas, balances and starts them again; each of them is a `Server`, with its line, its batches and its
limits. An unsigned bundle is served only with `allow_unsigned=yes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

from .errors import Refusal
from .servable import Servable
from .server import Server

OPTIONS = ("path", "name", "version", "replicas", "buckets", "key_file", "allow_unsigned", "executables", "grace")


def application(options: Mapping[str, str]) -> Any:
    """What `serve run` builds of the words after it.

    Raises:
        ArgumentError: an option is unknown, or `path` is missing.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ArgumentError("unknown options", got=", ".join(unknown), expected=", ".join(OPTIONS))
    if "path" not in options:
        raise ArgumentError("there is nothing to serve", fix="path=FOLDER of a bundle that every node can read")
    made = need("ray.serve", extra="ray").deployment(
        Replica, name=options.get("name", Path(options["path"]).name), num_replicas=int(options.get("replicas", "1")),
        max_ongoing_requests=1024, graceful_shutdown_timeout_s=float(options.get("grace", "30")),
    )  # fmt: skip
    return made.bind(dict(options))


class Replica:
    """A server in one process of Ray's: its requests, its health, its end."""

    def __init__(self, options: Mapping[str, str]):
        first = options.get("buckets")
        key = Path(options["key_file"]).read_bytes().strip() if "key_file" in options else None
        allowed = options.get("allow_unsigned", "no") == "yes"
        if key is None and not allowed:
            raise ArgumentError("bundles are served with the key that signed them",
                                fix="key_file=FILE, or allow_unsigned=yes for one that you trust")  # fmt: skip
        served = Servable.of_bundle(
            options["path"], options.get("name"), options.get("version", "1"), key=key, allow_unsigned=allowed,
            executables=options.get("executables"),
            buckets=None if first is None else {"batch": tuple(map(int, first.split(",")))},
        )  # fmt: skip
        self.server = Server([served]).warm()
        self.app = self.server.app()

    async def __call__(self, request: Any) -> Any:
        """The answer to a request of Starlette's, part by part as the application sends it."""
        sent: asyncio.Queue[Any] = asyncio.Queue()
        working = asyncio.create_task(self._run(request, sent))
        start = await sent.get()
        if start is None:
            await working  # raises what the application raised
            raise Refusal(500, "The application gave no answer")
        response = need("starlette.responses", extra="serve").StreamingResponse(_parts(sent, working), start["status"])
        response.raw_headers = list(start["headers"])
        return response

    async def _run(self, request: Any, sent: asyncio.Queue[Any]) -> None:
        try:
            await self.app(request.scope, request.receive, sent.put)
        finally:
            sent.put_nowait(None)  # whoever waits for more waits no longer

    def check_health(self) -> None:
        """Says nothing where all engines compute.

        Raises:
            Refusal: Ray shall start another replica in place of this one.
        """
        if not all(batcher.up for batcher in self.server.batchers()):
            raise Refusal(503, "An engine does not compute")

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.close()


async def _parts(sent: asyncio.Queue[Any], working: asyncio.Task[None]) -> AsyncIterator[bytes]:
    more = True
    try:
        while more:
            message = await sent.get()
            if message is None:
                await working
                break
            more = message.get("more_body", False)
            yield message.get("body", b"")
    finally:
        working.cancel()
