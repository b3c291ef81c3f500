# SPDX-License-Identifier: Apache-2.0
"""Answers as they come: tokens become text in the engine's thread, and events in the event loop of the server."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from batiste.graph.errors import ArgumentError
from batiste.models.tokenizers import HALF, Text

from .engine import End, Job, Refused, Token
from .errors import RequestError
from .model import LanguageModel
from .requests import Ask

LEAST = -9999.0  # stands for the log probability of what cannot be, since JSON has no infinity

LOST = {
    "late": (504, "The answer was not ready in time"),
    "unsound": (500, "The model gave no numbers for this prompt"),
    "failed": (500, "The model failed"),
    "closed": (503, "The server is closing down"),
    "cancelled": (503, "The request was given up"),
}  # fmt: skip


class Event(NamedTuple):
    """More of one answer: text, the tokens behind it, and why it ended, if it did."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    why: End | None


class Reader:
    """Takes the tokens of one answer and hands on its text."""

    def __init__(self, index: int, model: LanguageModel, stops: Sequence[str], hand_on: Callable[[Event], None]):
        self.index, self.count, self._hand_on = index, 0, hand_on
        self._ends, self._text = model.ends, Text(model.tokenizer, stops)
        self._tokens: list[Token] = []

    def take(self, token: Token) -> bool:
        self.count += 1
        if token.token in self._ends:
            return True
        self._tokens.append(token)
        text = self._text.add(token.token)
        if text:
            self._give(text, None)
        return self._text.stopped

    def end(self, why: End) -> None:
        self._give(self._text.rest(), why)

    def _give(self, text: str, why: End | None) -> None:
        tokens, self._tokens = tuple(self._tokens), []
        self._hand_on(Event(self.index, text, tokens, why))


class Answers:
    """The answers to one request: `n` to each of its prompts.

    Raises:
        RequestError: a prompt is empty, too long or of unknown tokens; or the server is too busy.
    """

    def __init__(
        self, model: LanguageModel, ask: Ask, prompts: Sequence[Sequence[int]], *, client: str, timeout: float
    ):
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self.created, self.id = int(time.time()), secrets.token_hex(12)
        self.model, self.ask, self._prompts = model, ask, prompts

        def hand_on(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads on
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        owners = [i for i in range(len(prompts)) for _ in range(ask.n)]
        self.readers = [Reader(index, model, ask.stops, hand_on) for index in range(len(owners))]
        until = time.monotonic() + timeout
        self.jobs = [
            Job(
                prompts[i],
                self._limit(i),
                reader.take,
                reader.end,
                ask.draw(reader.index % ask.n),
                ask.bias,
                client,
                until,
            )
            for i, reader in zip(owners, self.readers)
        ]
        self._left = len(self.jobs)
        try:
            model.engine.submit(*self.jobs)
        except Refused as refused:
            status = 429 if refused.busy else 503
            raise RequestError(status, refused.problem, code="overloaded", after=refused.after) from None
        except ArgumentError as wrong:
            raise RequestError(400, wrong.problem, param="prompt") from None

    def _limit(self, i: int) -> int:
        room = self.model.engine.length - len(self._prompts[i])
        limit = self.ask.limit
        if room < 1 or (limit or 1) > room:
            field = self.ask.limited_by if room >= 1 else "messages" if self.model.chats(self.ask) else "prompt"
            raise RequestError(
                400, f"The context is {self.model.engine.length} tokens: the prompt has {len(self._prompts[i])}, "
                f"the answer may have {limit or 'some'}", param=field, code="context_length_exceeded")  # fmt: skip
        return limit or room

    async def __aiter__(self) -> AsyncIterator[Event]:
        """What comes, of all answers as it comes.

        Raises:
            RequestError: an answer was lost. The others are given up.
        """
        while self._left:
            event = await self._events.get()
            if event.why in LOST:
                self.cancel()
                status, problem = LOST[event.why]
                raise RequestError(status, problem, code=event.why, after=5 if status == 503 else None)
            self._left -= event.why is not None
            yield event

    def cancel(self) -> None:
        """Nobody reads on."""
        for job in self.jobs:
            job.cancel()

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, and of all answers so far."""
        read, written = sum(map(len, self._prompts)), sum(reader.count for reader in self.readers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def head(self, kind: str) -> dict[str, Any]:
        """What all objects of this request begin with."""
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model.name}


# ---------------------------------------------------------------- log probabilities
def _said(model: LanguageModel, token: int, logprob: float) -> dict[str, Any]:
    text = model.word(token)
    raw = None if HALF in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": raw}


def chat_logprobs(model: LanguageModel, tokens: Sequence[Token], alternatives: int | None) -> dict[str, Any] | None:
    """Of each token: its log probability, and the likeliest ones."""
    if alternatives is None:
        return None
    content = []
    for token, logprob, likeliest in tokens:
        others = [_said(model, *other) for other in likeliest[:alternatives]]
        content.append({**_said(model, token, logprob or 0.0), "top_logprobs": others})
    return {"content": content, "refusal": None}


def text_logprobs(model: LanguageModel, tokens: Sequence[Token], alternatives: int | None, start: int) -> Any:
    """The same as four lists; `start` is where in the answer the first token's text begins."""
    if alternatives is None:
        return None
    words = [model.word(token.token) for token in tokens]
    offsets = [start + sum(map(len, words[:i])) for i in range(len(words))]
    return {
        "tokens": words, "text_offset": offsets,
        "token_logprobs": [max(token.logprob or 0.0, LEAST) for token in tokens],
        "top_logprobs": [{model.word(i): max(p, LEAST) for i, p in token.likeliest[:alternatives]} for token in tokens],
    }  # fmt: skip
