# SPDX-License-Identifier: Apache-2.0
"""Layers around layers: spectral norms of one, unit vectors, and what happens to what they wrap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.nn import initializers

NORMAL = initializers.normal(1.0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


class Deep(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.again = self.first
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x, extra=0.0):
        return self.rest[0](self.norm(self.first(x))) + extra


def linear():
    return nnx.Linear(3, 4, rngs=nnx.Rngs(9))


def spectral(w):
    return np.linalg.norm(np.asarray(w).reshape(-1, w.shape[-1]), 2)


# ---------------------------------------------------------------- SpectralNorm
def test_many_steps_find_the_greatest_singular_value():
    wrapped, expected = linear(), spectral(linear().kernel)
    layer = nnx.SpectralNorm(wrapped, n_steps=100, rngs=nnx.Rngs(0))
    layer(normal(5, 3))
    np.testing.assert_allclose(layer.batch_stats["kernel", "sigma"][...], expected, rtol=1e-5)
    np.testing.assert_allclose(spectral(wrapped.kernel), 1, rtol=1e-5)


def test_all_matrices_of_a_model_are_divided_and_vectors_left():
    model = Deep(nnx.Rngs(0))
    layer = nnx.SpectralNorm(model, n_steps=100, rngs=nnx.Rngs(1))
    layer(normal(5, 3))
    assert {path[:-1] for path in layer.batch_stats} == {("again", "kernel"), ("rest", 0, "kernel")}
    for weight in (model.first.kernel, model.rest[0].kernel):
        np.testing.assert_allclose(spectral(weight), 1, rtol=1e-4)
    assert np.all(np.asarray(model.norm.scale) == 1)


def test_arrays_of_more_dims_count_as_matrices_unless_that_is_refused():
    conv = nnx.Conv(3, 4, (2, 2), rngs=nnx.Rngs(0))
    nnx.SpectralNorm(conv, n_steps=100, rngs=nnx.Rngs(0))(normal(1, 5, 5, 3))
    np.testing.assert_allclose(spectral(conv.kernel), 1, rtol=1e-4)
    with pytest.raises(ArgumentError, match="4D but error_on_non_matrix is True"):
        nnx.SpectralNorm(conv, error_on_non_matrix=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("built", "called", "kept"), [(True, None, True), (False, None, False), (False, True, True),
                                                        (True, False, False)])  # fmt: skip
def test_the_estimate_is_kept_when_it_is_asked_for(built, called, kept):
    layer = nnx.SpectralNorm(linear(), update_stats=built, rngs=nnx.Rngs(0))
    before = layer.batch_stats["kernel", "u"][...]
    layer(normal(5, 3), update_stats=called)
    assert bool(np.any(layer.batch_stats["kernel", "u"][...] != before)) == kept


def test_evaluation_keeps_the_estimate():
    layer = nnx.SpectralNorm(linear(), rngs=nnx.Rngs(0))
    layer.eval()
    layer(normal(5, 3))
    assert float(layer.batch_stats["kernel", "sigma"][...]) == 1


def test_a_weight_of_zeros_stays():
    layer = nnx.SpectralNorm(nnx.Linear(3, 4, kernel_init=initializers.zeros, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert not np.any(layer(normal(5, 3)))


def test_it_trains_inside_jit_with_gradients_for_the_weight():
    layer, x = nnx.SpectralNorm(linear(), rngs=nnx.Rngs(0)), normal(5, 3)

    @nnx.jit
    def step(layer, x):
        return nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)

    gradients = step(layer, x)
    assert np.any(gradients["layer_instance"]["kernel"][...])
    assert float(layer.batch_stats["kernel", "sigma"][...]) != 1


# ---------------------------------------------------------------- WeightNorm
@pytest.mark.parametrize(("axes", "over"), [(-1, 0), (0, 1), (None, None), ((0, 1), ())])
def test_weights_are_unit_vectors(axes, over):
    wrapped = linear()
    w = np.asarray(wrapped.kernel)
    nnx.WeightNorm(wrapped, feature_axes=axes, rngs=nnx.Rngs(0))(normal(5, 3))
    norm = np.sqrt(np.sum(w**2, axis=over, keepdims=True))
    np.testing.assert_allclose(wrapped.kernel[...], w / norm, rtol=1e-5)


def test_the_scale_is_a_parameter_that_is_trained():
    layer, x = nnx.WeightNorm(linear(), scale_init=NORMAL, rngs=nnx.Rngs(0)), normal(5, 3)
    scale = layer.scales["kernel",]
    assert isinstance(scale, nnx.Param)
    layer(x)
    norms = np.linalg.norm(layer.layer_instance.kernel[...], axis=0)
    np.testing.assert_allclose(norms, np.abs(scale[...]), rtol=1e-5)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert np.any(gradients["scales"]["kernel",][...])


def test_the_default_scale_draws_no_key():
    rngs = nnx.Rngs(0)
    wrapped = linear()
    nnx.WeightNorm(wrapped, rngs=rngs)
    assert int(rngs.params.count[...]) == 0


def test_the_filter_chooses_the_weights_and_arguments_are_passed_on():
    model = Deep(nnx.Rngs(0))
    layer = nnx.WeightNorm(model, variable_filter=nnx.PathContains("rest"), feature_axes=None, use_scale=False,
                           rngs=nnx.Rngs(0))  # fmt: skip
    before, x = np.asarray(model.first.kernel), normal(5, 3)
    np.testing.assert_allclose(layer(x, extra=1.0) - layer(x), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.first.kernel[...], before)
    np.testing.assert_allclose(np.linalg.norm(model.rest[0].kernel[...]), 1, rtol=1e-5)
    assert layer.scales is None


def test_weights_keep_their_dtype():
    wrapped = nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.WeightNorm(wrapped, dtype=jnp.float32, rngs=nnx.Rngs(0))(normal(5, 3))
    assert wrapped.kernel.dtype == jnp.bfloat16


def test_its_structure_survives_split_and_merge():
    layer, x = nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)), normal(5, 3)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def call(state, x):
        layer = nnx.merge(graphdef, state)
        return layer(x), nnx.state(layer)

    y, after = call(state, x)
    np.testing.assert_allclose(y, layer(x), rtol=1e-5)
    np.testing.assert_allclose(after["layer_instance"]["kernel"][...], layer.layer_instance.kernel[...], rtol=1e-5)


def test_a_weight_without_the_axis_is_refused():
    with pytest.raises(ArgumentError, match=r"got \(3, 4\) at kernel"):
        nnx.WeightNorm(linear(), feature_axes=2, rngs=nnx.Rngs(0))
