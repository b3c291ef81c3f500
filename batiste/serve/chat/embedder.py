# SPDX-License-Identifier: Apache-2.0
"""Texts to vectors under a name, one batch at a time in a thread of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .errors import RequestError


class Embedder:
    """What turns texts into vectors.

    Args:
        name: by which clients ask for it.
        embed: vectors[N, D] of N texts, such as `SentenceEncoder.encode`.
        tokens: how many tokens a text has, for the client's bill.
        most: the most tokens of a text, if `tokens` is given.
        waiting: the most requests that wait.
    """

    def __init__(self, name: str, embed: Callable[[Sequence[str]], Any], *,
                 tokens: Callable[[str], int] | None = None, most: int | None = None, waiting: int = 64):  # fmt: skip
        self.name, self.created = name, int(time.time())
        self._embed, self._tokens, self._most = embed, tokens, most
        self._asked: set[Future[Any]] = set()
        self._most_waiting, self._seconds = waiting, 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batiste-embed")

    async def vectors(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """vectors[N, D] in float32, and the number of tokens.

        Raises:
            RequestError: too many wait, a text is too long, or the model fails on these texts.
        """
        if len(self._asked) >= self._most_waiting:
            raise RequestError(429, "Too many requests wait", code="overloaded", after=len(self._asked) * self._seconds)
        future = self._thread.submit(self._run, texts)
        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        return await asyncio.wrap_future(future)  # given up, it does not begin

    def close(self) -> None:
        """Ends the thread, once what waits is done."""
        self._thread.shutdown()

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "batiste"}

    def _run(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        began = time.monotonic()
        counts = [self._tokens(text) if self._tokens else 0 for text in texts]
        for i, count in enumerate(counts):
            if self._most is not None and count > self._most:
                raise RequestError(400, f"'input[{i}]' has {count} tokens, expected at most {self._most}",
                                   param=f"input[{i}]", code="context_length_exceeded")  # fmt: skip
        vectors = np.asarray(self._embed(texts), np.float32)
        if vectors.shape[:1] != (len(texts),) or vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise RequestError(500, "The model gave no vectors for these texts")
        self._seconds = time.monotonic() - began
        return vectors, sum(counts)
