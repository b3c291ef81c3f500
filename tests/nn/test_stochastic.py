# SPDX-License-Identifier: Apache-2.0
"""Dropout: what it drops, where its keys come from, and how it is switched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, DtypeError, RngError

X = jnp.ones((40, 50))


def test_the_share_that_is_dropped_and_the_mean():
    y = nnx.Dropout(0.25, rngs=nnx.Rngs(0))(X)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.03
    assert abs(float(y.mean()) - 1) < 0.05


def test_the_mask_is_a_bernoulli_draw_with_the_stream_s_next_key():
    layer = nnx.Dropout(0.25, rngs=nnx.Rngs(0))
    key = jax.random.fold_in(layer.rngs.key[...], 0)
    np.testing.assert_array_equal(layer(X) != 0, jax.random.bernoulli(key, 0.75, X.shape))


def test_each_call_drops_others_and_layers_have_streams_of_their_own():
    rngs = nnx.Rngs(0)
    one, other = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    ys = [one(X), one(X), other(X)]
    assert not any(np.array_equal(a, b) for a, b in [(ys[0], ys[1]), (ys[0], ys[2]), (ys[1], ys[2])])
    assert int(rngs.default.count[...]) == 2


@pytest.mark.parametrize("dims", [(0,), (-1,), (0, 1), [1]])
def test_dims_share_a_draw(dims):
    y = np.asarray(nnx.Dropout(0.5, broadcast_dims=dims, rngs=nnx.Rngs(0))(X))
    for dim in dims:
        assert np.all(y == np.take(y, [0], axis=dim))


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1.0])
def test_nothing_or_all_is_dropped_without_a_key(rate):
    np.testing.assert_array_equal(nnx.Dropout(rate)(X), (1 - rate) * X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_the_dtype_stays(dtype):
    assert nnx.Dropout(0.5, rngs=nnx.Rngs(0))(X.astype(dtype)).dtype == dtype


def test_not_a_number_is_dropped_like_any_other():
    y = nnx.Dropout(0.5, rngs=nnx.Rngs(0))(jnp.full(99, jnp.nan))
    assert 0 < int(jnp.sum(y == 0)) < 99


def test_gradients_go_where_the_values_went():
    layer = nnx.Dropout(0.5)
    key = jax.random.key(0)
    np.testing.assert_array_equal(jax.grad(lambda x: layer(x, rngs=key).sum())(X), layer(X, rngs=key))


# ---------------------------------------------------------------- switching
def test_evaluation_returns_the_input():
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.eval()
    assert layer(X) is X
    layer.train()
    assert layer(X, deterministic=True) is X
    assert np.any(layer(X, deterministic=False) == 0)
    assert nnx.view(layer, deterministic=True)(X) is X
    assert not layer.deterministic


# ---------------------------------------------------------------- where keys come from
def test_the_call_s_stream_goes_first():
    layer, rngs = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Rngs(dropout=1)
    y = layer(X, rngs=rngs)
    assert (int(rngs.dropout.count[...]), int(layer.rngs.count[...])) == (1, 0)
    np.testing.assert_array_equal(y, layer(X, rngs=nnx.Rngs(dropout=1).dropout))
    np.testing.assert_array_equal(y, layer(X, rngs=nnx.Rngs(dropout=1).dropout()))


def test_the_name_of_the_stream():
    layer = nnx.Dropout(0.5, rng_collection="noise", rngs=nnx.Rngs(noise=1))
    assert layer.rngs.tag == "noise"
    assert layer(X, rngs=nnx.Rngs(noise=2)).shape == X.shape


def test_in_jit_each_step_drops_others():
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda layer, x: layer(x))
    assert not np.array_equal(step(layer, X), step(layer, X))
    assert int(layer.rngs.count[...]) == 2


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize("rate", [-0.1, 1.5, 20])
def test_rates_are_shares(rate):
    with pytest.raises(ArgumentError, match="0 <= rate <= 1"):
        nnx.Dropout(rate)


def test_it_has_to_be_decided():
    with pytest.raises(ArgumentError, match="No `deterministic` argument was provided to Dropout"):
        nnx.Dropout(0.5, deterministic=None, rngs=nnx.Rngs(0))(X)


@pytest.mark.parametrize("rngs", [None, 0, np.zeros(2, np.uint32)])
def test_a_key_is_needed(rngs):
    with pytest.raises(RngError, match="rngs"):
        nnx.Dropout(0.5)(X, rngs=rngs)


def test_streams_that_are_none():
    with pytest.raises(TypeError, match="rngs must be a Rngs, RngStream or None"):
        nnx.Dropout(0.5, rngs=jax.random.key(0))
    with pytest.raises(KeyError, match="No RngStream named 'dropout'"):
        nnx.Dropout(0.5, rngs=nnx.Rngs(params=0))


def test_whole_numbers_and_missing_dims():
    with pytest.raises(DtypeError, match="whole numbers"):
        nnx.Dropout(0.5, rngs=nnx.Rngs(0))(jnp.ones(3, int))
    with pytest.raises(ArgumentError, match="without dim 2"):
        nnx.Dropout(0.5, broadcast_dims=(2,), rngs=nnx.Rngs(0))(X)
