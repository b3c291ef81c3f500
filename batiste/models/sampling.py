# SPDX-License-Identifier: Apache-2.0
"""How the next token is drawn: settings that are arrays, so that one program serves all of them.

logits → penalties → temperature → top k → top p → min p → a draw;  with temperature 0, the likeliest after penalties

Dims:  B rows   V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from batiste.graph.errors import ArgumentError


class Sampling(NamedTuple):
    """How tokens are drawn; each setting is a number, or an array with one per row.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: draws from the k likeliest; 0 is all.
        top_p: draws from the likeliest that together have this probability.
        min_p: draws from those with at least this part of the likeliest one's probability.
        repetition: logits of tokens that occurred, in the prompt too, are divided by it, or multiplied below zero.
        presence, frequency: taken from the logits of tokens that were generated; once, or per occurrence.

    Source: repetition: Keskar et al. 2019, "CTRL", section 4.1; top p: Holtzman et al. 2020, "The Curious Case of
        Neural Text Degeneration", eq. 2; min p: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.
    """

    temperature: ArrayLike = 0.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0
    repetition: ArrayLike = 1.0
    presence: ArrayLike = 0.0
    frequency: ArrayLike = 0.0

    def rows(self, batch: int) -> Sampling:
        """The settings as arrays of `batch` numbers.

        Raises:
            ArgumentError: one is out of range.
        """
        for name, low, high in (("temperature", 0, np.inf), ("top_k", 0, np.inf), ("top_p", 0, 1), ("min_p", 0, 1),
                                ("repetition", 1e-6, np.inf)):  # fmt: skip
            value = np.asarray(getattr(self, name))
            if not ((value >= low) & (value <= high)).all():
                raise ArgumentError(f"{name} is out of range", got=f"{name}={value.tolist()}",
                                    expected=f"from {low} to {high}")  # fmt: skip
        types = [np.int32 if name == "top_k" else np.float32 for name in self._fields]
        return Sampling(*(np.broadcast_to(np.asarray(x, t), (batch,)) for x, t in zip(self, types)))


GREEDY = Sampling()


def penalised(logits_BV: Array, s: Sampling, prompted_BV: Array, generated_BV: Array) -> Array:
    """logits · or / repetition - presence · (n > 0) - frequency · n, for a token generated n times"""
    repetition_B1, presence_B1, frequency_B1 = (
        jnp.asarray(x)[:, None] for x in (s.repetition, s.presence, s.frequency)
    )  # fmt: skip
    scaled_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(prompted_BV | (generated_BV > 0), scaled_BV, logits_BV)
    return logits_BV - presence_B1 * (generated_BV > 0) - frequency_B1 * generated_BV


def filtered(logits_BV: Array, s: Sampling) -> Array:
    """logits, and -inf for the tokens that top k, then top p, then min p leave out"""
    all_B = logits_BV.shape[-1]
    top_k_B = jnp.where(jnp.asarray(s.top_k) > 0, s.top_k, all_B).astype(jnp.float32)
    logits_BV = _kept(logits_BV, least_of(logits_BV, jnp.ones_like(logits_BV), top_k_B))
    by_p_BV = _kept(logits_BV, least_of(logits_BV, jax.nn.softmax(logits_BV), jnp.asarray(s.top_p)))
    logits_BV = jnp.where((jnp.asarray(s.top_p) >= 1)[:, None], logits_BV, by_p_BV)
    return _kept(logits_BV, jnp.max(logits_BV, axis=-1) + jnp.log(jnp.asarray(s.min_p)))


def probabilities(logits_BV: Array, s: Sampling) -> Array:
    """p[B, V] by which a token is drawn; with temperature 0, all on the likeliest"""
    temperature_B1 = jnp.asarray(s.temperature)[:, None]
    warm_BV = filtered(logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1), s)
    greedy_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])
    return jnp.where(temperature_B1 > 0, jax.nn.softmax(warm_BV), greedy_BV)


def drawn(logits_BV: Array, s: Sampling, key: Array) -> Array:
    """The next token of each row. What no row asks for is not computed."""
    temperature_B = jnp.asarray(s.temperature)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_narrow = jnp.any((jnp.asarray(s.top_k) > 0) | (jnp.asarray(s.top_p) < 1) | (jnp.asarray(s.min_p) > 0))

    def draw() -> Array:
        warm_BV = logits_BV / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
        few_BV = lax.cond(is_narrow, lambda: filtered(warm_BV, s), lambda: warm_BV)
        return jax.random.categorical(key, few_BV).astype(jnp.int32)

    drawn_B = lax.cond(jnp.any(temperature_B > 0), draw, lambda: likeliest_B)
    return jnp.where(temperature_B > 0, drawn_B, likeliest_B)


def _kept(logits_BV: Array, least_B: Array) -> Array:
    return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)


def least_of(x_BV: Array, weight_BV: Array, enough_B: Array) -> Array:
    """The largest t[B] ≤ max x with Σ weight[x ≥ t] ≥ enough, or -inf: of x in falling order, where the weight suffices

    Found by halving the ordered bits of a float, which is several times as fast as sorting the vocabulary.

    >>> x, ones = jnp.array([[1.0, 5.0, -3.0, 2.0]]), jnp.ones((1, 4))
    >>> float(least_of(x, ones, jnp.array([2.0]))[0])
    2.0
    """

    def halved(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1) + ((low_B ^ high_B) & 1)  # mean, rounded up: no overflow
        weight_B = jnp.sum(jnp.where(ordered_BV >= middle_B[:, None], weight_BV, 0), axis=-1)
        enough = weight_B >= enough_B
        return jnp.where(enough, middle_B, low_B), jnp.where(enough, high_B, middle_B - 1)

    ordered_BV = _ordered(x_BV)
    lowest_B, highest_B = _ordered(jnp.full(enough_B.shape, -jnp.inf)), jnp.max(ordered_BV, axis=-1)
    low_B, _ = lax.fori_loop(0, 32, halved, (lowest_B, highest_B))
    return _unordered(low_B)


def _ordered(x: Array) -> Array:
    """int32 in the order of these float32"""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unordered(x: Array) -> Array:
    return lax.bitcast_convert_type(x ^ ((x >> 31) & 0x7FFFFFFF), jnp.float32)
