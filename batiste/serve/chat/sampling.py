# SPDX-License-Identifier: Apache-2.0
"""How each row of a batch draws its next token: the settings are arrays, so that one program serves all of them.

logits → penalties → temperature → top k → top p → min p → a draw;  with temperature 0, the likeliest after penalties

Dims:  R rows (slots)   V vocabulary   N alternatives that are reported
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

ALTERNATIVES = 20
"""How many of the likeliest tokens are reported with their log probabilities, if asked for."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are drawn.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: draws from the k likeliest; 0 is all.
        top_p: draws from the likeliest that together have this probability.
        min_p: draws from those with at least this part of the likeliest one's probability.
        repetition: logits of tokens that occurred, in the prompt too, are divided by it, or multiplied below zero.
        presence, frequency: taken from the logits of tokens that were generated; once, or per occurrence.
        seed: the same seed and prompt give the same answer, whatever else the server does.
        choice: the number of this answer among several to one prompt: each has draws of its own.
        logprobs: whether log probabilities are wanted.

    Source: repetition: Keskar et al. 2019, "CTRL", section 4.1; top p: Holtzman et al. 2020, "The Curious Case of
        Neural Text Degeneration", eq. 2; min p: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    choice: int = 0
    logprobs: bool = False

    def row(self) -> Draws:
        """These settings as one row of the arrays."""
        digest = hashlib.blake2b(f"{self.seed} {self.choice}".encode(), digest_size=8).digest()
        return Draws(
            *(np.float32(getattr(self, name)) for name in Draws._fields[:-3]),
            top_k=np.int32(self.top_k), logprobs=np.bool_(self.logprobs), key=np.frombuffer(digest, np.uint32),
        )  # fmt: skip


class Draws(NamedTuple):
    """The settings of all rows, each an array [R]; key[R, 2]."""

    temperature: ArrayLike
    top_p: ArrayLike
    min_p: ArrayLike
    repetition: ArrayLike
    presence: ArrayLike
    frequency: ArrayLike
    top_k: ArrayLike
    logprobs: ArrayLike
    key: ArrayLike

    @classmethod
    def idle(cls, rows: int) -> Draws:
        """Settings of rows that are not in use."""
        return cls(*(jnp.broadcast_to(jnp.asarray(x), (rows, *np.shape(x))) for x in Sampling().row()))


class Drawn(NamedTuple):
    """What a step gives, for every row; `sound` is False where the model's logits are no numbers."""

    token: Any
    sound: Any
    logprob: Any
    likeliest: Any
    likeliest_logprob: Any


def penalised(logits_RV: Array, draws: Draws, prompted_RV: Array, generated_RV: Array, bias_RV: Array) -> Array:
    """logits · or / repetition - presence · (n > 0) - frequency · n + bias, for a token generated n times"""
    repetition_R1, presence_R1, frequency_R1 = (
        jnp.asarray(x)[:, None] for x in (draws.repetition, draws.presence, draws.frequency)
    )
    scaled_RV = jnp.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = jnp.where(prompted_RV | (generated_RV > 0), scaled_RV, logits_RV)
    return logits_RV - presence_R1 * (generated_RV > 0) - frequency_R1 * generated_RV + bias_RV


def filtered(logits_RV: Array, draws: Draws) -> Array:
    """logits, and -inf for the tokens that top k, then top p, then min p leave out"""
    ones_RV = jnp.ones_like(logits_RV)
    top_k_R = jnp.where(jnp.asarray(draws.top_k) > 0, draws.top_k, logits_RV.shape[-1]).astype(jnp.float32)
    logits_RV = _kept(logits_RV, least_of(logits_RV, ones_RV, top_k_R))
    p_RV = jax.nn.softmax(logits_RV)
    everything_R1 = (jnp.asarray(draws.top_p) >= 1)[:, None]
    by_p_RV = _kept(logits_RV, least_of(logits_RV, p_RV, jnp.asarray(draws.top_p)))
    logits_RV = jnp.where(everything_R1, logits_RV, by_p_RV)
    least_R = jnp.max(logits_RV, axis=-1) + jnp.log(jnp.asarray(draws.min_p))
    return _kept(logits_RV, least_R)


def _kept(logits_RV: Array, least_R: Array) -> Array:
    return jnp.where(logits_RV >= least_R[:, None], logits_RV, -jnp.inf)


def least_of(x_RV: Array, weight_RV: Array, enough_R: Array) -> Array:
    """The largest t[R] ≤ max x with Σ weight[x ≥ t] ≥ enough, or -inf: of x in falling order, where the weight suffices

    Found by halving the ordered bits of a float, which is several times as fast as sorting the vocabulary.

    >>> x, ones = jnp.array([[1.0, 5.0, -3.0, 2.0]]), jnp.ones((1, 4))
    >>> float(least_of(x, ones, jnp.array([2.0]))[0])
    2.0
    """

    def halved(_, bounds):
        low_R, high_R = bounds
        middle_R = (low_R & high_R) + ((low_R ^ high_R) >> 1) + ((low_R ^ high_R) & 1)  # mean, rounded up: no overflow
        weight_R = jnp.sum(jnp.where(ordered_RV >= middle_R[:, None], weight_RV, 0), axis=-1)
        enough = weight_R >= enough_R
        return jnp.where(enough, middle_R, low_R), jnp.where(enough, high_R, middle_R - 1)

    ordered_RV = _ordered(x_RV)
    lowest_R, highest_R = _ordered(jnp.full(enough_R.shape, -jnp.inf)), jnp.max(ordered_RV, axis=-1)
    low_R, _ = lax.fori_loop(0, 32, halved, (lowest_R, highest_R))
    return _unordered(low_R)


def _ordered(x: Array) -> Array:
    """int32 in the order of these float32"""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unordered(x: Array) -> Array:
    return lax.bitcast_convert_type(x ^ ((x >> 31) & 0x7FFFFFFF), jnp.float32)


def drawn(logits_RV: Array, draws: Draws, drawn_R: Array, live_R: Array, prompted_RV: Array, generated_RV: Array,
          bias_RV: Array) -> Drawn:  # fmt: skip
    """The next token of each row; `drawn_R` counts those before. What rows do not ask for is not computed."""
    plain_RV = logits_RV.astype(jnp.float32)
    logits_RV = penalised(plain_RV, draws, prompted_RV, generated_RV, bias_RV)
    temperature_R = jnp.asarray(draws.temperature)
    random_R = live_R & (temperature_R > 0)
    narrow_R = (jnp.asarray(draws.top_k) > 0) | (jnp.asarray(draws.top_p) < 1) | (jnp.asarray(draws.min_p) > 0)

    def draw():
        warm_RV = logits_RV / jnp.where(random_R, temperature_R, 1)[:, None]
        few_RV = lax.cond(jnp.any(random_R & narrow_R), lambda: filtered(warm_RV, draws), lambda: warm_RV)
        gumbel_RV = jax.vmap(_gumbel, in_axes=(0, 0, None))(jnp.asarray(draws.key), drawn_R, logits_RV.shape[-1])
        return jnp.argmax(few_RV + gumbel_RV, axis=-1).astype(jnp.int32)

    def report():
        logprob_RV = jax.nn.log_softmax(plain_RV)
        best_RN, which_RN = lax.top_k(logprob_RV, shape[-1])
        return jnp.take_along_axis(logprob_RV, token_R[:, None], axis=-1)[:, 0], which_RN, best_RN

    likeliest_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    drawn_token_R = lax.cond(jnp.any(random_R), draw, lambda: likeliest_R)
    token_R = jnp.where(random_R, drawn_token_R, likeliest_R)
    rows, shape = token_R.shape, (token_R.shape[0], min(ALTERNATIVES, logits_RV.shape[-1]))
    nothing = (jnp.zeros(rows), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    logprob_R, which_RN, best_RN = lax.cond(
        jnp.any(live_R & jnp.asarray(draws.logprobs)), report, lambda: nothing)  # fmt: skip
    sound_R = jnp.isfinite(jnp.max(plain_RV, axis=-1))  # the largest of numbers and a NaN is a NaN
    return Drawn(token_R, sound_R, logprob_R, which_RN, best_RN)


def _gumbel(key_2: Array, count: Array, vocab: int) -> Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), count)
    return jax.random.gumbel(key, (vocab,))
