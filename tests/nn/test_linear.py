# SPDX-License-Identifier: Apache-2.0
"""Linear maps: their formulas against NumPy's, the options that are handed on, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from batiste.graph import Module, Param, Rngs, graphdef
from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.nn import Einsum, Embed, Linear, LinearGeneral, initializers
from batiste.nn.linear import AxisSizes

NORMAL = initializers.normal(1.0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- formulas
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (0, 3)])
def test_linear_is_a_product_and_a_bias(shape):
    layer, x = Linear(3, 4, bias_init=NORMAL, rngs=Rngs(0)), normal(*shape)
    assert_close(layer(x), x @ np.asarray(layer.kernel) + np.asarray(layer.bias))


def test_linear_without_bias_has_none_and_draws_one_key_less():
    with_bias, without = Rngs(0), Rngs(0)
    Linear(3, 4, rngs=with_bias)
    layer = Linear(3, 4, use_bias=False, rngs=without)
    assert layer.bias is None
    assert (with_bias.params.count[...], without.params.count[...]) == (2, 1)
    assert_close(layer(normal(5, 3)), normal(5, 3) @ np.asarray(layer.kernel))


@pytest.mark.parametrize(
    ("features", "axis", "shape", "formula"),
    [
        (((3,), (4,)), -1, (5, 3), "bi,io->bo"),
        (((2, 3), (4, 5)), (1, 2), (7, 2, 3), "bij,ijop->bop"),
        (((2,), (4,)), 1, (7, 2, 3), "bij,io->bjo"),
        (((2, 3), (4,)), (2, 1), (7, 2, 3), "bij,ijo->bo"),
    ],
)
def test_linear_general_contracts_the_dims_of_axis(features, axis, shape, formula):
    layer, x = LinearGeneral(*features, axis=axis, bias_init=NORMAL, rngs=Rngs(0)), normal(*shape)
    assert_close(layer(x), np.einsum(formula, x, layer.kernel[...]) + np.asarray(layer.bias))


def test_linear_general_has_parameters_of_its_own_for_each_entry_of_the_batch_dims():
    layer, x = LinearGeneral(3, 4, batch_axis={0: 2}, bias_init=NORMAL, rngs=Rngs(0)), normal(2, 5, 3)
    expected = [x[i] @ np.asarray(layer.kernel[i]) + np.asarray(layer.bias[i]) for i in range(2)]
    assert_close(layer(x), np.stack(expected))


@pytest.mark.parametrize(
    ("equation", "kernel", "bias", "shape", "broadcast"),
    [
        ("bi,io->bo", (3, 4), (4,), (5, 3), (1, 4)),
        ("bi,io->ob", (3, 4), (4,), (5, 3), (4, 1)),
        ("btd,dhk->bthk", (8, 2, 3), (2, 3), (5, 7, 8), (1, 1, 2, 3)),
        ("...d, dhk -> ...hk", (8, 2, 3), (6,), (5, 7, 8), (1, 1, 2, 3)),
        ("nbi,nio->nbo", (2, 3, 4), (2, 4), (2, 5, 3), (2, 1, 4)),
        ("bi,i...->b...", (3, 4, 5), (4, 5), (2, 3), (1, 4, 5)),
    ],
)
def test_einsum_adds_a_bias_along_the_dims_that_the_kernel_names(equation, kernel, bias, shape, broadcast):
    layer, x = Einsum(equation, kernel, bias, bias_init=NORMAL, rngs=Rngs(0)), normal(*shape)
    expected = np.einsum(equation.replace(" ", ""), x, layer.kernel[...]) + np.asarray(layer.bias).reshape(broadcast)
    assert_close(layer(x), expected)


def test_einsum_takes_an_equation_in_the_call():
    layer, x = Einsum("bi,io->bo", (3, 4), rngs=Rngs(0)), normal(5, 3)
    assert_close(layer(x, "bi, io -> ob"), layer(x).T)


def test_embed_looks_up_rows_and_attends_to_them():
    layer = Embed(7, 4, rngs=Rngs(0))
    table = np.asarray(layer.embedding)
    assert_close(layer(np.array([[0, 6], [-1, 3]])), table[[[0, 6], [6, 3]]])
    assert_close(layer.attend(normal(5, 4)), normal(5, 4) @ table.T)
    assert np.isnan(layer(jnp.array([7]))).all()
    assert np.isfinite(Embed(1, 4, rngs=Rngs(0))(jnp.array([7]))).all()


def test_the_gradient_of_embed_adds_up_over_equal_numbers():
    layer = Embed(3, 2, rngs=Rngs(0))
    gradient = jax.grad(lambda layer: layer(jnp.array([1, 1, 2])).sum())(layer)
    np.testing.assert_array_equal(gradient.embedding[...], [[0, 0], [2, 2], [1, 1]])


# ---------------------------------------------------------------- options
LAYERS = {
    "Linear": lambda **options: Linear(3, 4, rngs=Rngs(0), **options),
    "LinearGeneral": lambda **options: LinearGeneral(3, 4, rngs=Rngs(0), **options),
    "Einsum": lambda **options: Einsum("bi,io->bo", (3, 4), (4,), rngs=Rngs(0), **options),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


@every_layer
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "preferred", "of_input", "expected"),
    [
        (None, "float32", None, "float32", "float32"),
        (None, "float32", None, "bfloat16", "float32"),
        (None, "bfloat16", None, "bfloat16", "bfloat16"),
        (None, "float32", None, "int32", "float32"),
        ("bfloat16", "float32", None, "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "float32", "float32"),
    ],
)
def test_dtypes(build, dtype, param_dtype, preferred, of_input, expected):
    layer = build(dtype=dtype, param_dtype=param_dtype, preferred_element_type=preferred)
    assert layer(jnp.ones((5, 3), of_input)).dtype == expected
    assert layer.kernel.dtype == layer.bias.dtype == param_dtype


@every_layer
def test_metadata_reaches_the_variables(build):
    layer = build(kernel_metadata={"note": "k"}, bias_metadata={"note": "b"})
    assert (layer.kernel.note, layer.bias.note) == ("k", "b")
    assert type(layer.kernel) is type(layer.bias) is Param


@every_layer
def test_a_promotion_of_ones_own_takes_the_place_of_the_librarys(build):
    seen = []

    def promote(arrays, *, dtype):
        seen.append((len(arrays), dtype))
        return [x.astype(jnp.float16) for x in arrays]

    assert build(dtype=jnp.float32, promote_dtype=promote)(jnp.ones((5, 3))).dtype == jnp.float16
    assert seen == [(3, jnp.float32)]


@pytest.mark.parametrize(
    ("build", "option", "product"),
    [(LAYERS["Linear"], "dot_general", lax.dot_general), (LAYERS["LinearGeneral"], "dot_general", lax.dot_general),
     (LAYERS["Einsum"], "einsum_op", jnp.einsum)],
)  # fmt: skip
def test_a_product_of_ones_own_takes_the_place_of_jaxs(build, option, product):
    seen = []

    def spy(*args, **options):
        seen.append(options)
        return product(*args, **options)

    build(**{option: spy})(jnp.ones((5, 3)))
    build(**{option: spy}, precision="highest", preferred_element_type=jnp.float32)(jnp.ones((5, 3)))
    assert seen == [
        {"precision": None, "out_sharding": None},
        {"precision": "highest", "out_sharding": None, "preferred_element_type": jnp.float32},
    ]


def test_the_class_of_a_product_is_built_at_each_call():
    class Product:
        def __call__(self, *args, **options):
            return 2 * lax.dot_general(*args, **options)

    doubled, plain = LAYERS["LinearGeneral"](dot_general_cls=Product), LAYERS["LinearGeneral"]()
    assert_close(doubled(normal(5, 3)), 2 * plain(normal(5, 3)))


def test_a_wrapped_initialiser_draws_in_the_shape_of_a_matrix_too():
    drawn = []

    def init(key, shape, dtype):
        drawn.append(shape)
        return jnp.zeros(shape, dtype)

    LinearGeneral((2, 3), (4, 5), axis=(-2, -1), batch_axis={0: 7}, kernel_init=init, bias_init=init, rngs=Rngs(0))
    assert drawn == [(42, 20), (140,)]


@every_layer
def test_settings_are_hashable(build):
    assert hash(graphdef(build())) == hash(graphdef(build()))


def test_axis_sizes_are_a_mapping_that_is_compared_and_hashed_by_value():
    sizes = AxisSizes({0: 2, 1: 3})
    assert sizes == {0: 2, 1: 3} == AxisSizes({1: 3, 0: 2})
    assert hash(sizes) == hash(AxisSizes({1: 3, 0: 2}))
    assert (sizes[1], list(sizes), len(sizes)) == (3, [0, 1], 2)


def test_a_kernel_that_was_replaced_says_what_fits():
    layer = Linear(3, 4, use_bias=False, rngs=Rngs(0))
    layer.kernel = Param(jnp.ones((2, 5)))
    assert layer(jnp.ones((7, 2))).shape == (7, 5)


# ---------------------------------------------------------------- refusals
class Model(Module):
    def __init__(self):
        self.up = Linear(3, 8, rngs=Rngs(0))

    def __call__(self, x):
        return self.up(x)


def test_a_wrong_last_dim_names_the_layers_path():
    with pytest.raises(
        ShapeError, match=r"(?s)Linear got a wrong last dim at up: got \(5, 4\), expected \(\.\.\., 3\)"
    ):
        Model()(jnp.ones((5, 4)))


@pytest.mark.parametrize(
    ("provoke", "error", "message"),
    [
        (lambda: Linear(3, 4, rngs=Rngs(0))(jnp.ones(())), ShapeError, "wrong last dim"),
        (lambda: Linear(3, -4, rngs=Rngs(0)), ArgumentError, "wrong out_features"),
        (lambda: Linear("3", 4, rngs=Rngs(0)), ArgumentError, "wrong in_features"),
        (lambda: Linear(3, 4, rngs=None), RngError, "random streams"),
        (lambda: Linear(3, 4), TypeError, "rngs"),
        (
            lambda: LinearGeneral((3, 2), 4, rngs=Rngs(0)),
            ArgumentError,
            "in_features and axis must have the same length",
        ),
        (lambda: LinearGeneral(3, 4, batch_axis={1: 2}, rngs=Rngs(0)), ArgumentError, "consecutive leading dimensions"),
        (lambda: LinearGeneral(3, 4, rngs=Rngs(0))(jnp.ones((5, 4))), ShapeError, "dim -1 of size 3"),
        (lambda: LinearGeneral((2, 3), 4, axis=(1, 1), rngs=Rngs(0))(jnp.ones((5, 2, 3))), ShapeError, "does not fit"),
        (lambda: LinearGeneral(3, 4, batch_axis={0: 2}, rngs=Rngs(0))(jnp.ones(3)), ShapeError, "dim 0 of size 2"),
        (lambda: LinearGeneral(3, 4, axis=2, rngs=Rngs(0))(jnp.ones((3, 3))), ShapeError, "dim 2 of size 3"),
        (lambda: Einsum(None, (3, 4), rngs=Rngs(0)), ArgumentError, "needs an einsum_str"),
        (lambda: Einsum("bi,io", (3, 4), rngs=Rngs(0)), ArgumentError, 'must be explicit and include "->"'),
        (lambda: Einsum("bi->bo", (3, 4), rngs=Rngs(0)), ArgumentError, "exactly one comma"),
        (
            lambda: Einsum("bi,io->bo", (3, 4), rngs=Rngs(0))(jnp.ones((5, 2))),
            ShapeError,
            "two sizes for the label 'i'",
        ),
        (lambda: Einsum("bi,io->bo", (3, 4), rngs=Rngs(0))(jnp.ones(3)), ShapeError, "wrong rank of the input"),
        (lambda: Einsum("bi,io->bo", (3, 4, 5), rngs=Rngs(0))(jnp.ones((5, 3))), ShapeError, "rank of the kernel"),
        (lambda: Einsum("bi,io->bo", (3, 4), (5,), rngs=Rngs(0))(jnp.ones((5, 3))), ShapeError, "bias"),
        (lambda: Embed(7, 4, rngs=Rngs(0))(jnp.ones(3)), ArgumentError, "must be an integer"),
        (lambda: Embed(7, 4, rngs=Rngs(0)).attend(jnp.ones((2, 3))), ShapeError, "Embed got a wrong last dim"),
        (lambda: Embed(7, -4, rngs=Rngs(0)), ArgumentError, "wrong features"),
    ],
)
def test_bad_input_is_refused(provoke, error, message):
    with pytest.raises(error, match=message):
        provoke()
