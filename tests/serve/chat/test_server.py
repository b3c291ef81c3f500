# SPDX-License-Identifier: Apache-2.0
"""Language models behind the server of all models: its keys, its limits, its end."""

from __future__ import annotations

import re
import threading
import time

import httpx
import openai
import pytest

from batiste.serve import Server
from batiste.serve.chat import Api, Engine, Job, LanguageModel

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
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key="wrong").models.list()
        assert refused.value.code == "invalid_api_key" and "A key is needed" in refused.value.message
        assert isinstance(refused.value.body, dict) and refused.value.body["type"] == "authentication_error"
        root = address.removesuffix("/v1")
        assert httpx.get(f"{root}/readyz").status_code == 200
        headers = {"content-type": "application/json", "authorization": "Bearer right"}
        for body in (b" " * 20_000, iter([b" " * 9000] * 3)):  # with its length, and without
            answer = httpx.post(f"{address}/chat/completions", content=body, headers=headers)
            assert answer.status_code == 413 and answer.json()["error"]["type"] == "invalid_request_error"
        assert isinstance(httpx.get(f"{root}/v2").json()["error"], str), "elsewhere in the words of the other protocol"
        figures = httpx.get(f"{root}/metrics", headers=headers).text
        assert 'batiste_slots{model="tiny"} 4.0' in figures and 'batiste_slots_busy{model="tiny"} 0.0' in figures
        counted = dict(re.findall(r"(batiste_\w+\{[^}]*\}) (\S+)", figures))
        assert counted['batiste_tokens_total{kind="decode",model="tiny"}'] == "12.0"
        assert float(counted['batiste_tokens_total{kind="prefill",model="tiny"}']) > 20
        assert counted['batiste_first_token_seconds_count{model="tiny"}'] == "2.0"
        assert counted['batiste_round_seconds_count{kind="decode",model="tiny"}'] == "12.0"


def test_who_finds_no_slot_is_told_when_to_come_again_and_the_client_does(slots, tokenizer, serving) -> None:
    slots.clear()
    engine, go = Engine(slots, waiting=1), threading.Event()
    server = Server(chat=Api([LanguageModel("tiny", engine, tokenizer)])).warm()
    hold = lambda token: not go.wait(20)
    engine.submit(*(Job([1], 2, hold, lambda why: None) for _ in range(5)))
    with serving(server) as address, openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        ask = lambda client: client.completions.create(model="tiny", prompt="a", max_tokens=2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert refused.value.code == "overloaded" and int(refused.value.response.headers["retry-after"]) >= 1
        threading.Timer(0.1, go.set).start()
        start = time.monotonic()
        assert ask(client.with_options(max_retries=1)).choices
        assert time.monotonic() - start > 0.9, "the second time came when it was told"
    server.close(5)


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
