# SPDX-License-Identifier: Apache-2.0
"""Convolutions: laws that tie paddings, groups, masks and the transpose together, and what is refused."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from batiste.graph import Rngs, graphdef
from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.nn import Conv, ConvTranspose, initializers
from batiste.nn.conv import canonicalize_padding

NORMAL = initializers.normal(1.0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def build(kind, *args, **options):
    return kind(*args, **{"bias_init": NORMAL, "rngs": Rngs(0), **options})


# ---------------------------------------------------------------- formulas
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (1, 2), ((3, 2), (1, 2))])
def test_conv_is_a_sum_over_the_window(strides, dilation):
    layer, x = build(Conv, 3, 4, (3, 2), strides, padding="VALID", kernel_dilation=dilation), normal(2, 9, 8, 3)
    (sh, sw), (dh, dw) = (n if isinstance(n, tuple) else (n, n) for n in (strides, dilation))
    kernel, y = np.asarray(layer.kernel), np.asarray(layer(x))
    expected = np.zeros_like(y) + np.asarray(layer.bias)
    for i, j in itertools.product(range(3), range(2)):
        seen = x[:, i * dh :: sh, j * dw :: sw][:, : y.shape[1], : y.shape[2]]
        expected += seen @ kernel[i, j]
    assert_close(y, expected)


@pytest.mark.parametrize(
    ("padding", "pad"),
    [
        ("SAME", lambda x: np.pad(x, [(0, 0), (1, 1), (0, 0)])),
        (2, lambda x: np.pad(x, [(0, 0), (2, 2), (0, 0)])),
        ([(1, 3)], lambda x: np.pad(x, [(0, 0), (1, 3), (0, 0)])),
        ("CAUSAL", lambda x: np.pad(x, [(0, 0), (2, 0), (0, 0)])),
        ("CIRCULAR", lambda x: np.pad(x, [(0, 0), (1, 1), (0, 0)], mode="wrap")),
        ("reflect", lambda x: np.pad(x, [(0, 0), (1, 1), (0, 0)], mode="reflect")),
    ],
)
def test_a_padding_is_a_valid_convolution_of_the_padded_input(padding, pad):
    layer, valid = build(Conv, 3, 4, 3, padding=padding), build(Conv, 3, 4, 3, padding="VALID")
    assert_close(layer(normal(2, 7, 3)), valid(pad(normal(2, 7, 3))))


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_causal_output_sees_no_later_input(dilation):
    layer, x = build(Conv, 3, 4, 3, padding="CAUSAL", kernel_dilation=dilation), normal(2, 9, 3)
    later = x.copy()
    later[:, 5:] = 7
    np.testing.assert_array_equal(layer(x)[:, :5], layer(later)[:, :5])


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("kind", "strides"), [(Conv, 1), (ConvTranspose, 1), (ConvTranspose, 2), (ConvTranspose, 3)])
def test_circular_convolutions_commute_with_rolling(kind, strides, kernel_size):
    layer, x = build(kind, 3, 4, (kernel_size,), strides, padding="CIRCULAR"), normal(2, 6, 3)
    assert_close(layer(np.roll(x, 2, axis=1)), np.roll(layer(x), 2 * strides, axis=1))


@pytest.mark.parametrize(
    ("padding", "kernel_size", "strides"),
    [(p, k, s) for p in ("SAME", "VALID") for k in ((3, 3), (2, 4)) for s in (1, 2, (2, 3))]
    + [("CIRCULAR", (3, 5), s) for s in (1, 2)],
)
def test_the_transpose_with_the_same_kernel_is_the_adjoint(padding, kernel_size, strides):
    options = {"strides": strides, "padding": padding, "use_bias": False}
    forward = build(Conv, 3, 4, kernel_size, **options)
    backward = build(ConvTranspose, 4, 3, kernel_size, transpose_kernel=True, **options)
    assert backward.kernel.shape == forward.kernel.shape
    backward.kernel[...] = forward.kernel[...]
    y = normal(*jax.eval_shape(forward, jnp.ones((2, 12, 12, 3))).shape)
    x = normal(*jax.eval_shape(backward, jnp.ones(y.shape)).shape)
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    np.testing.assert_allclose(np.vdot(forward(x), y), np.vdot(x, backward(y)), atol=1e-5 * scale)


def test_groups_are_convolutions_side_by_side():
    layer, x = build(Conv, 4, 6, (3, 3), feature_group_count=2, use_bias=False), normal(2, 7, 7, 4)
    parts = []
    for group in range(2):
        part = build(Conv, 2, 3, (3, 3), use_bias=False)
        part.kernel[...] = layer.kernel[..., 3 * group : 3 * group + 3]
        parts.append(part(x[..., 2 * group : 2 * group + 2]))
    assert_close(layer(x), np.concatenate(parts, -1))


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
def test_a_mask_takes_part_of_the_kernel_out_of_the_sum_and_of_the_gradient(kind):
    mask = (normal(3, 3, 4) > 0).astype(np.float32)
    masked, plain, x = build(kind, 3, 4, 3, mask=mask), build(kind, 3, 4, 3), normal(2, 7, 3)
    plain.kernel[...] = plain.kernel[...] * mask
    assert_close(masked(x), plain(x))
    gradient = jax.grad(lambda layer: (layer(x) ** 2).sum(), allow_int=True)(masked)
    assert ((gradient.kernel[...] != 0) == (mask != 0)).all()


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_any_number_of_batch_dims(kind, padding):
    layer, x = build(kind, 3, 4, (3, 3), padding=padding), normal(2, 5, 7, 7, 3)
    y = layer(x)
    assert y.shape == (2, 5, 7, 7, 4)
    assert_close(layer(x.reshape(10, 7, 7, 3)), y.reshape(10, 7, 7, 4))
    assert_close(layer(x[1, 3]), y[1, 3])


# ---------------------------------------------------------------- options
def test_a_convolution_of_ones_own_takes_the_place_of_jaxs():
    seen = []

    def spy(x, kernel, strides, padding, **options):
        seen.append((strides, padding, options["rhs_dilation"], options["out_sharding"]))
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    layer = build(Conv, 3, 4, (3, 3), 2, padding=1, kernel_dilation=None, conv_general_dilated=spy)
    layer(normal(2, 7, 7, 3))
    assert seen == [((2, 2), [(1, 1), (1, 1)], (1, 1), None)]


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
def test_settings_given_as_lists_are_hashable(kind):
    layer = build(kind, 3, 4, [3, 3], [2, 1], padding=[[1, 1], 0], kernel_dilation=[1, 2])
    assert (layer.kernel_size, layer.strides, layer.padding) == ((3, 3), (2, 1), ((1, 1), 0))
    assert isinstance(hash(graphdef(layer)), int)
    assert layer(normal(2, 7, 7, 3)).ndim == 4


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "preferred", "of_input", "expected"),
    [
        (None, "float32", None, "bfloat16", "float32"),
        (None, "bfloat16", None, "bfloat16", "bfloat16"),
        (None, "float32", None, "int32", "float32"),
        ("bfloat16", "float32", None, "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "float32", "float32"),
    ],
)
def test_dtypes(kind, dtype, param_dtype, preferred, of_input, expected):
    layer = build(kind, 3, 4, 3, dtype=dtype, param_dtype=param_dtype, preferred_element_type=preferred)
    assert layer(jnp.ones((2, 7, 3), of_input)).dtype == expected


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("padding", [None, 2.0, (1,), ((1, 2),), (1, 2, 3), ("SAME", "SAME"), ((1, 2, 3), 1)])
def test_a_padding_that_is_no_padding(padding):
    with pytest.raises(ArgumentError, match="Invalid padding format"):
        canonicalize_padding(padding, 2)


X1, X2 = jnp.ones((2, 7, 3)), jnp.ones((2, 7, 7, 3))


@pytest.mark.parametrize(
    ("provoke", "error", "message"),
    [
        (
            lambda: build(Conv, 3, 4, 3, padding="FULL"),
            ArgumentError,
            "unknown padding: got 'FULL', expected one of SAME",
        ),
        (lambda: build(ConvTranspose, 3, 4, 3, padding="REFLECT"), ArgumentError, "unknown padding"),
        (
            lambda: build(Conv, 3, 4, (3, 3), padding="CAUSAL"),
            ArgumentError,
            "Causal padding is only implemented for 1D",
        ),
        (lambda: build(Conv, 3, 4, 3, input_dilation=2), ArgumentError, "explicit padding"),
        (lambda: build(Conv, 3, 4, 3, (1, 2)), ArgumentError, "wrong strides"),
        (lambda: build(Conv, 3, 4, 3, 0), ArgumentError, "wrong strides"),
        (lambda: build(Conv, 3, 4, 3, kernel_dilation="2"), ArgumentError, "wrong kernel_dilation"),
        (lambda: build(ConvTranspose, 3, 4, 3, (1, 2)), ArgumentError, "wrong strides"),
        (lambda: build(Conv, 3, 4, 3, feature_group_count=2), ArgumentError, "groups that do not divide"),
        (lambda: build(Conv, 3, 4, 3, feature_group_count=0), ArgumentError, "groups that do not divide"),
        (lambda: build(Conv, 3, 4, "3"), ArgumentError, "wrong kernel_size"),
        (lambda: build(Conv, 3, -4, 3), ArgumentError, "wrong out_features"),
        (lambda: build(Conv, 3, 4, 3, rngs=0), RngError, "random streams"),
        (lambda: build(Conv, 3, 4, 3, mask=jnp.ones((3, 3)))(X1), ShapeError, "Mask needs to have the same shape"),
        (lambda: build(ConvTranspose, 3, 4, 3, mask=jnp.ones((3, 3)))(X1), ShapeError, "Mask needs to have the same"),
        (lambda: build(Conv, 5, 4, 3)(X1), ShapeError, r"wrong last dim.*got \(2, 7, 3\), expected \(..., 5\)"),
        (lambda: build(Conv, 4, 4, 3, feature_group_count=2)(X1), ShapeError, r"expected \(..., 4\)"),
        (lambda: build(ConvTranspose, 5, 4, 3)(X1), ShapeError, "wrong last dim"),
        (lambda: build(Conv, 3, 4, (3, 3))(jnp.ones((7, 3))), ShapeError, "too few dims"),
        (lambda: build(ConvTranspose, 3, 4, (3, 3))(jnp.ones(3)), ShapeError, "too few dims"),
    ],
)
def test_bad_input_is_refused(provoke, error, message):
    with pytest.raises(error, match=message):
        provoke()
