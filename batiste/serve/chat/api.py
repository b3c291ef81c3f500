# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API over HTTP: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`.

Answers come whole or as server-sent events. When a client goes away its slots are free from the next step on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import numpy as np

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need
from batiste.serve.errors import Refusal
from batiste.serve.gate import gone

from .answers import Answers, Event, chat_logprobs, text_logprobs
from .embedder import Embedder
from .engine import Engine
from .errors import RequestError
from .model import LanguageModel
from .requests import EMBEDDINGS, asked, checked, parsed

log = logging.getLogger(__name__)
MOST_BYTES = 4 << 20


class Api:
    """The routes of OpenAI's API for some models.

    Args:
        models: language models and embedders.
        timeout: seconds that an answer may take, waiting for a slot included.
        most_bytes: of a request's body.

    Raises:
        ArgumentError: two models have one name.
    """

    def __init__(self, models: Iterable[LanguageModel | Embedder], *, timeout: float = 300.0,
                 most_bytes: int = MOST_BYTES):  # fmt: skip
        listed = list(models)
        self.models = {model.name: model for model in listed}
        if len(self.models) < len(listed):
            raise ArgumentError("models are asked for by name: each has its own", got=[m.name for m in listed])
        self.timeout, self.most_bytes = timeout, most_bytes

    def routes(self) -> list[Any]:
        """Starlette's routes."""
        Route = need("starlette.routing", extra="serve").Route
        return [
            Route("/v1/models", _guarded(self.listed), methods=["GET"]),
            Route("/v1/models/{name:path}", _guarded(self.described), methods=["GET"]),
            Route("/v1/chat/completions", _guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", _guarded(self.texts), methods=["POST"]),
            Route("/v1/embeddings", _guarded(self.embeddings), methods=["POST"]),
            Route("/v1/{path:path}", _guarded(self.unknown), methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
        ]

    def app(self) -> Any:
        """These routes alone, as an ASGI application."""
        return need("starlette.applications", extra="serve").Starlette(routes=self.routes())

    def close(self, timeout: float | None = None) -> None:
        """Ends the answers that have begun, within `timeout` seconds, and takes no more."""
        for model in self.models.values():
            if isinstance(model, LanguageModel):
                model.engine.close(timeout)
            else:
                model.close()

    @property
    def engines(self) -> dict[str, Engine]:
        """Those of the language models, by name."""
        return {name: model.engine for name, model in self.models.items() if isinstance(model, LanguageModel)}

    @staticmethod
    def shown(path: str, refusal: Refusal) -> dict[str, Any]:
        """What stands in an answer that was refused before any route saw it."""
        return (RequestError.of(refusal) if path.startswith("/v1/") else refusal).body()

    # ------------------------------------------------------------ handlers
    async def listed(self, request: Any) -> Any:
        return _json({"object": "list", "data": [model.about() for model in self.models.values()]})

    async def described(self, request: Any) -> Any:
        return _json(self._model(request.path_params["name"], (LanguageModel, Embedder)).about())

    async def unknown(self, request: Any) -> Any:
        raise RequestError(404, "There is no such address, or not with this method", code="unknown_url")

    async def chat(self, request: Any) -> Any:
        return await self._answered(request, True)

    async def texts(self, request: Any) -> Any:
        return await self._answered(request, False)

    async def embeddings(self, request: Any) -> Any:
        found = checked(parsed(await self._body(request)), EMBEDDINGS, "model", "input")
        model = self._model(found["model"], Embedder)
        wrong = next((i for i, text in enumerate(found["input"]) if not isinstance(text, str)), None)
        if wrong is not None:
            raise RequestError(400, f"'input[{wrong}]' is wrong: expected a text", param=f"input[{wrong}]",
                               code="invalid_value")  # fmt: skip
        vectors, tokens = await asyncio.wait_for(model.vectors(found["input"]), self.timeout)
        if found.get("dimensions", vectors.shape[1]) != vectors.shape[1]:
            raise RequestError(400, f"'dimensions' is wrong: expected {vectors.shape[1]}", param="dimensions",
                               code="invalid_value")  # fmt: skip
        written = _base64 if found.get("encoding_format") == "base64" else np.ndarray.tolist
        data = [{"object": "embedding", "index": i, "embedding": written(row)} for i, row in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": model.name, "usage": usage})

    # ------------------------------------------------------------ parts of them
    def _model(self, name: str, kind: Any) -> Any:
        model = self.models.get(name)
        if not isinstance(model, kind):
            raise RequestError(
                404, f"There is no such model here: {name[:256]!r}", param="model", code="model_not_found"
            )
        return model

    async def _body(self, request: Any) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "The body is expected as application/json")
        raw, too_large = bytearray(), RequestError(413, f"The body is larger than {self.most_bytes} bytes")
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > self.most_bytes:
                raise too_large
        async for part in request.stream():
            raw += part
            if len(raw) > self.most_bytes:
                raise too_large
        return bytes(raw)

    async def _answered(self, request: Any, chat: bool) -> Any:
        ask = asked(parsed(await self._body(request)), chat)
        model = self._model(ask.model, LanguageModel)
        prompts = await asyncio.to_thread(model.prompts, model.checked(ask))
        client = request.headers.get("authorization") or (request.client.host if request.client else "")
        return Reply(Answers(model, ask, prompts, client=client, timeout=self.timeout), chat)


class Reply:
    """The answers to one request on their way to the client: an ASGI application for this once."""

    def __init__(self, answers: Answers, chat: bool):
        self.answers, self.ask, self.model, self.chat = answers, answers.ask, answers.model, chat

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        leaving = asyncio.create_task(gone(receive))
        leaving.add_done_callback(lambda _: self.answers.cancel())
        try:
            await (self._streamed(send) if self.ask.stream else self._whole(scope, receive, send))
        finally:
            leaving.cancel()

    async def _whole(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            events = [event async for event in self.answers]
            response = _json(self._object(events))
        except RequestError as error:
            response = _json(error.body(), error.status, error.headers)
        await response(scope, receive, send)

    async def _streamed(self, send: Any) -> None:
        """Until the first event comes the status is still open: what is refused, or late, is told by it."""
        events = aiter(self.answers)
        try:
            first = await anext(events)
        except RequestError as error:
            return await _json(error.body(), error.status, error.headers)({"type": "http"}, None, send)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._chunks(first, events):
            body = b"data: " + data.encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        head = self.answers.head("chat.completion.chunk" if self.chat else "text_completion")
        usage = {"usage": None} if self.ask.usage else {}
        lengths = [0] * len(self.answers.readers)
        for index in range(len(lengths)):
            if self.chat:
                yield _text({**head, "choices": [_part(index, {"role": "assistant", "content": ""})], **usage})
            elif self.ask.echo:
                yield _text({**head, "choices": [self._piece(index, self._echo(index), (), 0)], **usage})
        event: Event | None = first
        try:
            while event is not None:
                for choice in self._choices(event, lengths):
                    yield _text({**head, "choices": [choice], **usage})
                event = await anext(events, None)
        except RequestError as error:
            yield _text(error.body())
            return
        if self.ask.usage:
            yield _text({**head, "choices": [], "usage": self.answers.usage})
        yield "[DONE]"

    def _choices(self, event: Event, lengths: list[int]) -> list[dict[str, Any]]:
        """Of an event: the text that came, then the end."""
        found, (index, text, tokens, why) = [], event
        if text or tokens:
            if self.chat:
                logprobs = chat_logprobs(self.model, tokens, self.ask.alternatives)
                found.append(_part(index, {"content": text}, logprobs))
            else:
                found.append(self._piece(index, text, tokens, lengths[index]))
            lengths[index] += len(text)
        if why is not None:
            found.append(_part(index, {}, None, why) if self.chat else self._piece(index, "", (), 0, why))
        return found

    def _piece(self, index: int, text: str, tokens: Any, start: int, why: str | None = None) -> dict[str, Any]:
        logprobs = text_logprobs(self.model, tokens, self.ask.alternatives, start) if tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": why}

    def _object(self, events: list[Event]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index in range(len(self.answers.readers)):
            own = [event for event in events if event.index == index]
            text, why = "".join(event.text for event in own), own[-1].why
            tokens = [token for event in own for token in event.tokens]
            if self.chat:
                message = {"role": "assistant", "content": text, "refusal": None}
                logprobs = chat_logprobs(self.model, tokens, self.ask.alternatives)
                choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": why})
            else:
                logprobs = text_logprobs(self.model, tokens, self.ask.alternatives, 0)
                choices.append(self._piece(index, self._echo(index) + text, (), 0, why) | {"logprobs": logprobs})
        head = self.answers.head("chat.completion" if self.chat else "text_completion")
        return {**head, "choices": choices, "usage": self.answers.usage}

    def _echo(self, index: int) -> str:
        if not self.ask.echo:
            return ""
        prompt = self.ask.prompt[index // self.ask.n]
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)


def _part(index: int, delta: dict[str, Any], logprobs: Any = None, why: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": why}


def _text(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    Response = need("starlette.responses", extra="serve").Response
    return Response(_text(data).encode(), status, headers, "application/json")


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _guarded(handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """The handler; what it refuses becomes an error of the API, and of what breaks in it nothing is told."""

    async def guarded(request: Any) -> Any:
        try:
            return await handler(request)
        except Refusal as error:
            told = RequestError.of(error)
            return _json(told.body(), told.status, error.headers)
        except TimeoutError:
            return _json(RequestError(504, "The answer was not ready in time").body(), 504)
        except need("starlette.requests", extra="serve").ClientDisconnect:
            return _json(RequestError(400, "The client went away").body(), 400)  # which nobody reads
        except Exception:
            log.exception("a request failed")
            return _json(RequestError(500, "Something went wrong here").body(), 500)

    return guarded
