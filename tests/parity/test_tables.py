# SPDX-License-Identifier: Apache-2.0
"""The tables of the functional face, letter by letter those of Flax."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import pytest

import batiste.linen

X = jnp.ones((3, 5))


def autoencoder(nn: ModuleType) -> Any:
    class Autoencoder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(3), nn.Dense(5)
            self.scale = self.param("scale", nn.initializers.ones, (1, 5))

        def encode(self, x):
            return self.encoder(x)

        def __call__(self, x, *, mode=None):
            return {"y": self.decoder(self.encode(x)) * self.scale, "more": [self.decoder(jnp.ones((1, 3))), mode]}

    return Autoencoder()


def nested(nn: ModuleType) -> Any:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, residual: bool):
            y = nn.relu(nn.Dense(5)(nn.LayerNorm()(x)))
            return x + y if residual else y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="last")(Block()(x, True), residual=False)

    return Model()


CASES = {
    "calls": (autoencoder, (X,), {}),
    "keywords": (autoencoder, (X,), {"mode": {"a": X, "b": (1, None)}}),
    "repeated": (autoencoder, (X,), {"show_repeated": True}),
    "a method": (autoencoder, (X,), {"method": "encode"}),
    "styled": (autoencoder, (X,), {"console_kwargs": {"width": 160}}),
    "costs": (autoencoder, (X,), {"compute_flops": True}),
    "nested": (nested, (X,), {}),
    "to a depth": (nested, (X,), {"depth": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_table(name: str) -> None:
    model, args, kwargs = CASES[name]
    kwargs = {"console_kwargs": {"width": 160, "force_terminal": False}, **kwargs}
    ours, theirs = (model(nn).tabulate(jax.random.key(0), *args, **kwargs) for nn in (batiste.linen, flax.linen))
    assert ours == theirs
