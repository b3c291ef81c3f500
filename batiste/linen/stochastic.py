# SPDX-License-Identifier: Apache-2.0
"""Layers of the functional face that are random in training."""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array

from batiste import nn

from .calls import merge_param
from .module import Module, compact


class Dropout(Module):
    """y = x * m / (1 - rate), m drawn from Bernoulli(1 - rate), in training; y = x in evaluation

    See `batiste.nn.Dropout`.

    Args:
        deterministic: evaluation; given here or in the call.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Args:
        rng: the key to draw from, in place of one from the stream `rng_collection`.
        """
        still = merge_param("deterministic", self.deterministic, deterministic)
        if still or self.rate == 0:
            return inputs
        if self.rate != 1 and rng is None:
            rng = self.make_rng(self.rng_collection)
        layer = nn.Dropout(self.rate, broadcast_dims=tuple(self.broadcast_dims), deterministic=False)
        return layer(inputs, rngs=rng)
