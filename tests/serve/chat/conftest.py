# SPDX-License-Identifier: Apache-2.0
"""A tiny decoder of random weights in four slots, and readers of answers; compiled once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import openai
import pytest
import uvicorn

from batiste.graph import Rngs
from batiste.models import DECODERS, Decoder
from batiste.serve.chat.api import Api
from batiste.serve.chat.embedder import Embedder
from batiste.serve.chat.engine import GREEDY, Engine, Job, Token
from batiste.serve.chat.model import LanguageModel
from batiste.serve.chat.sampling import Sampling
from batiste.serve.chat.slots import Slots

LENGTH = 64


@pytest.fixture(scope="session")
def model() -> Decoder:
    return Decoder(DECODERS["tiny"], rngs=Rngs(0))


@pytest.fixture(scope="session")
def slots(model: Decoder) -> Slots:
    return Slots(model, count=4, length=LENGTH, pieces=(8, 16))


@pytest.fixture
def engine(slots: Slots):
    slots.clear()
    with Engine(slots, waiting=64) as engine:
        yield engine


class Answer:
    """What a job was given, and why it ended."""

    def __init__(self, prompt: Sequence[int], limit: int = 8, sampling: Sampling = GREEDY, *, stop: int = -1, **more):
        self.tokens: list[Token] = []
        self.why = ""
        self.over, self.began = threading.Event(), threading.Event()
        self.stop = stop
        self.job = Job(list(prompt), limit, self.take, self.end, sampling, **more)

    def take(self, token: Token) -> bool:
        self.tokens.append(token)
        self.began.set()
        return token.token == self.stop

    def end(self, why: str) -> None:
        assert not self.why, "an answer ends once"
        self.why = why
        self.over.set()

    @property
    def ids(self) -> list[int]:
        assert self.over.wait(30), "the answer does not come"
        return [token.token for token in self.tokens]


def asked(engine: Engine, *answers: Answer) -> list[list[int]]:
    """The answers' tokens, asked for together."""
    engine.submit(*(answer.job for answer in answers))
    return [answer.ids for answer in answers]


@pytest.fixture(scope="session", name="answer")
def answer_maker() -> type[Answer]:
    return Answer


@pytest.fixture(scope="session", name="asked")
def asked_maker():
    return asked


# ---------------------------------------------------------------- a server
class Bytes:
    """Text as its bytes in UTF-8; special tokens take numbers that are no such bytes."""

    longest = 1
    specials: ClassVar = {"<|im_start|>": 0xFE, "<|im_end|>": 0xFF, "<|endoftext|>": 0xFD}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 0xFD).decode(errors="replace")


def embed(texts: Sequence[str]) -> np.ndarray:
    """Vectors that tell texts apart: lengths, vowels, first letters."""
    return np.array([[len(t), sum(map(t.count, "aeiou")), ord(t[0])] for t in texts], np.float32) / 8


@contextlib.contextmanager
def serving(api: Api):
    """The API on a port of the loopback interface, by uvicorn in a thread; gives its address."""
    config = uvicorn.Config(api.app(), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def tokenizer() -> Bytes:
    return Bytes()


@pytest.fixture(scope="module")
def api(model: Decoder):
    """`tiny` in slots of its own, and the embedder `letters`."""
    slots = Slots(model, count=4, length=LENGTH * 4, pieces=(64,))
    api = Api(
        [LanguageModel("tiny", Engine(slots, waiting=12), Bytes()), Embedder("letters", embed, tokens=len, most=64)]
    )
    yield api
    api.close(5)


@pytest.fixture(scope="module")
def address(api: Api):
    with serving(api) as address:
        yield address


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def client(address: str):
    with client_of(address) as client:
        yield client


@pytest.fixture(scope="session", name="serving")
def serving_maker():
    return serving


@pytest.fixture(scope="session")
def openai_client():
    return client_of
