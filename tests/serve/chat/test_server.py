# SPDX-License-Identifier: Apache-2.0
"""Language models behind the server of all models: its keys, its limits, its end."""

from __future__ import annotations

import httpx
import openai
import pytest

from batiste.serve import Server
from batiste.serve.chat import Api, Engine, LanguageModel

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def server(slots, tokenizer):
    slots.clear()
    server = Server(
        chat=Api([LanguageModel("tiny", Engine(slots), tokenizer)]), keys=["right"], most_bytes=10_000
    ).warm()
    yield server
    server.close(1)


def test_chat_stands_beside_the_other_routes(server, serving) -> None:
    with serving(server) as address, openai.OpenAI(base_url=address, api_key="right", max_retries=0) as client:
        ask = dict(model="tiny", messages=HELLO, max_tokens=6, seed=1, temperature=1)
        whole = client.chat.completions.create(**ask).choices[0].message.content
        parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(parts) == whole and client.models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        root = address.removesuffix("/v1")
        assert httpx.get(f"{root}/readyz").status_code == 200
        headers = {"content-type": "application/json", "authorization": "Bearer right"}
        for body in (b" " * 20_000, iter([b" " * 9000] * 3)):  # with its length, and without
            assert httpx.post(f"{address}/chat/completions", content=body, headers=headers).status_code == 413


def test_closing_answers_what_has_begun_and_refuses_the_rest(server, serving) -> None:
    with serving(server) as address, openai.OpenAI(base_url=address, api_key="right", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="abc", max_tokens=40, stream=True,
                                           logit_bias={"255": -100, "253": -100})  # fmt: skip
        first = next(stream)
        server.gate.draining = True
        assert httpx.get(f"{address.removesuffix('/v1')}/readyz").status_code == 503
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tiny", prompt="abc")
        assert refused.value.status_code == 503 and "retry-after" in refused.value.response.headers
        server.close(10)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and first.choices
