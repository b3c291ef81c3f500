# SPDX-License-Identifier: Apache-2.0
"""The server: models behind their batchers, the routes of the Open Inference Protocol, reloading and closing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from batiste.graph.errors import ArgumentError, DtypeError, ShapeError
from batiste.graph.optional import need
from batiste.version import __version__

from .batcher import Batcher, Item
from .errors import Refusal
from .gate import Gate, gone
from .metrics import Metrics
from .protocol import LENGTH, described, read, write
from .recorder import Recorder
from .servable import Arrays, Servable
from .tracing import Tracing

log = logging.getLogger("batiste.serve")
PAGE = Path(__file__).with_name("page.html")
Loader = Callable[[], Servable]


class Server:
    """Models, ready to be asked: `Server([servable]).app()` is an ASGI application.

    Args:
        models: servables, or functions that load one (those can be reloaded).
        chat: a `batiste.serve.chat.Api`, whose routes stand beside these.
        keys, most_bytes, idle, most: see `Gate`.
        timeout: seconds that an answer may take if the client does not say.
        admin: whether `POST /v2/repository/models/NAME/load` reloads a model; it wants a key.
        recorder: keeps a part of the requests with their answers, and measures drift.
        tracing: makes spans of OpenTelemetry; if that is installed, by the provider that the program has set.
        batching: options of every `Batcher`.

    Raises:
        ArgumentError: two models have one name and version; `admin` without keys.
    """

    def __init__(self, models: Iterable[Servable | Loader] = (), *, chat: Any = None, keys: Sequence[str] = (),
                 timeout: float = 30.0, admin: bool = False, recorder: Recorder | None = None,
                 most_bytes: int = 16 << 20, idle: float = 5.0, most: int = 1024, tracing: Tracing | None = None,
                 **batching: Any):  # fmt: skip
        if admin and not keys:
            raise ArgumentError("whoever may reload models shows a key", fix="pass keys=, or leave admin out")
        self.metrics, self.timeout, self.admin, self.recorder = Metrics(), timeout, admin, recorder
        self.batching, self.chat = batching, chat
        self.tracing = tracing or Tracing.found()
        self.loaders: dict[str, list[Loader]] = {}
        self.models: dict[str, dict[str, Batcher]] = {}
        self.ready = False
        self._loading = threading.Lock()
        for model in models:
            servable = model if isinstance(model, Servable) else model()
            versions = self.models.setdefault(servable.name, {})
            if servable.version in versions:
                raise ArgumentError("two models have one name and version", got=f"{servable.name} {servable.version}")
            versions[servable.version] = self._batcher(servable)
            if not isinstance(model, Servable):
                self.loaders.setdefault(servable.name, []).append(model)
        shown = {} if chat is None else {"shown": chat.shown}
        for name, engine in ({} if chat is None else chat.engines).items():
            engine.watcher = self.metrics.watcher(name)
        self.gate = Gate(self._routes(), self.metrics, keys=keys, most_bytes=most_bytes, idle=idle, most=most,
                         tracing=self.tracing, **shown)  # fmt: skip

    def app(self) -> Any:
        """The ASGI application."""
        return self.gate

    def _batcher(self, servable: Servable) -> Batcher:
        observe = lambda rows, seconds: self.metrics.batch(servable.name, rows, seconds)
        if servable.apart is not None:
            servable.apart.told = lambda why: self.metrics.deaths.labels(servable.name, why).inc()
        return Batcher(servable, observe=observe, **self.batching)

    def warm(self) -> Server:
        """Compiles all that requests can need; after it the server says that it is ready."""
        for batcher in self.batchers():
            batcher.warm()
        self.ready = True
        return self

    def batchers(self) -> list[Batcher]:
        """Of all versions of all models."""
        return [batcher for versions in self.models.values() for batcher in versions.values()]

    # ------------------------------------------------------------ living
    def reload(self, name: str | None = None) -> list[str]:
        """Loads models anew; the old ones answer until the new ones are warm, and what waits in their lines.

        A model that cannot be loaded, or that fails its golden outputs, changes nothing.

        Returns:
            the names of those that changed.

        Raises:
            Exception: of the first that failed, after all were tried.
        """
        changed, failure = [], None
        with self._loading:
            for known, loaders in self.loaders.items():
                for loader in loaders if name in (None, known) else []:
                    servable = new = None
                    try:
                        servable = loader()
                        old = self.models[known].get(servable.version)
                        if old is not None and servable.digest and old.servable.digest == servable.digest:
                            servable.close()
                            continue
                        new = self._batcher(servable)
                        new.warm()
                    except Exception as error:
                        log.exception("%s was not reloaded; the old one serves on", known)
                        self.metrics.reloads.labels("failed").inc()
                        failure = failure or error
                        for made in filter(None, (new, servable)):
                            made.close()
                        continue
                    self.models[known][servable.version] = new
                    self.metrics.reloads.labels("done").inc()
                    changed.append(known)
                    if old is not None:
                        threading.Thread(target=old.close, daemon=True).start()
        if failure is not None:
            raise failure
        return changed

    def close(self, timeout: float = 30.0) -> None:
        """Takes no more; answers what has been accepted."""
        self.gate.draining = True
        for batcher in self.batchers():
            batcher.close(timeout)
        if self.chat is not None:
            self.chat.close(timeout)
        if self.recorder is not None:
            self.recorder.close()

    # ------------------------------------------------------------ routes
    def _routes(self) -> Any:
        Route = need("starlette.routing", extra="serve").Route
        one, of_version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        routes = [
            Route("/", self.page),
            Route("/livez", self.live), Route("/v2/health/live", self.live),
            Route("/readyz", self.readiness), Route("/v2/health/ready", self.readiness),
            Route("/metrics", self.figures),
            Route("/v2", _guarded(self.about)),
            Route("/v2/models", _guarded(self.listed)),
            *(Route(f"{path}{end}", _guarded(handler), methods=[method]) for path in (one, of_version)
              for end, handler, method in (("", self.metadata, "GET"), ("/ready", self.model_ready, "GET"),
                                           ("/infer", self.infer, "POST"))),
            Route("/v2/repository/models/{name}/load", _guarded(self.load), methods=["POST"]),
            *(self.chat.routes() if self.chat is not None else ()),
        ]  # fmt: skip
        return need("starlette.applications", extra="serve").Starlette(routes=routes)

    async def page(self, request: Any) -> Any:
        return need("starlette.responses", extra="serve").HTMLResponse(PAGE.read_text())

    async def live(self, request: Any) -> Any:
        return _json({"live": True})

    async def readiness(self, request: Any) -> Any:
        return self._readiness(self.batchers())

    def _readiness(self, batchers: Sequence[Batcher]) -> Any:
        ready = self.ready and not self.gate.draining and all(batcher.up for batcher in batchers)
        after = max((batcher.back for batcher in batchers), default=0.0)
        return _json({"ready": ready}, 200 if ready else 503, {} if ready else Refusal(503, "", after=after).headers)

    async def figures(self, request: Any) -> Any:
        for name, versions in self.models.items():
            for batcher in versions.values():
                self.metrics.look(name, batcher)
        for name, engine in ({} if self.chat is None else self.chat.engines).items():
            self.metrics.look_into(name, engine.figures)
        if self.recorder is not None:
            for model, tensor, index in self.recorder.drift():
                self.metrics.drift.labels(model, tensor).set(index)
        response = need("starlette.responses", extra="serve").Response
        return response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def about(self, request: Any) -> Any:
        return _json({"name": "batiste", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def listed(self, request: Any) -> Any:
        found = [{"name": name, "versions": sorted(versions)} for name, versions in self.models.items()]
        return _json({"models": found})

    async def metadata(self, request: Any) -> Any:
        servable = self._asked(request).servable
        return _json({"name": servable.name, "versions": sorted(self.models[servable.name]), "platform": "batiste",
                      "inputs": described(servable.signature.inputs),
                      "outputs": described(servable.signature.outputs)})  # fmt: skip

    async def model_ready(self, request: Any) -> Any:
        return self._readiness([self._asked(request)])

    async def load(self, request: Any) -> Any:
        if not self.admin:
            raise Refusal(403, "Models are not reloaded from outside: this server was started without --admin")
        name = request.path_params["name"]
        if name not in self.loaders:
            raise Refusal(404, "There is no such model to load")
        try:
            return _json({"changed": await asyncio.to_thread(self.reload, name)})
        except Exception as error:
            raise Refusal(409, f"The model was not reloaded, the old one serves on: {type(error).__name__}") from error

    async def infer(self, request: Any) -> Any:
        batcher = self._asked(request)
        signature, finite = batcher.servable.signature, not batcher.nan
        body = await request.body()
        header = request.headers.get(LENGTH)
        if len(body) > 1 << 16:  # reading it would keep the others waiting
            asked = await asyncio.to_thread(read, body, header, signature, finite=finite)
        else:
            asked = read(body, header, signature, finite=finite)
        timeout = min(self._seconds(request), asked.timeout or self.timeout)
        batcher, item = self._submitted(request, asked.arrays, timeout)
        servable = batcher.servable
        leaving = asyncio.create_task(gone(request.receive))
        leaving.add_done_callback(lambda task: task.cancelled() or batcher.cancel(item))
        try:
            outputs = await asyncio.wait_for(asyncio.wrap_future(item.future), timeout)
        except TimeoutError:
            batcher.cancel(item)
            raise Refusal(504, "The answer was not ready in time") from None
        finally:
            leaving.cancel()
            if self.tracing is not None:
                self.tracing.computed(item)
        if self.recorder is not None:
            self.recorder.saw(servable, asked.arrays, outputs)
        parts, length = write(servable.name, servable.version, asked, outputs, servable.signature)
        response = need("starlette.responses", extra="serve").Response
        kind = "application/json" if length is None else "application/octet-stream"
        return response(b"".join(parts), headers={} if length is None else {LENGTH: str(length)}, media_type=kind)

    # ------------------------------------------------------------ parts of them
    def _submitted(self, request: Any, arrays: Arrays, timeout: float) -> tuple[Batcher, Item]:
        """In the line of the model as it is now: while the request was read, another one may have been loaded."""
        while True:
            batcher = self._asked(request)
            try:
                return batcher, batcher.submit(arrays, timeout)
            except Refusal:
                if not batcher.closed or self._asked(request) is batcher:
                    raise

    def _asked(self, request: Any) -> Batcher:
        name, version = request.path_params["name"], request.path_params.get("version")
        versions = self.models.get(name)
        if not versions or (version is not None and version not in versions):
            raise Refusal(404, "There is no such model, or not in this version")
        return versions[version] if version is not None else versions[max(versions, key=_numeric)]

    def _seconds(self, request: Any) -> float:
        text = request.headers.get("x-request-timeout")
        if text is None:
            return self.timeout
        with contextlib.suppress(ValueError):
            if 0 < float(text) < float("inf"):
                return min(float(text), self.timeout)
        raise Refusal(400, "The header x-request-timeout is a number of seconds above zero")


def _numeric(version: str) -> tuple[bool, int, str]:
    """Version 10 comes after 9; those that are no numbers come first."""
    return (version.isdigit(), int(version) if version.isdigit() else 0, version)


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    return need("starlette.responses", extra="serve").JSONResponse(data, status, headers)


def _guarded(handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """The handler; what does not fit a model's signature is an answer with status 422."""

    async def guarded(request: Any) -> Any:
        try:
            return await handler(request)
        except Refusal as error:
            return _json({"error": str(error)}, error.status, error.headers)
        except (ArgumentError, ShapeError, DtypeError) as error:
            return _json({"error": str(error)}, 422)
        except need("starlette.requests", extra="serve").ClientDisconnect:
            return _json({"error": "The client went away"}, 400)  # which nobody reads

    return guarded
