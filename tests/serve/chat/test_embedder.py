# SPDX-License-Identifier: Apache-2.0
"""Embeddings when something is wrong: too many requests, models that fail, hang or give no vectors."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from batiste.serve.chat import Embedder, RequestError


def test_texts_become_vectors_in_float32() -> None:
    embedder = Embedder("lengths", lambda texts: [[len(text), 1.0] for text in texts], tokens=len)
    vectors, tokens = asyncio.run(embedder.vectors(["a", "bcd"]))
    assert vectors.dtype == np.float32 and vectors.tolist() == [[1, 1], [3, 1]] and tokens == 4
    embedder.close()


@pytest.mark.parametrize("given", [[[1.0]], [[np.nan], [1.0]], [1.0, 2.0]])
def test_what_is_no_vector_per_text_is_not_handed_out(given) -> None:
    embedder = Embedder("wrong", lambda texts: given)
    with pytest.raises(RequestError, match="no vectors") as error:
        asyncio.run(embedder.vectors(["a", "b"]))
    assert error.value.status == 500
    embedder.close()


def test_too_many_are_refused_and_those_given_up_never_begin() -> None:
    go, begun = threading.Event(), []

    def slow(texts):
        begun.append(texts)
        go.wait(10)
        return [[1.0]] * len(texts)

    async def ask() -> list[object]:
        embedder = Embedder("slow", slow, waiting=3)
        waiting = [asyncio.ensure_future(embedder.vectors([name])) for name in "abc"]
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError) as refused:
            await embedder.vectors(["d"])
        assert refused.value.status == 429 and int(refused.value.headers["retry-after"]) >= 1
        waiting[2].cancel()
        await asyncio.sleep(0.05)
        late = asyncio.ensure_future(embedder.vectors(["e"]))  # there is room again
        await asyncio.sleep(0.05)
        go.set()
        found = await asyncio.gather(*waiting, late, return_exceptions=True)
        embedder.close()
        return found

    found = asyncio.run(ask())
    assert begun == [["a"], ["b"], ["e"]] and isinstance(found[2], asyncio.CancelledError)
