# SPDX-License-Identifier: Apache-2.0
"""Losses that optax does not have: cross-entropy over a large vocabulary, without the logits of the whole batch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.sharding import constrain


class TokenLoss(NamedTuple):
    """Sums over tokens: divide by `weight` for means.

    Args:
        loss: Σ w (log Z - logit of the label + z_loss (log Z)²), float32.
        weight: Σ w, float32.
        correct: Σ w [the label has the highest logit], float32.
    """

    loss: Array
    weight: Array
    correct: Array


def chunked_cross_entropy(x: Array, head: Array, labels: Array, weights: Array | None = None, *, chunks: int = 8,
                          z_loss: float = 0.0, cap: float | None = None) -> TokenLoss:  # fmt: skip
    """Σ w (log Σ_v exp(x·head[:, v]) - x·head[:, label]) over tokens, some of them at a time

    The logits (tokens, vocabulary) exist for one chunk of tokens only, forward and backward (they are computed twice);
    products run in the dtype of `x`, sums in float32.

    Args:
        x: (..., features), the last hidden states.
        head: (features, vocabulary); of a tied embedding, its transpose.
        labels: (...), integers.
        weights: (...), such as 0 for padding; all 1 if left out.
        chunks: in how many parts; the number of tokens is padded to a multiple of it.
        z_loss: weight of the square of log Z, which keeps Z near 1 (Chowdhery et al. 2022, PaLM, section 5).
        cap: of the logits; see `soft_capped`.

    Raises:
        ShapeError: shapes do not fit.
        ArgumentError: `chunks` is below one.

    >>> x, head = jnp.ones((2, 3)), jnp.zeros((3, 4))
    >>> round(float(chunked_cross_entropy(x, head, jnp.array([0, 1]), chunks=2).loss), 3)  # 2 log 4
    2.773
    """
    if labels.shape != x.shape[:-1] or (weights is not None and weights.shape != labels.shape):
        got = labels.shape if labels.shape != x.shape[:-1] else weights.shape  # type: ignore[union-attr]
        raise ShapeError("chunked_cross_entropy wants one label and one weight per token", got=got,
                         expected=x.shape[:-1], fix="cut or pad them to the tokens of x")  # fmt: skip
    if head.ndim != 2 or head.shape[0] != x.shape[-1]:
        raise ShapeError("the head does not fit the hidden states", got=head.shape,
                         expected=f"({x.shape[-1]}, vocabulary)", fix="transpose a tied embedding")  # fmt: skip
    if chunks < 1:
        raise ArgumentError("chunks is a number of parts", got=chunks, expected="1 or more", fix="pass chunks=8")
    head = constrain(head.astype(x.dtype), (None, "vocab"))  # where a plan divides it: gathered once for all parts
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    tokens = labels.size
    padding = -tokens % chunks
    parts = (x.reshape(tokens, -1), labels.reshape(-1), weights.reshape(-1))
    parts = [jnp.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) for part in parts]
    # Every chunk takes each chunks-th token: where tokens are divided among devices, each keeps to its own.
    parts = [jnp.moveaxis(part.reshape(-1, chunks, *part.shape[1:]), 1, 0) for part in parts]

    @partial(jax.checkpoint, prevent_cse=False)
    def add(sums: TokenLoss, part: list[Array]) -> tuple[TokenLoss, None]:
        x, labels, weights = part
        logits = soft_capped(jnp.dot(x, head, preferred_element_type=jnp.float32), cap)
        top = jnp.max(logits, -1)
        log_z = jax.nn.logsumexp(logits, -1)
        of_label = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        loss = log_z - of_label + z_loss * jnp.square(log_z)
        new = TokenLoss((loss * weights).sum(), weights.sum(), ((of_label >= top) * weights).sum())
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, TokenLoss(zero, zero, zero), parts)[0]


def soft_capped(x: Array, cap: float | None) -> Array:
    """cap tanh(x / cap), between -cap and cap; x, if there is none

    Source: Gemma Team 2024, "Gemma 2", section 2, logit soft-capping.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
