# SPDX-License-Identifier: Apache-2.0
"""Recurrence: cells against NumPy's formulas, the loop against a Python loop, order, lengths, streams, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, DtypeError, RngError, ShapeError, StructureError
from batiste.nn import initializers
from batiste.nn.cells import modified_orthogonal
from batiste.nn.recurrent import flip_sequences

NORMAL = initializers.normal(1.0)
CELLS = ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"]
every_cell = pytest.mark.parametrize("name", CELLS)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cell_of(name, **options):
    return getattr(nnx, name)(3, 4, bias_init=NORMAL, **options, rngs=nnx.Rngs(0))


def carry_of(cell, batch=(2,)):
    return jax.tree.map(np.asarray, cell.initialize_carry((*batch, 3), nnx.Rngs(7), NORMAL))


# ---------------------------------------------------------------- the formulas
def lstm(c, h, i, f, g, o):
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return c, sigmoid(o) * np.tanh(c)


def test_lstm():
    cell, x = cell_of("LSTMCell"), normal(2, 3)
    c, h = carry_of(cell)
    gate = lambda of_x, of_h: x @ np.asarray(of_x.kernel) + h @ np.asarray(of_h.kernel) + np.asarray(of_h.bias)
    parts = [(cell.ii, cell.hi), (cell.if_, cell.hf), (cell.ig, cell.hg), (cell.io, cell.ho)]
    c, h = lstm(c, h, *(gate(*pair) for pair in parts))
    assert_close(cell(carry_of(cell), x), ((c, h), h))


def test_optimized_lstm():
    cell, x = cell_of("OptimizedLSTMCell"), normal(2, 3)
    c, h = carry_of(cell)
    gates = x @ np.asarray(cell.dense_i.kernel) + h @ np.asarray(cell.dense_h.kernel) + np.asarray(cell.dense_h.bias)
    c, h = lstm(c, h, *np.split(np.asarray(gates), 4, axis=-1))
    assert_close(cell(carry_of(cell), x), ((c, h), h))


def test_the_two_lstms_are_the_same_for_the_same_weights():
    one, other, x = cell_of("LSTMCell"), cell_of("OptimizedLSTMCell"), normal(2, 3)
    join = lambda *parts: jnp.concatenate([part[...] for part in parts], axis=-1)
    other.dense_i.kernel[...] = join(one.ii.kernel, one.if_.kernel, one.ig.kernel, one.io.kernel)
    other.dense_h.kernel[...] = join(one.hi.kernel, one.hf.kernel, one.hg.kernel, one.ho.kernel)
    other.dense_h.bias[...] = join(one.hi.bias, one.hf.bias, one.hg.bias, one.ho.bias)
    assert_close(one(carry_of(one), x), other(carry_of(one), x))


def test_gru():
    cell, x = cell_of("GRUCell"), normal(2, 3)
    h = carry_of(cell)
    r_x, z_x, n_x = np.split(x @ np.asarray(cell.dense_i.kernel) + np.asarray(cell.dense_i.bias), 3, axis=-1)
    r_h, z_h, n_h = np.split(h @ np.asarray(cell.dense_h.kernel), 3, axis=-1)
    z = sigmoid(z_x + z_h)
    h = (1 - z) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h) + z * h
    assert_close(cell(carry_of(cell), x), (h, h))


@pytest.mark.parametrize("residual", [False, True])
def test_simple_cell(residual):
    cell, x = cell_of("SimpleCell", residual=residual), normal(2, 3)
    h = carry_of(cell)
    before = x @ np.asarray(cell.dense_i.kernel) + np.asarray(cell.dense_i.bias) + h @ np.asarray(cell.dense_h.kernel)
    y = np.tanh(before + residual * h)
    assert_close(cell(carry_of(cell), x), (y, y))


@every_cell
def test_other_functions(name):
    options = {} if name == "SimpleCell" else {"gate_fn": lambda x: jnp.zeros_like(x)}
    cell = cell_of(name, activation_fn=lambda x: jnp.ones_like(x), **options)
    carry = jax.tree.map(jnp.ones_like, carry_of(cell))
    _, y = cell(carry, normal(2, 3))
    assert_close(y, {"GRUCell": np.ones((2, 4)), "SimpleCell": np.ones((2, 4))}.get(name, np.zeros((2, 4))))


@every_cell
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_can_be_drawn(name, dtype):
    cell = cell_of(name, param_dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(cell, nnx.Param))} == {jnp.dtype(dtype)}


def test_recurrent_kernels_are_orthogonal():
    kernel = modified_orthogonal(jax.random.key(0), (4, 4))
    assert_close(kernel @ kernel.T, np.eye(4))


# ---------------------------------------------------------------- first carries
@every_cell
def test_first_carries(name):
    cell, rngs = cell_of(name), nnx.Rngs(0, carry=1)
    states = jax.tree.leaves(cell.initialize_carry((5, 2, 3), rngs))
    assert [(x.shape, float(abs(x).sum())) for x in states] == [((5, 2, 4), 0.0)] * len(states)
    assert (int(rngs.carry.count[...]), int(rngs.default.count[...])) == (len(states), 0)
    drawn = jax.tree.leaves(cell.initialize_carry((5, 2, 3), nnx.Rngs(carry=1).carry, NORMAL))
    keys = [jax.random.fold_in(jax.random.key(1), n) for n in range(len(states))]
    assert_close(drawn, [NORMAL(key, (5, 2, 4), jnp.float32) for key in keys])


@every_cell
def test_what_belongs_to_the_first_carry_is_deprecated_in_the_constructor(name):
    with pytest.warns(UserWarning, match="keep_rngs is deprecated"):
        kept = cell_of(name, keep_rngs=True)
    assert len(jax.tree.leaves(kept.initialize_carry((2, 3)))) == len(jax.tree.leaves(carry_of(kept)))
    with pytest.warns(UserWarning, match="carry_init in the constructor is deprecated"):
        cell = cell_of(name, carry_init=NORMAL)
    assert_close(cell.initialize_carry((2, 3), nnx.Rngs(7)), carry_of(cell))


# ---------------------------------------------------------------- the loop
class Sum(nnx.RNNCellBase):
    """carry + x, whose output is ten times that; counts its calls."""

    num_feature_axes = 1

    def __init__(self):
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, carry, inputs):
        self.calls[...] += 1
        return carry + inputs, 10 * (carry + inputs)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape)


X = np.arange(1, 13, dtype=np.float32).reshape(2, 6, 1)
SUMS, LENGTHS = np.cumsum(X, axis=1), np.array([2, 6])


@every_cell
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_a_loop_over_steps(name, batch):
    cell, x = cell_of(name), normal(*batch, 5, 3)
    layer = nnx.RNN(cell, return_carry=True)
    carry, ys = carry_of(cell, batch), []
    for t in range(5):
        carry, y = cell(carry, x[..., t, :])
        ys.append(y)
    assert_close(layer(x, initial_carry=carry_of(cell, batch)), (carry, jnp.stack(ys, axis=-2)))


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("by_call", [False, True])
def test_order(time_major, by_call):
    along = lambda x: np.swapaxes(x, 0, 1) if time_major else x

    def run(**options):
        if by_call:
            return nnx.RNN(Sum())(along(X), time_major=time_major, **options)
        return nnx.RNN(Sum(), time_major=time_major, **options)(along(X))

    backwards = 10 * np.cumsum(X[:, ::-1], axis=1)
    assert_close(run(), along(10 * SUMS))
    assert_close(run(reverse=True), along(backwards))
    assert_close(run(reverse=True, keep_order=True), along(backwards[:, ::-1]))
    assert_close(run(return_carry=True), (SUMS[:, -1], along(10 * SUMS)))


@pytest.mark.parametrize("time_major", [False, True])
def test_lengths(time_major):
    along = lambda x: np.swapaxes(x, 0, 1) if time_major else x
    layer = nnx.RNN(Sum(), time_major=time_major, return_carry=True)
    final = np.array([[SUMS[0, 1, 0]], [SUMS[1, 5, 0]]])
    carry, y = layer(along(X), seq_lengths=LENGTHS)
    assert_close(carry, final)
    assert_close(y, along(10 * SUMS))
    flipped = np.array([[2, 1, 6, 5, 4, 3], [12, 11, 10, 9, 8, 7]], np.float32)[..., None]
    carry, y = layer(along(X), seq_lengths=LENGTHS, reverse=True)
    assert_close(carry, final)
    assert_close(y, along(10 * np.cumsum(flipped, axis=1)))
    _, kept = layer(along(X), seq_lengths=LENGTHS, reverse=True, keep_order=True)
    assert_close(np.asarray(along(kept))[0, :2], np.asarray(along(y))[0, 1::-1])


def test_a_sequence_of_length_0_keeps_its_first_carry():
    carry, _ = nnx.RNN(Sum(), return_carry=True)(X, seq_lengths=np.array([0, 6]), initial_carry=np.full((2, 1), 5.0))
    assert_close(carry, np.array([[5.0], [5 + SUMS[1, -1, 0]]]))


def test_lengths_of_two_batch_dims():
    x, lengths = normal(3, 2, 6, 1), np.array([[1, 2], [3, 4], [5, 6]])
    carry, _ = nnx.RNN(Sum(), return_carry=True)(x, seq_lengths=lengths)
    expected = [[[np.sum(x[i, j, : lengths[i, j]])] for j in range(2)] for i in range(3)]
    assert_close(carry, np.array(expected))


def test_the_padding_has_no_gradient_through_the_carry():
    layer = nnx.RNN(nnx.SimpleCell(1, 1, rngs=nnx.Rngs(0)), return_carry=True)
    carry = np.zeros((2, 1), np.float32)
    final = lambda layer, x: layer(x, seq_lengths=LENGTHS, initial_carry=carry)[0].sum()
    d_x = nnx.grad(final, argnums=1)(layer, 0.1 * X)
    assert np.all(d_x[0, 2:] == 0)
    assert np.all(d_x[0, :2] != 0)


@pytest.mark.parametrize("lengths", [None, [1, 2, 3]])
@pytest.mark.parametrize("time_major", [False, True])
def test_flip_sequences(lengths, time_major):
    x = np.array([[1, 0, 0], [2, 3, 0], [4, 5, 6]])
    expected = x[:, ::-1] if lengths is None else np.array([[1, 0, 0], [3, 2, 0], [6, 5, 4]])
    along = lambda x: x.T if time_major else x
    flipped = flip_sequences(jnp.asarray(along(x)), None if lengths is None else jnp.asarray(lengths), 1, time_major)
    assert along(np.asarray(flipped)).tolist() == expected.tolist()


def test_variables_of_the_cell_go_from_step_to_step():
    layer = nnx.RNN(Sum(), unroll=2)
    layer(X)
    assert float(layer.cell.calls[...]) == 6


def test_an_empty_sequence():
    carry, y = nnx.RNN(Sum(), return_carry=True)(X[:, :0])
    assert y.shape == (2, 0, 1)
    assert not np.any(carry)


def test_training_in_jit():
    layer, x = nnx.RNN(cell_of("GRUCell")), normal(2, 5, 3)
    step = nnx.jit(lambda layer, x: nnx.value_and_grad(lambda layer: jnp.sum(layer(x) ** 2))(layer))
    loss, gradients = step(layer, x)
    fresh = nnx.RNN(cell_of("GRUCell"))
    assert_close(loss, jnp.sum(fresh(x) ** 2), 1e-4)
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    assert int(layer.rngs.count[...]) == 1


@pytest.mark.parametrize("graph", [True, False])
def test_it_runs_in_every_mode(graph):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(False):
        layer = nnx.RNN(Sum())
        assert_close(layer(X), 10 * SUMS)
        assert float(layer.cell.calls[...]) == 6


# ---------------------------------------------------------------- random streams
class Dropping(nnx.RNNCellBase):
    num_feature_axes = 1

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, carry, inputs):
        return carry, self.dropout(inputs)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jax.random.normal(rngs(), input_shape)


ONES = np.ones((1, 4, 50), np.float32)


def test_each_step_drops_others_unless_streams_are_broadcast():
    layer = nnx.RNN(Dropping(nnx.Rngs(0)))
    y = np.asarray(layer(ONES))
    assert not np.array_equal(y[:, 0], y[:, 1])
    assert int(layer.cell.dropout.rngs.count[...]) == 4

    layer = nnx.RNN(Dropping(nnx.Rngs(dropout=0)), broadcast_rngs="dropout")
    first, second = np.asarray(layer(ONES)), np.asarray(layer(ONES))
    assert np.all(first == first[:, :1])
    assert not np.array_equal(first, second)
    assert int(layer.cell.dropout.rngs.count[...]) == 2


def test_axes_of_the_cell_by_filter():
    axes = {nnx.RngState: None, ...: nnx.Carry}
    layer = nnx.RNN(Dropping(nnx.Rngs(0)), state_axes=axes)
    assert layer.state_axes == nnx.StateAxes(axes)
    y = layer(ONES)
    assert np.all(y == y[:, :1])


def test_first_carries_come_from_a_stream_of_the_layer():
    layer = nnx.RNN(Dropping(nnx.Rngs(0)), return_carry=True)
    assert (layer.rngs.tag, int(layer.rngs.count[...])) == ("carry", 0)
    (first, _), (second, _) = layer(ONES), layer(ONES)
    assert not np.array_equal(first, second)
    rngs = nnx.Rngs(3)
    given, _ = layer(ONES, rngs=rngs)
    assert int(rngs.default.count[...]) == 1
    assert_close(given, layer(ONES, rngs=nnx.Rngs(3).default)[0])
    assert nnx.RNN(Dropping(nnx.Rngs(0)), rngs=False).rngs is None
    assert nnx.RNN(Dropping(nnx.Rngs(0)), rngs=nnx.Rngs(carry=5)).rngs.tag == "carry"


# ---------------------------------------------------------------- both directions
def test_bidirectional():
    layer = nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()), return_carry=True)
    backwards = np.cumsum(X[:, ::-1], axis=1)
    carries, y = layer(X)
    assert_close(y, 10 * np.concatenate([SUMS, backwards[:, ::-1]], axis=-1))
    assert_close(carries, (SUMS[:, -1], backwards[:, -1]))
    assert_close(layer(X, return_carry=False, time_major=True).shape, (2, 6, 2))
    first = (np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32))
    assert_close(layer(X, initial_carry=first)[0], (1 + SUMS[:, -1], backwards[:, -1]))


def test_bidirectional_with_lengths_and_another_merge():
    layer = nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()), merge_fn=jnp.subtract)
    y = np.asarray(layer(X, seq_lengths=LENGTHS))
    assert y[0, :2, 0].tolist() == [10 - 30, 30 - 20]


def test_both_directions_draw_from_one_stream():
    layer = nnx.Bidirectional(nnx.RNN(Dropping(nnx.Rngs(0))), nnx.RNN(Dropping(nnx.Rngs(1))), return_carry=True)
    carries, _ = layer(ONES)
    assert int(layer.rngs.count[...]) == 2
    keys = [jax.random.fold_in(jax.random.key(0), n) for n in range(2)]
    assert_close(carries, tuple(jax.random.normal(key, (1, 50)) for key in keys))
    layer = nnx.Bidirectional(nnx.RNN(Dropping(nnx.Rngs(0))), nnx.RNN(Dropping(nnx.Rngs(1))), rngs=False)
    layer(ONES)
    assert int(layer.forward_rnn.rngs.count[...]) == int(layer.backward_rnn.rngs.count[...]) == 1


def test_one_layer_in_both_directions_is_told(caplog):
    one = nnx.RNN(Sum())
    nnx.Bidirectional(one, one)
    assert "share their parameters" in caplog.text


# ---------------------------------------------------------------- refused
@every_cell
def test_inputs_and_carries_have_to_fit(name):
    cell = cell_of(name)
    with pytest.raises(ShapeError, match="wrong last dim"):
        cell(carry_of(cell), normal(2, 5))
    with pytest.raises(ShapeError, match="wrong carry"):
        cell(jax.tree.map(lambda x: x[:, :2], carry_of(cell)), normal(2, 3))
    with pytest.raises(ShapeError, match="wrong carry"):
        cell(carry_of(cell, (3,)), normal(2, 3))
    with pytest.raises(RngError, match="RNGs must be provided to initialize the cell carry"):
        cell.initialize_carry((2, 3))
    with pytest.raises(ShapeError, match=r"at cell: got \(2, 7\)"):
        nnx.RNN(cell)(normal(2, 5, 7))


def test_an_lstm_carry_is_a_pair():
    with pytest.raises(StructureError, match=r"a pair \(c, h\)"):
        cell_of("LSTMCell")(normal(3, 4), normal(3, 3))
    with pytest.raises(StructureError, match="a pair, one for each layer"):
        nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()))(X, initial_carry=0)


def test_the_loop_s_arguments():
    layer = nnx.RNN(Sum())
    with pytest.raises(ShapeError, match="without a time axis"):
        layer(np.ones(3))
    with pytest.raises(ShapeError, match=r"got \(3,\), expected \(2,\)"):
        layer(X, seq_lengths=np.ones(3, int))
    with pytest.raises(DtypeError, match="whole numbers"):
        layer(X, seq_lengths=np.ones(2))
    with pytest.raises(ArgumentError, match="No filter"):
        nnx.RNN(Sum(), state_axes={nnx.Param: None})(X)


@pytest.mark.parametrize("rngs", [None, 0, jax.random.key(0)])
def test_streams_that_are_none(rngs):
    with pytest.raises((ValueError, TypeError), match="rngs"):
        nnx.RNN(Sum(), rngs=rngs)
    with pytest.raises(TypeError, match="rngs"):
        nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()), rngs=rngs)


def test_the_interface_is_empty():
    for use in (lambda c: c(1, 2), lambda c: c.initialize_carry((1,)), lambda c: c.num_feature_axes):
        with pytest.raises(NotImplementedError):
            use(nnx.RNNCellBase())
