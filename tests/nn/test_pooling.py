# SPDX-License-Identifier: Apache-2.0
"""Pooling: every spelling against JAX's `reduce_window`, values and gradients; ties, NaN, padding, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn import avg_pool, max_pool, min_pool, pool

WINDOWS = [
    ((2, 2), (2, 2)),
    ((3, 2), (2, 1)),
    ((2, 3), None),
    ((5, 4), (1, 3)),
    ((9, 8), (1, 1)),
]
PADDINGS = ["VALID", "same", ((1, 0), (0, 2))]


def distinct(*shape: int) -> jax.Array:
    size = int(np.prod(shape))
    return jnp.asarray(np.random.default_rng(shape).permutation(size).reshape(shape) - size / 2, jnp.float32)


def reference(reduce_fn, init, x, window, strides, padding):
    """The same by XLA's own operation, for two spatial dims."""
    strides = (1, 1) if strides is None else strides
    padding = padding.upper() if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    return lax.reduce_window(x, init, reduce_fn, (1, *window, 1), (1, *strides, 1), padding)


def assert_same_function(ours, other, x):
    y, pull = jax.vjp(ours, x)
    expected, expected_pull = jax.vjp(other, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    if y.size:
        direction = distinct(*y.shape)
        np.testing.assert_allclose(pull(direction)[0], expected_pull(direction)[0], rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize(("window", "strides"), WINDOWS)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize(
    ("ours", "reduce_fn", "init"), [(max_pool, lax.max, -jnp.inf), (min_pool, lax.min, jnp.inf)], ids=["max", "min"]
)
def test_the_extremum_and_its_gradient(ours, reduce_fn, init, window, strides, padding):
    args = (window, strides, padding)
    assert_same_function(lambda x: ours(x, *args), lambda x: reference(reduce_fn, init, x, *args), distinct(2, 9, 8, 3))


@pytest.mark.parametrize("values", [1, 2, 3])
@pytest.mark.parametrize(("window", "strides"), WINDOWS)
def test_of_equal_elements_the_first_gets_the_gradient(values, window, strides):
    x = jnp.asarray(np.random.default_rng(0).integers(0, values, (2, 9, 8, 3)), jnp.float32)
    args = (window, strides, "VALID")
    assert_same_function(lambda x: max_pool(x, *args), lambda x: reference(lax.max, -jnp.inf, x, *args), x)
    assert_same_function(lambda x: min_pool(x, *args), lambda x: reference(lax.min, jnp.inf, x, *args), x)


@pytest.mark.parametrize(("window", "strides"), WINDOWS)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_the_mean_and_its_gradient(window, strides, padding):
    args = (window, strides, padding)
    mean = lambda x: reference(lax.add, 0.0, x, *args) / np.prod(window)
    assert_same_function(lambda x: avg_pool(x, *args), mean, distinct(2, 9, 8, 3))


@pytest.mark.parametrize(("window", "strides"), WINDOWS)
def test_a_mean_that_does_not_count_the_padding(window, strides):
    args = (window, strides, "SAME")
    mean = lambda x: reference(lax.add, 0.0, x, *args) / reference(lax.add, 0.0, jnp.ones_like(x), *args)
    assert_same_function(lambda x: avg_pool(x, *args, count_include_pad=False), mean, distinct(2, 9, 8, 3))


@pytest.mark.parametrize("function", [max_pool, min_pool, avg_pool])
@pytest.mark.parametrize("shape", [(9, 8, 3), (2, 9, 8, 3), (2, 5, 9, 8, 3)])
def test_any_number_of_batch_dims(function, shape):
    x = distinct(*shape)
    flat = function(x.reshape(-1, 9, 8, 3), (3, 2), (2, 2), ((1, 1), (0, 1)))
    y = function(x, (3, 2), (2, 2), ((1, 1), (0, 1)))
    np.testing.assert_array_equal(y, flat.reshape(*shape[:-3], *flat.shape[1:]))


@pytest.mark.parametrize("function", [max_pool, min_pool, avg_pool])
def test_a_window_larger_than_the_input_has_no_place(function):
    assert function(jnp.ones((2, 3, 3, 1)), (4, 4)).shape == (2, 0, 0, 1)
    assert function(jnp.ones((2, 3, 3, 1)), (4, 4), (4, 4)).shape == (2, 0, 0, 1)


def test_padding_is_never_the_extremum():
    x = -jnp.ones((1, 3, 3, 1))
    assert (max_pool(x, (2, 2), (1, 1), "SAME") == -1).all()
    assert (min_pool(-x, (2, 2), (1, 1), "SAME") == 1).all()
    assert (max_pool(x.astype(jnp.int32), (2, 2), (1, 1), "SAME") == -1).all()


@pytest.mark.parametrize("function", [max_pool, min_pool])
def test_nan_wins_wherever_it_stands(function):
    for place in range(4):
        x = jnp.zeros(4).at[place].set(jnp.nan).reshape(2, 2, 1)
        assert jnp.isnan(function(x, (2, 2))).all()


# ---------------------------------------------------------------- dtypes and transforms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "uint8", "bool"])
def test_the_extremum_keeps_the_dtype(dtype):
    x = (distinct(2, 4, 4, 1) % 7).astype(dtype)
    assert max_pool(x, (2, 2)).dtype == min_pool(x, (2, 2)).dtype == dtype
    np.testing.assert_array_equal(max_pool(x, (2, 2)), max_pool(x.astype(jnp.float32), (2, 2)).astype(dtype))


def test_the_mean_is_of_a_float_dtype_and_summed_in_float32():
    assert avg_pool(jnp.full((16, 16, 1), 200, jnp.uint8), (16, 16)) == 200.0
    x = jnp.full((16, 16, 1), 1.0, jnp.bfloat16)
    for strides in ((1, 1), (16, 16)):
        y = avg_pool(x, (16, 16), strides)
        assert (y.dtype, y.item()) == (jnp.bfloat16, 1.0)
    assert avg_pool(x, (2, 2), padding="SAME", count_include_pad=False).dtype == jnp.float32


@pytest.mark.parametrize("function", [max_pool, avg_pool])
def test_derivatives_of_any_order_and_direction(function):
    f = lambda x: (function(x, (2, 2), (1, 1)) ** 3).sum()
    x = distinct(3, 3, 1) / 9
    np.testing.assert_allclose(jax.jacfwd(f)(x), jax.grad(f)(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(jax.grad(f))(x), jax.jacrev(jax.grad(f))(x), rtol=1e-5, atol=1e-5)


def test_under_vmap():
    x = distinct(4, 5, 5, 2)
    np.testing.assert_array_equal(jax.vmap(lambda x: max_pool(x, (2, 2)))(x), max_pool(x, (2, 2)))


@pytest.mark.parametrize("function", [max_pool, avg_pool])
def test_an_input_that_is_split_over_a_mesh_by_its_type_stays_split(function):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = distinct(jax.device_count(), 4, 4, 1)
    with jax.set_mesh(mesh):
        y = function(jax.device_put(x, jax.P("data")), (2, 2), (2, 2))
    assert jax.typeof(y).sharding.spec == jax.P("data", None, None, None)
    np.testing.assert_allclose(y, function(x, (2, 2), (2, 2)), rtol=1e-6)


# ---------------------------------------------------------------- any reduction
def test_pool_with_a_reduction_of_ones_own():
    x = distinct(2, 6, 6, 1) / 10
    y = pool(x, 1.0, lax.mul, (2, 2), (2, 2), "VALID")
    np.testing.assert_allclose(y, x.reshape(2, 3, 2, 3, 2, 1).prod((2, 4)), rtol=1e-5)
    np.testing.assert_array_equal(pool(x, -jnp.inf, lax.max, (2, 2), None, "SAME"), max_pool(x, (2, 2), None, "SAME"))


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((2,), ArgumentError, "wrong window_shape: got 2"),
        (((2, 0),), ArgumentError, "wrong window_shape"),
        (((2, 2), 2), ArgumentError, "wrong strides"),
        (((2, 2), (2,)), ArgumentError, "as many strides"),
        (((2, 2), (2, 2), "CIRCULAR"), ArgumentError, "unknown padding: got 'CIRCULAR'"),
        (((2, 2), (2, 2), 1), ArgumentError, "unknown padding"),
        (((2, 2), (2, 2), ((1, 1),)), ArgumentError, r"unknown padding.*2 pairs"),
        (
            ((2, 2, 2),),
            ShapeError,
            r"too few dims for its window: got \(6, 6, 1\), expected \(\*batch, n0, n1, n2, feat",
        ),
    ],
)
@pytest.mark.parametrize("function", [max_pool, min_pool, avg_pool])
def test_bad_input_is_refused(function, args, error, message):
    with pytest.raises(error, match=message):
        function(jnp.ones((6, 6, 1)), *args)
