# SPDX-License-Identifier: Apache-2.0
"""A tiny decoder of random weights in four slots, and readers of answers; compiled once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from batiste.graph import Rngs
from batiste.models import DECODERS, Decoder
from batiste.serve.chat.engine import GREEDY, Engine, Job, Token
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
