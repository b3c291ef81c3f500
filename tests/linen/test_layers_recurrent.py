# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers of the functional face: names of their parts, carries, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.linen as nn

X = jnp.sin(jnp.arange(30.0)).reshape(2, 5, 3)
KEY = jax.random.key(0)


def test_the_parts_of_a_cell_are_modules_whose_results_can_be_captured():
    cell = nn.LSTMCell(4)
    carry = cell.initialize_carry(KEY, (2, 3))
    variables = cell.init(KEY, carry, X[:, 0])
    _, state = cell.apply(variables, carry, X[:, 0], capture_intermediates=True)
    parts = {f"{of}{gate}" for of in "ih" for gate in "ifgo"}
    assert set(variables["params"]) == parts
    assert set(state["intermediates"]) == parts | {"__call__"}


def test_both_spellings_of_the_lstm_agree():
    slow, fast = nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.OptimizedLSTMCell(4))
    y, variables = slow.init_with_output(KEY, X)
    np.testing.assert_allclose(y, fast.apply(variables, X), rtol=1e-5, atol=1e-6)


def test_an_rnn_does_what_its_cell_does_step_by_step():
    rnn = nn.RNN(nn.GRUCell(4), return_carry=True)
    (carry, ys), variables = rnn.init_with_output(KEY, X)
    cell, h = nn.GRUCell(4), jnp.zeros((2, 4))
    for t in range(5):
        h, y = cell.apply({"params": variables["params"]["cell"]}, h, X[:, t])
        np.testing.assert_allclose(y, ys[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h, carry, rtol=1e-5, atol=1e-6)


def test_the_first_carry_is_drawn_from_the_key_that_is_given():
    rnn = nn.RNN(nn.SimpleCell(4, carry_init=jax.nn.initializers.normal(1.0)))
    variables = rnn.init(KEY, X)
    ys = [rnn.apply(variables, X, init_key=key) for key in (None, jax.random.key(0), jax.random.key(1))]
    assert jnp.array_equal(ys[0], ys[1])
    assert not jnp.array_equal(ys[0], ys[2])


def test_an_input_without_time_is_refused():
    with pytest.raises(ValueError, match="without a time axis"):
        nn.RNN(nn.GRUCell(4)).init(KEY, X[0, 0])


def test_one_module_in_both_directions_is_warned_of(caplog):
    rnn = nn.RNN(nn.GRUCell(4))
    nn.Bidirectional(rnn, rnn)
    assert "share their parameters" in caplog.text
