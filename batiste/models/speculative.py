# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a small model guesses some tokens, the large one reads them at once and keeps what fits it.

guess x ~ q;  kept with probability min(1, p(x) / q(x));  the first that is not, is drawn from max(p - q, 0) / Σ instead

What comes is distributed as the large model's own draws; with temperature 0 it is the same, token for token.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1.

Dims:  B rows   G guesses   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batiste.graph.errors import ArgumentError, RngError
from batiste.transforms.compile import jit

from .decoder import Cache, Decoder
from .generation import PIECE, SIZES, begun
from .sampling import GREEDY, Sampling, probabilities


class Guessed(NamedTuple):
    """token[B, G + 1], of which the first count[B] are to be taken"""

    token_BG: Array
    count_B: Array


def speculate(model: Decoder, draft: Decoder, prompts: Sequence[Any], steps: int, sampling: Sampling = GREEDY, *,
              guesses: int = 4, ends: Iterable[int] = (), key: Array | None = None,
              sizes: Sequence[int] = SIZES) -> Iterator[list[list[int]]]:  # fmt: skip
    """The new tokens of each row, from 1 to guesses + 1 at a time; rows that have `steps` tokens, or ended, get none

    Args:
        draft: a smaller model over the same vocabulary.
        guesses: of the draft, before the model reads them.
        sampling: without penalties.

    Raises:
        ArgumentError: the vocabularies differ, a number is below one, or there are penalties.
        RngError: there is a temperature and no key.
    """
    penalties = np.ravel(sampling.repetition) - 1, np.ravel(sampling.presence), np.ravel(sampling.frequency)
    if steps < 1 or not 1 <= guesses < PIECE or any(map(np.any, penalties)):
        raise ArgumentError("guesses are drawn without penalties, one or more at a time",
                            got=f"steps={steps}, guesses={guesses}, {sampling}",
                            expected=f"steps ≥ 1, guesses from 1 to {PIECE - 1}, no penalties")  # fmt: skip
    if model.config.vocab != draft.config.vocab:
        raise ArgumentError("both models have one vocabulary", got=f"{draft.config.vocab} tokens of the draft",
                            expected=model.config.vocab, fix="take a draft of the same family")  # fmt: skip
    if key is None and np.any(np.asarray(sampling.temperature) > 0):
        raise RngError("drawing tokens needs a key", fix="pass key=jax.random.key(0), or temperature=0")
    key = jax.random.key(0) if key is None else key
    settings, ends = sampling.rows(len(prompts)), frozenset(ends)
    first, second = (begun(each, prompts, steps + 2 * guesses + 2, sizes) for each in (model, draft))
    caches, token_B = (first.cache, second.cache), first.token_B
    left = [steps] * len(prompts)
    turn = 0
    while any(left):
        live_B = np.array([n > 0 for n in left])
        found, token_B, caches = _turn(model, draft, caches, token_B, settings, jax.random.fold_in(key, turn), live_B,
                                       guesses)  # fmt: skip
        rows = [row[:n].tolist() for row, n in zip(np.asarray(found.token_BG), np.minimum(found.count_B, left))]
        rows = [_until(row, ends) for row in rows]
        left = [0 if row and row[-1] in ends else n - len(row) for row, n in zip(rows, left)]
        turn += 1
        yield rows


def _until(row: list[int], ends: frozenset[int]) -> list[int]:
    """The row up to the first token that ends it."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


@jit(static_argnames="guesses", donate_argnames="caches")
def _turn(model: Decoder, draft: Decoder, caches: tuple[Cache, Cache], token_B: Array, sampling: Sampling, key: Array,
          live_B: Array, guesses: int) -> tuple[Guessed, Array, tuple[Cache, Cache]]:  # fmt: skip
    start_B, (own, drafts) = caches[0].filled, caches
    guess_key, verify_key = jax.random.split(key)
    token, q_GBV = token_B, []
    row_GB = [token_B]
    for i in range(guesses + 1):  # the last is read only to fill the cache
        x_B1D, drafts = draft.hidden(token[:, None], drafts)
        if i < guesses:
            q_GBV.append(probabilities(draft.logits(x_B1D)[:, 0], sampling))
            token = jax.random.categorical(jax.random.fold_in(guess_key, i), jnp.log(q_GBV[-1])).astype(jnp.int32)
            row_GB.append(token)
    read_BG, q_BGV = jnp.stack(row_GB, axis=1), jnp.stack(q_GBV, axis=1)
    x_BGD, own = model.hidden(read_BG, own)
    p_BGV = jax.vmap(lambda logits_BV: probabilities(logits_BV, sampling), in_axes=1, out_axes=1)(model.logits(x_BGD))
    found = verified(read_BG[:, 1:], q_BGV, p_BGV, verify_key)
    filled_B = start_B + jnp.where(live_B, found.count_B, 0)
    last_B = jnp.take_along_axis(found.token_BG, found.count_B[:, None] - 1, axis=1)[:, 0]
    return found, last_B, (own._replace(filled=filled_B), drafts._replace(filled=filled_B))


def verified(guess_BG: Array, q_BGV: Array, p_BGV: Array, key: Array) -> Guessed:
    """The guesses that are kept, and one token more: p has a position more than q."""
    guesses = guess_BG.shape[1]
    keep_key, draw_key = jax.random.split(key)
    p_of_BG, q_of_BG = (jnp.take_along_axis(x[:, :guesses], guess_BG[..., None], axis=-1)[..., 0]
                        for x in (p_BGV, q_BGV))  # fmt: skip
    kept_BG = jax.random.uniform(keep_key, guess_BG.shape) * q_of_BG < p_of_BG
    count_B = jnp.cumprod(kept_BG.astype(jnp.int32), axis=1).sum(axis=1)
    q_BGV = jnp.pad(q_BGV, ((0, 0), (0, 1), (0, 0)))  # behind the last guess, the model draws on its own
    at_B11 = count_B[:, None, None]
    p_BV, q_BV = (jnp.take_along_axis(x, at_B11, axis=1)[:, 0] for x in (p_BGV, q_BGV))
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    rest_BV = jnp.where(rest_BV.sum(axis=-1, keepdims=True) > 0, rest_BV, p_BV)
    more_B = jax.random.categorical(draw_key, jnp.log(rest_BV)).astype(jnp.int32)
    padded_BG = jnp.pad(guess_BG, ((0, 0), (0, 1)))
    token_BG = jnp.where(jnp.arange(guesses + 1)[None] == count_B[:, None], more_B[:, None], padded_BG)
    return Guessed(token_BG, count_B + 1)
