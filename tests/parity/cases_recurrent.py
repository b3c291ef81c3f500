# SPDX-License-Identifier: Apache-2.0
"""The recurrent cells for one step, RNN and Bidirectional for several."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from tests.parity.case import Case, normal

random = initializers.normal(1.0)
X, STATE, MEMORY = normal(2, 3), normal(2, 4), normal(4, 2).T
X_BTC = (normal(2, 6, 3),)
LENGTHS = np.array([2, 5], np.int32)
bf16 = jnp.bfloat16


def step(layer, x, *state):
    return layer(state if len(state) > 1 else state[0], x)


def of_cell(name):
    inputs = (X, MEMORY, STATE) if "LSTM" in name else (X, STATE)
    half = tuple(x.astype(bf16) for x in inputs)
    cell = lambda **options: lambda nnx: getattr(nnx, name)(3, 4, **options, rngs=nnx.Rngs(0))
    return [
        Case(name, cell(), inputs, call=step),
        Case(f"{name}-random", cell(bias_init=random, recurrent_kernel_init=random), inputs, call=step),
        Case(f"{name}-other-function", cell(activation_fn=jnp.sin), inputs, call=step),
        Case(f"{name}-bf16", cell(dtype=bf16), inputs, call=step, tolerance=3e-2),
        Case(f"{name}-bf16-input", cell(), half, call=step, tolerance=3e-2),
    ]


def rnn(cell="GRUCell", **options):
    return lambda nnx: nnx.RNN(getattr(nnx, cell)(3, 4, rngs=nnx.Rngs(0)), **options)


def both(nnx, **options):
    one_way = lambda cell, seed: nnx.RNN(getattr(nnx, cell)(3, 4, rngs=nnx.Rngs(seed)))
    return nnx.Bidirectional(one_way("LSTMCell", 0), one_way("GRUCell", 1), **options)


def with_lengths(layer, x):
    return layer(x, seq_lengths=LENGTHS)


CASES = [
    *(case for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell") for case in of_cell(name)),
    Case("SimpleCell-residual", lambda nnx: nnx.SimpleCell(3, 4, residual=True, rngs=nnx.Rngs(0)), (X, STATE),
         call=step),
    # ------------------------------------------------------------ RNN
    Case("rnn", rnn(), X_BTC),
    Case("rnn-lstm", rnn("LSTMCell", return_carry=True), X_BTC),
    Case("rnn-lstm-optimized", rnn("OptimizedLSTMCell", unroll=2), X_BTC),
    Case("rnn-time-major", rnn("SimpleCell", time_major=True, return_carry=True), X_BTC),
    Case("rnn-reverse", rnn(reverse=True, return_carry=True), X_BTC),
    Case("rnn-reverse-in-order", rnn(reverse=True, keep_order=True, return_carry=True), X_BTC),
    Case("rnn-lengths", rnn("LSTMCell", return_carry=True), X_BTC, call=with_lengths),
    Case("rnn-lengths-reverse", rnn(reverse=True, return_carry=True), X_BTC, call=with_lengths),
    Case("rnn-lengths-reverse-in-order", rnn(reverse=True, keep_order=True), X_BTC, call=with_lengths),
    Case("rnn-lengths-time-major", rnn(time_major=True, return_carry=True), (normal(6, 2, 3),), call=with_lengths),
    Case("rnn-given-carry", rnn(return_carry=True), (*X_BTC, STATE),
         call=lambda layer, x, carry: layer(x, initial_carry=carry)),
    Case("rnn-no-batch", rnn(return_carry=True), (X_BTC[0][0],)),
    Case("rnn-two-batch-dims", rnn(return_carry=True), (normal(3, 2, 6, 3),)),
    Case("rnn-own-stream", lambda nnx: nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0, carry=2)), X_BTC),
    Case("rnn-axes", lambda nnx: nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), state_axes=nnx.StateAxes(
        {nnx.Param: None, ...: nnx.Carry})), X_BTC),
    # ------------------------------------------------------------ Bidirectional
    Case("bidirectional", both, X_BTC),
    Case("bidirectional-carry", lambda nnx: both(nnx, return_carry=True), X_BTC, call=with_lengths),
    Case("bidirectional-sum", lambda nnx: both(nnx, merge_fn=jnp.add, rngs=nnx.Rngs(3)), X_BTC),
    Case("bidirectional-time-major", lambda nnx: both(nnx, time_major=True), X_BTC),
]  # fmt: skip
