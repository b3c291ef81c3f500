# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of recurrent cells and layers: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from batiste import nnx


class Tagger(nnx.Module):
    def __init__(self, **options):
        self.encoder = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs()), **options)

    def __call__(self, x, **options):
        return self.encoder(x, **options)


class Shrinking(nnx.RNNCellBase):
    num_feature_axes = 1

    def __call__(self, carry, inputs):
        return carry[:, :1], inputs

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def one_way() -> nnx.RNN:
    return nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs()))


X, CARRY = jnp.ones((2, 5, 3)), jnp.zeros((2, 4))

CASES: list[tuple[str, Callable[[], object]]] = [
    ("cell-wrong-input", lambda: nnx.GRUCell(3, 4, rngs=rngs())(CARRY, jnp.ones((2, 5)))),
    ("cell-wrong-carry", lambda: nnx.SimpleCell(3, 4, rngs=rngs())(jnp.zeros((2, 9)), jnp.ones((2, 3)))),
    ("cell-carry-of-another-batch", lambda: nnx.GRUCell(3, 4, rngs=rngs())(jnp.zeros((3, 4)), jnp.ones((2, 3)))),
    ("cell-carry-no-pair", lambda: nnx.LSTMCell(3, 4, rngs=rngs())((CARRY, CARRY, CARRY), jnp.ones((2, 3)))),
    ("cell-carry-without-stream", lambda: nnx.LSTMCell(3, 4, rngs=rngs()).initialize_carry((2, 3))),
    ("cell-carry-from-a-seed", lambda: nnx.LSTMCell(3, 4, rngs=rngs()).initialize_carry((2, 3), rngs=0)),
    ("cell-without-rngs", lambda: nnx.LSTMCell(3, 4, rngs=None)),
    ("rnn-wrong-features", lambda: Tagger()(jnp.ones((2, 5, 7)))),
    ("rnn-without-time", lambda: Tagger()(jnp.ones(3))),
    ("rnn-wrong-carry", lambda: Tagger()(X, initial_carry=jnp.zeros((2, 9)))),
    ("rnn-without-stream", lambda: Tagger(rngs=False)(X)),
    ("rnn-rngs-none", lambda: Tagger(rngs=None)),
    ("rnn-rngs-a-seed", lambda: Tagger(rngs=0)),
    ("rnn-lengths-of-another-batch", lambda: Tagger()(X, seq_lengths=jnp.array([1, 2, 3]))),
    ("rnn-lengths-of-floats", lambda: Tagger()(X, seq_lengths=jnp.array([1.0, 2.0]))),
    ("rnn-carry-changes-its-shape", lambda: nnx.RNN(Shrinking())(X)),
    ("rnn-axes-without-rest", lambda: Tagger(state_axes={nnx.BatchStat: nnx.Carry})(X)),
    ("bidirectional-one-carry", lambda: nnx.Bidirectional(one_way(), one_way())(X, initial_carry=3)),
    ("bidirectional-rngs-a-seed", lambda: nnx.Bidirectional(one_way(), one_way(), rngs=0)),
]
