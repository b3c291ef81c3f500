# SPDX-License-Identifier: Apache-2.0
"""How each slot draws its next token: by settings of its own, from keys of its own, in one program for all of them.

What the settings do is said in `batiste.models.sampling`; here they come in rows, with a bias, seeds, and reports.

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

from batiste.models import sampling

ALTERNATIVES = 20
"""How many of the likeliest tokens are reported with their log probabilities, if asked for."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are drawn.

    Args:
        temperature, top_k, top_p, min_p, repetition, presence, frequency: see `batiste.models.sampling.Sampling`.
        seed: the same seed and prompt give the same answer, whatever else the server does.
        choice: the number of this answer among several to one prompt: each has draws of its own.
        logprobs: whether log probabilities are wanted.
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
        how = sampling.Sampling(*(getattr(self, name) for name in sampling.Sampling._fields)).rows(1)
        own = type(how)(*(np.asarray(x)[0] for x in how))
        return Draws(own, np.bool_(self.logprobs), np.frombuffer(digest, np.uint32))


class Draws(NamedTuple):
    """The settings of all rows: how[R] each draws, whether log probabilities are wanted, and the key[R, 2] of a row."""

    how: sampling.Sampling
    logprobs: ArrayLike
    key: ArrayLike

    @classmethod
    def idle(cls, rows: int) -> Draws:
        """Settings of rows that are not in use."""
        return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (rows, *np.shape(x))), Sampling().row())


class Drawn(NamedTuple):
    """What a step gives, for every row; `sound` is False where the model's logits are no numbers."""

    token: Any
    sound: Any
    logprob: Any
    likeliest: Any
    likeliest_logprob: Any


def drawn(logits_RV: Array, draws: Draws, drawn_R: Array, live_R: Array, prompted_RV: Array, generated_RV: Array,
          bias_RV: Array) -> Drawn:  # fmt: skip
    """The next token of each row; `drawn_R` counts those before. What rows do not ask for is not computed."""
    plain_RV = logits_RV.astype(jnp.float32)
    how: Any = jax.tree.map(jnp.asarray, draws.how)
    logits_RV = sampling.penalised(plain_RV, how, prompted_RV, generated_RV) + bias_RV
    random_R = live_R & (how.temperature > 0)
    narrow_R = (how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0)

    def draw():
        warm_RV = logits_RV / jnp.where(random_R, how.temperature, 1)[:, None]
        few_RV = lax.cond(jnp.any(random_R & narrow_R), lambda: sampling.filtered(warm_RV, how), lambda: warm_RV)
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
