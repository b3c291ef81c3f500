# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest sequences that can be found by keeping the K best beginnings.

score = log p(what follows the prompt) / its length ^ penalty

Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with the length alone as penalty.

Dims:  B rows   K beams   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from batiste.graph.errors import ArgumentError
from batiste.transforms.compile import jit

from .decoder import Cache, Decoder
from .generation import SIZES, begun


class Beam(NamedTuple):
    """Tokens that follow a prompt, the end among them, and their score."""

    score: float
    tokens: list[int]


def beam_search(model: Decoder, prompts: Sequence[Any], steps: int, *, beams: int = 4, ends: Iterable[int] = (),
                length_penalty: float = 1.0, sizes: Sequence[int] = SIZES) -> list[list[Beam]]:  # fmt: skip
    """The `beams` best continuations of each prompt, best first

    A row is done when it has `beams` that ended, and none of those that go on can do better if it ended now.

    Args:
        steps: the most tokens of a continuation.
        length_penalty: the power of the length; above 0 favours long ones.

    Raises:
        ArgumentError: `steps` or `beams` are below one, or there are more beams than tokens.

    >>> from batiste.graph import Rngs
    >>> from batiste.models import DECODERS
    >>> [[beam]] = beam_search(Decoder(DECODERS["tiny"], rngs=Rngs(0)), [[1, 2, 3]], 4, beams=1)
    >>> len(beam.tokens)
    4
    """
    ends = frozenset(ends)
    width = beams * (1 + len(ends))  # so many candidates hold `beams` that go on
    if min(steps, beams) < 1 or width > model.config.vocab:
        raise ArgumentError("a beam search keeps some beginnings", got=f"steps={steps}, beams={beams}",
                            expected=f"1 or more, and together at most {model.config.vocab} tokens")  # fmt: skip
    rows = [_Row(beams, model.config.vocab, ends, length_penalty, steps) for _ in prompts]
    first = begun(model, [prompt for prompt in prompts for _ in range(beams)], steps, sizes)
    cache, token_R = first.cache, first.token_B
    score_BK = np.where(np.arange(beams) == 0, 0.0, -np.inf)[None].repeat(len(prompts), 0).astype(np.float32)
    from_BK = np.broadcast_to(np.arange(beams), score_BK.shape)
    for _ in range(steps):
        source_R = (from_BK + np.arange(len(rows))[:, None] * beams).ravel().astype(np.int32)
        (best_BW, which_BW), cache = _extended(model, cache, source_R, token_R, score_BK, width)
        grown = [row.grow(*each) for row, each in zip(rows, zip(np.asarray(best_BW), np.asarray(which_BW)))]
        if all(row.done for row in rows):
            break
        score_BK, from_BK, token_BK = (np.array(each) for each in zip(*grown))
        score_BK, token_R = score_BK.astype(np.float32), token_BK.ravel().astype(np.int32)
    return [row.ended for row in rows]


@jit(static_argnames="width", donate_argnames="cache")
def _extended(model: Decoder, cache: Cache, source_R: Array, token_R: Array, score_BK: Array,
              width: int) -> tuple[tuple[Array, Array], Cache]:  # fmt: skip
    """The best of all beams with one token more, as scores and k V + token, and the cache of the beams as they were."""
    x_R1D, cache = model.hidden(token_R[:, None], cache.of_rows(source_R))
    logprobs_RV = jax.nn.log_softmax(model.logits(x_R1D)[:, 0])
    total_BKV = score_BK[..., None] + logprobs_RV.reshape(*score_BK.shape, -1)
    return jax.lax.top_k(total_BKV.reshape(len(score_BK), -1), width), cache


class _Row:
    """The beams of one prompt: those that go on, and the best of those that ended."""

    def __init__(self, beams: int, vocab: int, ends: frozenset[int], penalty: float, steps: int):
        self.beams, self.vocab, self.ends, self.penalty, self.steps = beams, vocab, ends, penalty, steps
        self.going = [Beam(0.0, [])] * beams
        self.ended: list[Beam] = []  # best first
        self.done = False

    def grow(self, score_W: np.ndarray, which_W: np.ndarray) -> tuple[list[float], list[int], list[int]]:
        """Takes the best candidates: scores, sources and last tokens of the beams that go on."""
        going = []
        for rank, (score, which) in enumerate(zip(score_W.tolist(), which_W.tolist())):
            source, token = divmod(which, self.vocab)
            beam = Beam(score, [*self.going[source].tokens, token])
            if token not in self.ends:
                going.append((source, beam))
            elif rank < self.beams:
                self._end(beam)
        sources, self.going = map(list, zip(*going[: self.beams]))
        if len(self.going[0].tokens) == self.steps and not self.done:
            for beam in self.going:
                self._end(beam)
        self.done = self.done or len(self.going[0].tokens) == self.steps or self._cannot_be_better()
        return [beam.score for beam in self.going], sources, [beam.tokens[-1] for beam in self.going]

    def _end(self, beam: Beam) -> None:
        if not self.done:
            ended = beam._replace(score=self._score(beam))
            self.ended = sorted([*self.ended, ended], key=lambda beam: -beam.score)[: self.beams]

    def _cannot_be_better(self) -> bool:
        return len(self.ended) == self.beams and self._score(self.going[0]) <= self.ended[-1].score

    def _score(self, beam: Beam) -> float:
        return beam.score / len(beam.tokens) ** self.penalty
