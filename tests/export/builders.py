# SPDX-License-Identifier: Apache-2.0
"""What bundles of the tests are exported anew from."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from batiste import linen, nnx


class Classifier(nnx.Module):
    """A table of symbols, a layer, statistics and dropout: y[batch, classes] of tokens[batch, length]"""

    def __init__(self, classes: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens):
        return self.logits(tokens)

    def logits(self, tokens, scale=1.0):
        seen = (tokens > 0)[..., None]
        x = jnp.where(seen, self.embed(tokens), 0).sum(1) / seen.sum(1).clip(1)
        return {"logits": scale * self.head(self.dropout(self.norm(x)))}


def classifier(classes: int = 3, seed: int = 0) -> Classifier:
    model = Classifier(classes, nnx.Rngs(seed))
    model.eval()
    return model


def functional() -> linen.Module:
    return linen.Dense(3)


def scale(weights: Any, x: Any) -> Any:
    return x * weights["by"]


def function() -> Any:
    return scale
