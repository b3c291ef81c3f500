# SPDX-License-Identifier: Apache-2.0
"""Normalising layers: formulas against NumPy's, their derivative, statistics, mapped axes, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from batiste import nnx
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn import initializers
from batiste.nn.moments import Average, normalize

NORMAL = initializers.normal(1.0)
BOTH = dict(scale_init=NORMAL, bias_init=NORMAL)


def normal(*shape: int) -> np.ndarray:
    return 2 * np.random.default_rng(shape).standard_normal(shape).astype(np.float32) + 1


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def normalized(x, axis, epsilon=1e-6):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + epsilon)


# ---------------------------------------------------------------- formulas
@pytest.mark.parametrize("fast", [True, False])
def test_layer_norm(fast):
    layer, x = nnx.LayerNorm(6, use_fast_variance=fast, **BOTH, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    assert_close(layer(x), normalized(x, -1) * np.asarray(layer.scale) + np.asarray(layer.bias))


def test_layer_norm_with_parameters_over_several_dims():
    layer, x = nnx.LayerNorm(30, reduction_axes=[1, 2], feature_axes=[1, 2], **BOTH, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    scale, bias = np.asarray(layer.scale).reshape(5, 6), np.asarray(layer.bias).reshape(5, 6)
    assert_close(layer(x), normalized(x, (1, 2)) * scale + bias)


def test_rms_norm():
    layer, x = nnx.RMSNorm(6, scale_init=NORMAL, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    assert_close(layer(x), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(layer.scale))


@pytest.mark.parametrize(("axes", "reduced"), [(None, (1, 3)), ((1, 2), (1, 3)), (-1, 3), ((0, 1, 2), (0, 1, 3))])
def test_group_norm(axes, reduced):
    layer, x = nnx.GroupNorm(6, 3, reduction_axes=axes, **BOTH, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    y = normalized(x.reshape(2, 5, 3, 2), reduced).reshape(2, 5, 6)
    assert_close(layer(x), y * np.asarray(layer.scale) + np.asarray(layer.bias), 1e-4)


def test_instance_norm():
    layer, x = nnx.InstanceNorm(6, **BOTH, rngs=nnx.Rngs(0)), normal(2, 4, 5, 6)
    assert_close(layer(x), normalized(x, (1, 2)) * np.asarray(layer.scale) + np.asarray(layer.bias))


def test_layer_norm_is_group_norm_of_one_group_and_instance_norm_of_one_channel_each():
    x = normal(2, 4, 5, 6)
    assert_close(
        nnx.GroupNorm(6, 1, rngs=nnx.Rngs(0))(x), nnx.LayerNorm(6, reduction_axes=(1, 2, 3), rngs=nnx.Rngs(0))(x)
    )
    assert_close(nnx.GroupNorm(6, 6, rngs=nnx.Rngs(0))(x), nnx.InstanceNorm(6, rngs=nnx.Rngs(0))(x))


LAYERS = {
    "batch": lambda **options: nnx.BatchNorm(6, **options, rngs=nnx.Rngs(0)),
    "layer": lambda **options: nnx.LayerNorm(6, **options, rngs=nnx.Rngs(0)),
    "rms": lambda **options: nnx.RMSNorm(6, **options, rngs=nnx.Rngs(0)),
    "group": lambda **options: nnx.GroupNorm(6, 2, **options, rngs=nnx.Rngs(0)),
    "instance": lambda **options: nnx.InstanceNorm(6, **options, rngs=nnx.Rngs(0)),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


@every_layer
def test_masked_entries_have_no_part_in_the_moments(build):
    x, over_features = normal(2, 5, 6), build in (LAYERS["layer"], LAYERS["rms"])
    mask = np.broadcast_to(np.arange(6) < 4 if over_features else np.arange(5)[:, None] < 3, x.shape)
    y, other = build()(x, mask=mask), build()(np.where(mask, x, 99.0), mask=mask)
    assert_close(y[mask], other[mask])


@every_layer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_averaged_in_float32(build, dtype):
    x = (normal(2, 5, 6) + 100).astype(dtype)
    y = build(dtype=dtype)(x)
    assert y.dtype == dtype
    assert_close(y.astype(jnp.float32), build()(x.astype(jnp.float32)), 2e-2)


@every_layer
def test_the_result_has_the_dtype_that_inputs_and_parameters_promote_to(build):
    assert build()(normal(2, 5, 6).astype(jnp.bfloat16)).dtype == jnp.float32
    half = build(param_dtype=jnp.bfloat16)(normal(2, 5, 6).astype(jnp.bfloat16))
    assert half.dtype == (jnp.float32 if build is LAYERS["batch"] else jnp.bfloat16)  # its statistics are float32
    assert build()(np.ones((2, 5, 6), np.int32)).dtype == jnp.float32


@every_layer
def test_promotion_is_replaceable(build):
    seen = []

    def promote(args, *, dtype):
        seen.append(len(args))
        return tuple(None if x is None else jnp.asarray(x, jnp.float16) for x in args)

    assert build(promote_dtype=promote)(normal(2, 5, 6)).dtype == jnp.float16
    assert seen == [{LAYERS["batch"]: 5, LAYERS["rms"]: 2}.get(build, 3)]


# ---------------------------------------------------------------- the derivative
AVERAGES = {
    "fast": Average((2,), 1e-6),
    "slow": Average((2,), 1e-6, fast=False),
    "two dims": Average((0, 2), 1e-3),
    "not centred": Average((2,), 1e-6, centered=False),
}


def by_autodiff(average, x, where, scale=None, bias=None):
    mean, var = average.moments(x, where)
    y = (x - mean) * lax.rsqrt(var + average.epsilon)
    return y * (1 if scale is None else scale) + (0 if bias is None else bias)


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("where", [None, normal(3, 4, 5) > -0.5], ids=["all", "masked"])
def test_its_own_rule_is_what_autodiff_finds(average, where):
    x, dx = normal(3, 4, 5), normal(4, 3, 5).reshape(3, 4, 5)
    ours = lambda x: jnp.sum(jnp.sin(normalize(average, x, where)[0]))
    autodiff = lambda x: jnp.sum(jnp.sin(by_autodiff(average, x, where)))
    assert_close(jax.grad(ours)(x), jax.grad(autodiff)(x))
    assert_close(jax.jvp(ours, (x,), (dx,))[1], jax.jvp(autodiff, (x,), (dx,))[1])
    for derivative in (
        lambda f: jax.jvp(jax.grad(f), (x,), (dx,))[1],  # forward over reverse
        lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x),  # reverse over reverse
        lambda f: jax.jacfwd(jax.jacfwd(f))(x),  # forward over forward
    ):
        assert_close(derivative(ours), derivative(autodiff), 1e-4)


PARAMETERS = {  # shapes of scale and bias
    "of each entry": ((1, 1, 5), (1, 1, 5)),
    "shared by the entries of a mean": ((1, 4, 1), (1, 4, 1)),
    "shared scale": ((1, 4, 1), None),
    "shared bias": (None, (1, 4, 1)),
}


@pytest.mark.parametrize("average", [AVERAGES["two dims"], AVERAGES["not centred"]], ids=["centred", "not centred"])
@pytest.mark.parametrize("shapes", PARAMETERS.values(), ids=PARAMETERS)
def test_its_own_rule_with_parameters(average, shapes):
    arrays = [normal(3, 4, 5), *(None if shape is None else normal(*shape) for shape in shapes)]
    along, where = jax.tree.map(np.cos, arrays), arrays[0] > -0.5

    @jax.jit
    def values_and_derivatives(arrays, along):
        def of(function):
            f = lambda arrays: jnp.sum(jnp.sin(function(average, arrays[0], where, *arrays[1:])))
            return jax.value_and_grad(f)(arrays), *jax.jvp(jax.grad(f), (arrays,), (along,))

        return of(lambda *args: normalize(*args)[0]), of(by_autodiff)

    jax.tree.map(lambda ours, autodiff: assert_close(ours, autodiff, 1e-4), *values_and_derivatives(arrays, along))


def test_batch_norm_sums_cotangents_once_for_its_means_and_its_parameters():
    graphdef, params, rest = nnx.split(LAYERS["batch"](), nnx.Param, ...)
    forward = lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)
    backward = lambda params, x, d: jax.vjp(forward, params, x)[1](d)
    sums = lambda f, *args: jax.jit(f).lower(*args).compile().as_text().count(" reduce(")
    x = jnp.ones((16, 8, 8, 6))
    assert sums(backward, params, x, x) - sums(forward, params, x) == 2


def test_its_own_rule_for_complex_inputs():
    x = (normal(3, 4, 5) + 1j * normal(4, 3, 5).reshape(3, 4, 5)).astype(np.complex64)
    ours = lambda x: jnp.sum(jnp.abs(normalize(AVERAGES["fast"], x, None)[0]) ** 3)
    autodiff = lambda x: jnp.sum(jnp.abs(by_autodiff(AVERAGES["fast"], x, None)) ** 3)
    assert_close(jax.grad(ours)(x), jax.grad(autodiff)(x), 1e-4)


def test_in_a_deep_residual_stack_the_work_grows_with_the_depth():
    def multiplications(depth):
        norm, weights = nnx.LayerNorm(16, rngs=nnx.Rngs(0)), jnp.ones((depth, 16, 16))

        def loss(weights, x):
            for w in weights:
                x = x + jnp.tanh(norm(x) @ w)
            return jnp.sum(x)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights, jnp.ones((8, 16))).compile()
        return compiled.as_text().count(" multiply(")

    assert multiplications(8) <= 2.1 * multiplications(4)  # autodiff's own sums make it 2.9


# ---------------------------------------------------------------- statistics
def test_batch_norm_normalises_by_the_batch_and_follows_it():
    layer, x = nnx.BatchNorm(6, momentum=0.9, **BOTH, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    assert_close(layer(x), normalized(x, (0, 1), 1e-5) * np.asarray(layer.scale) + np.asarray(layer.bias))
    assert_close(layer.mean[...], 0.1 * x.mean((0, 1)))
    assert_close(layer.var[...], 0.9 + 0.1 * x.var((0, 1)))


def test_batch_norm_uses_the_stored_moments_in_evaluation_and_leaves_them():
    layer, x = nnx.BatchNorm(6, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    layer(x)
    layer.eval()
    mean, var = np.asarray(layer.mean), np.asarray(layer.var)
    assert_close(layer(x), (x - mean) / np.sqrt(var + 1e-5))
    assert_close(layer.mean[...], mean)
    assert_close(layer(x, use_running_average=False), normalized(x, (0, 1), 1e-5))


def test_the_moments_are_constants_for_gradients():
    x = normal(3, 4, 5)
    _, (dy, dmean, dvar) = jax.jvp(lambda x: normalize(AVERAGES["fast"], x, None), (x,), (np.sin(x),))
    assert np.any(dy)
    assert not np.any(dmean)
    assert not np.any(dvar)


def test_batch_norm_has_float32_statistics_whatever_its_parameters_are():
    layer = nnx.BatchNorm(6, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer(normal(2, 5, 6).astype(jnp.bfloat16))
    assert (layer.scale.dtype, layer.mean.dtype, layer.var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_a_view_switches_to_the_stored_moments():
    layer = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    view = nnx.view(layer, use_running_average=True)
    assert (layer.use_running_average, view.use_running_average) == (False, True)
    assert view.mean is layer.mean


def test_batch_norm_in_a_jitted_step_keeps_its_statistics():
    layer, x = nnx.BatchNorm(6, rngs=nnx.Rngs(0)), normal(2, 5, 6)
    nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert_close(layer.mean[...], 0.01 * x.mean((0, 1)))


# ---------------------------------------------------------------- mapped axes
def test_moments_over_a_mapped_axis_are_those_of_the_whole():
    x = normal(4, 5, 6)
    layer = nnx.BatchNorm(6, axis_name="devices", momentum=0.0, rngs=nnx.Rngs(0))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="devices")(layer, x)
    assert_close(y, normalized(x, (0, 1), 1e-5), 1e-4)
    assert_close(layer.mean[...], x.mean((0, 1)))
    assert_close(layer.var[...], x.var((0, 1)), 1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_the_derivative_crosses_a_mapped_axis(fast):
    x = normal(4, 5, 6)
    here, mapped = Average((0, 1), 1e-3, fast=fast), Average((0,), 1e-3, fast=fast, axis_name="devices")
    over_devices = lambda x: jax.vmap(lambda x: normalize(mapped, x, None)[0], axis_name="devices")(x)
    whole = jax.grad(lambda x: jnp.sum(jnp.sin(normalize(here, x, None)[0])))(x)
    assert_close(jax.grad(lambda x: jnp.sum(jnp.sin(over_devices(x))))(x), whole, 1e-4)


def test_groups_of_a_mapped_axis_are_kept_apart():
    layer = nnx.LayerNorm(6, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]], rngs=nnx.Rngs(0))
    assert layer.axis_index_groups == ((0, 1), (2, 3))
    hash(nnx.graphdef(layer))


# ---------------------------------------------------------------- parameters
@every_layer
def test_both_parameters_may_be_switched_off(build):
    options = {"use_scale": False} if build is LAYERS["rms"] else {"use_scale": False, "use_bias": False}
    layer = build(**options)
    assert layer.scale is None
    assert getattr(layer, "bias", None) is None
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))


def test_metadata_goes_to_the_parameters():
    layer = nnx.LayerNorm(6, scale_metadata={"a": 1}, bias_metadata={"b": 2}, rngs=nnx.Rngs(0))
    assert (layer.scale.a, layer.bias.b) == (1, 2)


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize("groups", [(32, None), (-1, None), (4, 2), (None, None), (None, 4), (None, 0)])
def test_group_norm_refuses_groups_that_do_not_divide(groups):
    with pytest.raises(ArgumentError, match="group"):
        nnx.GroupNorm(6, *groups, rngs=nnx.Rngs(0))


@every_layer
def test_another_number_of_features_is_refused(build):
    with pytest.raises(ShapeError, match=r"wrong number of features.*got \(2, 5, 7\), expected 6 features on dim 2"):
        build()(normal(2, 5, 7))


def test_group_norm_needs_its_channels_among_the_reduced_dims():
    with pytest.raises(ArgumentError, match="last dim"):
        nnx.GroupNorm(6, 2, reduction_axes=(1,), rngs=nnx.Rngs(0))(normal(2, 5, 6))


def test_instance_norm_refuses_the_batch_as_channels():
    with pytest.raises(ArgumentError, match="leading dimension"):
        nnx.InstanceNorm(2, feature_axes=0, rngs=nnx.Rngs(0))(normal(2, 5, 6))


def test_batch_norm_has_to_be_told_where_its_moments_come_from():
    layer = nnx.BatchNorm(6, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="No `use_running_average` argument was provided to BatchNorm"):
        layer(normal(2, 5, 6))
    assert layer(normal(2, 5, 6), use_running_average=True).shape == (2, 5, 6)


def test_axes_outside_the_input_are_refused():
    with pytest.raises(ArgumentError, match="reduction_axes"):
        nnx.LayerNorm(6, reduction_axes=3, rngs=nnx.Rngs(0))(normal(2, 5, 6))
