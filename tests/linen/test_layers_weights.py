# SPDX-License-Identifier: Apache-2.0
"""Layers that change or replace weights: SpectralNorm, WeightNorm, ConvLocal, products in 8 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.linen as nn

X = jnp.sin(jnp.arange(24.0)).reshape(3, 8)
KEY = jax.random.key(0)


def effective_kernel(layer, variables, **options):
    """The matrix that a layer multiplies with, as the result for the unit vectors."""
    zero = layer.apply(variables, jnp.zeros((8, 8)), **options)
    return layer.apply(variables, jnp.eye(8), **options) - zero


def test_a_spectral_norm_becomes_one():
    layer = nn.SpectralNorm(nn.Dense(4), n_steps=50)
    variables = layer.init(KEY, X, update_stats=False)
    kernel = effective_kernel(layer, variables, update_stats=False)
    assert float(jnp.linalg.norm(kernel, 2)) == pytest.approx(1, abs=1e-4)


def test_statistics_move_only_when_they_may():
    layer = nn.SpectralNorm(nn.Dense(4))
    variables = layer.init(KEY, X, update_stats=False)
    for update, moves in ((True, True), (False, False)):
        _, state = layer.apply(variables, X, update_stats=update, mutable=["batch_stats"])
        old, new = (tree["batch_stats"]["layer_instance/kernel/u"] for tree in (variables, state))
        assert bool(jnp.any(old != new)) is moves


def test_more_than_two_dims_can_be_refused():
    layer = nn.SpectralNorm(nn.Conv(4, (3,)), error_on_non_matrix=True)
    with pytest.raises(ValueError, match="3D but error_on_non_matrix is True"):
        layer.init(KEY, X, update_stats=False)


def test_columns_become_unit_vectors_times_a_scale():
    layer = nn.WeightNorm(nn.Dense(4), scale_init=jax.nn.initializers.constant(3.0))
    norms = jnp.linalg.norm(effective_kernel(layer, layer.init(KEY, X)), axis=0)
    np.testing.assert_allclose(norms, 3.0, rtol=1e-5)


def test_a_local_convolution_has_no_groups():
    with pytest.raises(NotImplementedError, match="feature_group_count != 1"):
        nn.ConvLocal(4, (3,), feature_group_count=2).init(KEY, X)


def test_the_gradient_of_a_scale_is_the_next_scale():
    layer = nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    variables = layer.init(KEY, X)
    state = "_overwrite_with_gradient"
    for _ in range(2):
        grads = jax.grad(lambda v: layer.apply(v, X).sum())(variables)
        variables = {**variables, state: grads[state]}
    part = variables[state]["Fp8DirectDotGeneralOp_0"]
    greatest = float(jnp.abs(X).max())
    np.testing.assert_allclose(part["input_amax_history"][0], greatest, rtol=1e-6)
    np.testing.assert_allclose(part["input_scale"][0], greatest / 448, rtol=1e-6)


def test_eight_bits_are_nearly_enough():
    layer, plain = nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp), nn.Dense(4)
    y, variables = layer.init_with_output(KEY, X)
    np.testing.assert_allclose(y, plain.apply({"params": variables["params"]}, X), atol=0.15)
