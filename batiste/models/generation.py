# SPDX-License-Identifier: Apache-2.0
"""Generation: tokens one after another, each drawn from what the model says of those before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.transforms.compile import jit

from .decoder import Cache, Decoder


def generate(model: Decoder, prompt_BT: Array, steps: int, *, temperature: float = 0.0, top_k: int | None = None,
             key: Array | None = None) -> Array:  # fmt: skip
    """tokens[B, T + steps]: the prompts, and what follows

    Two programs are compiled: one reads the prompts, one takes a step.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it, and a token is drawn.
        top_k: draws from the k likeliest tokens only.
        key: what the draws are made from.

    Raises:
        ArgumentError: `steps` is below one, `temperature` is negative, or `top_k` is no number of tokens.
        RngError: there is a temperature and no key.

    >>> from batiste.graph import Rngs
    >>> from batiste.models import DECODERS
    >>> generate(Decoder(DECODERS["tiny"], rngs=Rngs(0)), jnp.zeros((1, 3), int), 4).shape
    (1, 7)
    """
    if steps < 1 or temperature < 0 or (top_k is not None and not 1 <= top_k <= model.config.vocab):
        raise ArgumentError("steps, temperature and top_k say how tokens are drawn",
                            got=f"steps={steps}, temperature={temperature}, top_k={top_k}",
                            expected="steps ≥ 1, temperature ≥ 0, top_k within the vocabulary")  # fmt: skip
    if temperature > 0 and key is None:
        raise RngError("drawing tokens needs a key", fix="pass key=jax.random.key(0), or temperature=0")
    if prompt_BT.ndim != 2 or not prompt_BT.shape[1]:
        raise ShapeError("a prompt is a row of tokens", got=prompt_BT.shape, expected="(batch, length ≥ 1)")
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)
    cache = model.cache(prompt_BT.shape[0], prompt_BT.shape[1] + steps)
    tokens = [prompt_BT]
    for i in range(steps):
        token_B1, cache = _next(model, tokens[-1], cache, keys[i], float(temperature), top_k)
        tokens.append(token_B1.astype(prompt_BT.dtype))
    return jnp.concatenate(tokens, axis=1)


@jit(static_argnames=("temperature", "top_k"), donate_argnames="cache")
def _next(model: Decoder, tokens_BT: Array, cache: Cache, key: Array, temperature: float,
          top_k: int | None) -> tuple[Array, Cache | None]:  # fmt: skip
    """The token after these, and the cache with them."""
    x_BTD, filled = model.hidden(tokens_BT, cache)
    logits_BV = model.logits(x_BTD[:, -1:])[:, 0]
    if top_k is not None:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    chosen_B = jax.random.categorical(key, logits_BV / temperature) if temperature else jnp.argmax(logits_BV, axis=-1)
    return chosen_B[:, None], filled
