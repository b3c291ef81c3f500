# SPDX-License-Identifier: Apache-2.0
"""Attention: the formula against NumPy's, blocks of causal attention, masks, dropout, decoding, and what is refused."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from batiste import nnx
from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.nn import initializers
from batiste.nn.attend import BLOCKS, ROWS_OF_A_BLOCK, dot_product_attention_weights

NORMAL = initializers.normal(1.0)
attend = nnx.dot_product_attention


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def weights_of(q, k, bias=0.0, mask=True):
    """The weights, spelled out: [B…, H, T, S]."""
    k = np.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    logits = np.einsum("...thd,...shd->...hts", q, k) / np.sqrt(q.shape[-1]) + bias
    e = np.exp(np.where(mask, logits, -1e9) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mean_of(weights, v):
    return np.einsum("...hts,...shd->...thd", weights, np.repeat(v, weights.shape[-3] // v.shape[-2], axis=-2))


# ---------------------------------------------------------------- the formula
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_the_formula(batch, heads):
    q, k, v = normal(*batch, 5, heads[0], 3), normal(*batch, 7, heads[1], 3), normal(*batch, 7, heads[1], 6)
    assert_close(attend(q, k, v), mean_of(weights_of(q, k), v))
    assert_close(dot_product_attention_weights(q, k), weights_of(q, k))


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 1, 5, 7), (5, 7), (7,), (2, 1, 1, 7)])
def test_bias_and_mask_of_all_shapes_that_broadcast(shape):
    q, k, v, bias = normal(2, 5, 4, 3), normal(2, 7, 4, 3), normal(7, 2, 4, 3).swapaxes(0, 1), normal(*shape)
    mask = bias > -0.5
    expected = mean_of(weights_of(q, k, bias, mask), v)
    assert_close(attend(q, k, v, bias, mask), expected)
    assert_close(attend(q, k, v, bias, mask.astype(np.float32)), expected)


def test_a_row_without_keys_gets_the_mean_of_all():
    q, k, v = normal(2, 5, 4, 3), normal(2, 7, 4, 3), normal(2, 7, 4, 3)
    assert_close(attend(q, k, v, mask=np.zeros((5, 7), bool)), np.broadcast_to(v.mean(1, keepdims=True), q.shape))


def test_large_logits_do_not_overflow():
    q = 1e4 * normal(2, 5, 4, 3)
    assert np.all(np.isfinite(jax.grad(lambda q: jnp.sum(attend(q, q, q)))(q)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    q, k, v = normal(2, 5, 4, 3), normal(2, 7, 4, 3), normal(2, 7, 4, 3)
    half = attend(*(x.astype(dtype) for x in (q, k, v)))
    assert half.dtype == dtype == attend(q, k, v, dtype=dtype).dtype
    assert_close(half.astype(jnp.float32), attend(q, k, v), 3e-2)


def test_gradients_have_the_dtype_of_the_inputs_and_are_near_those_in_float32():
    half = [normal(2, 9, heads, 8).astype(jnp.bfloat16) for heads in (4, 2, 2)]
    whole = [x.astype(jnp.float32) for x in half]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(attend(*x, is_causal=True).astype(jnp.float32)))))
    for found, expected in zip(gradient(half), gradient(whole)):
        assert found.dtype == jnp.bfloat16
        assert jnp.linalg.norm(found - expected) < 1e-2 * jnp.linalg.norm(expected)
    products = re.findall(r"dot_general.*: \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\)", gradient.lower(half).as_text())
    assert products == [("bf16", "bf16")] * 6  # none is of wide and narrow numbers


def test_a_length_that_is_left_open_is_exported():
    (length,) = export.symbolic_shape("t")
    f = jax.jit(lambda x: attend(x, x, x, is_causal=True))
    exported = export.export(f)(jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32))
    x = normal(1, 2 * ROWS_OF_A_BLOCK, 2, 4)
    assert_close(exported.call(x), f(x))


def test_forward_mode_and_second_derivatives():
    q, k, v, dq = normal(2, 5, 4, 3), normal(2, 7, 4, 3), normal(2, 7, 4, 3), normal(5, 2, 4, 3).swapaxes(0, 1)
    f = lambda q: jnp.sum(jnp.sin(attend(q, k, v, is_causal=True)))
    step = 1e-2
    by_differences = (f(q + step * dq) - f(q - step * dq)) / (2 * step)
    assert_close(jax.jvp(f, (q,), (dq,))[1], by_differences, 1e-2)
    hessian = jax.jvp(jax.grad(f), (q,), (dq,))[1]
    gradients = (jax.grad(f)(q + step * dq) - jax.grad(f)(q - step * dq)) / (2 * step)
    assert_close(hessian, gradients, 1e-2)


# ---------------------------------------------------------------- causal attention in blocks
B = ROWS_OF_A_BLOCK


@pytest.mark.parametrize(("length", "keys"), [(5, 5), (2 * B - 1, 2 * B - 1), (2 * B, 2 * B), (3 * B + 7, 3 * B + 7),
                                              (2 * B, B + 9), (2 * B, 3 * B)])  # fmt: skip
def test_causal_attention_is_attention_under_a_causal_mask(length, keys):
    q, k = normal(1, length, 2, 3), normal(1, keys, 2, 3)
    mask = np.tril(np.ones((length, k.shape[1]), bool))
    bias = normal(2, 1, k.shape[1])
    in_blocks = jax.jit(jax.value_and_grad(lambda q: jnp.sum(jnp.sin(attend(q, k, k, bias, is_causal=True)))))(q)
    masked = jax.jit(jax.value_and_grad(lambda q: jnp.sum(jnp.sin(attend(q, k, k, bias, mask=mask)))))(q)
    assert_close(in_blocks[0], masked[0], 1e-4)
    assert_close(in_blocks[1], masked[1])


def test_blocks_do_not_form_what_they_need_not():
    def products(length):
        q = jnp.ones((1, length, 2, 8))
        text = jax.jit(lambda q: attend(q, q, q, is_causal=True)).lower(q).compile().cost_analysis()
        return text["flops"] / length**2

    assert products(BLOCKS * ROWS_OF_A_BLOCK) < 0.75 * products(ROWS_OF_A_BLOCK)


@pytest.mark.parametrize("broadcast", [True, False])
def test_blocks_drop_the_same_weights(broadcast):
    length, key = 2 * ROWS_OF_A_BLOCK, jax.random.key(0)
    q = normal(1, length, 2, 3)
    options = dict(dropout_rng=key, dropout_rate=0.5, broadcast_dropout=broadcast)
    assert_close(attend(q, q, q, is_causal=True, **options), attend(q, q, q, mask=np.tri(length), **options))


# ---------------------------------------------------------------- dropout and recorded weights
@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_of_weights(broadcast):
    q, k, v, key = normal(2, 5, 4, 3), normal(2, 7, 2, 3), normal(2, 7, 2, 3), jax.random.key(0)
    shape = (1, 1, 5, 7) if broadcast else (2, 4, 5, 7)
    weights = weights_of(q, k) * jax.random.bernoulli(key, 0.75, shape) / 0.75
    options = dict(dropout_rng=key, dropout_rate=0.25, broadcast_dropout=broadcast)
    assert_close(attend(q, k, v, **options), mean_of(weights, v))
    assert_close(dot_product_attention_weights(q, k, **options), weights)
    assert_close(attend(q, k, v, deterministic=True, **options), attend(q, k, v))


def test_weights_are_recorded_before_dropout():
    layer, x = attention(dropout_rate=0.5, deterministic=False), normal(2, 5, 8)
    call = nnx.capture(lambda layer, x: layer(x, sow_weights=True), nnx.Intermediate)
    y, recorded = call(layer, x)
    (weights,) = recorded["attention_weights"]
    assert weights.shape == (2, 2, 5, 5)
    assert_close(weights.sum(-1), np.ones((2, 2, 5)))
    again = attention(dropout_rate=0.5, deterministic=False)
    assert_close(y, again(x))


# ---------------------------------------------------------------- masks
def test_masks():
    queries, keys = np.array([[1, 1, 0.0]]), np.array([[1, 0.0]])
    assert nnx.make_attention_mask(queries, keys).tolist() == [[[[1, 0], [1, 0], [0, 0]]]]
    assert nnx.make_attention_mask(queries, keys, extra_batch_dims=2, dtype=bool).shape == (1, 1, 1, 1, 3, 2)
    assert nnx.make_attention_mask(queries, keys, pairwise_fn=jnp.greater)[0, 0, 0].tolist() == [0, 1]
    causal = nnx.make_causal_mask(np.ones((2, 3)))
    assert (causal.shape, causal.dtype) == ((2, 1, 3, 3), jnp.float32)
    assert causal[1, 0].tolist() == np.tri(3).tolist()
    both = nnx.combine_masks(causal, None, np.ones((2, 1, 1, 3)) * np.array([1, 0, 1]), dtype=bool)
    assert both[0, 0].tolist() == [[True, False, False], [True, False, False], [True, False, True]]
    assert nnx.combine_masks(None, None) is None


# ---------------------------------------------------------------- the layer
def attention(*args, **options):
    return nnx.MultiHeadAttention(
        *(args or (2, 8)), **{"decode": False, "bias_init": NORMAL, **options}, rngs=nnx.Rngs(0)
    )


def spelled_out(layer, x_q, x_k):
    project = lambda part, x: np.einsum("...f,fhd->...hd", x, part.kernel[...]) + np.asarray(part.bias)
    q, k, v = project(layer.query, x_q), project(layer.key, x_k), project(layer.value, x_k)
    y = mean_of(weights_of(q, k), v)
    return np.einsum("...hd,hdo->...o", y, layer.out.kernel[...]) + np.asarray(layer.out.bias)


@pytest.mark.parametrize("sizes", [(2, 8), (4, 8, 12, 3, 2, 6)])
def test_the_layer(sizes):
    layer = attention(*sizes)
    x_q, x_k = normal(2, 5, 8), normal(2, 7, layer.in_kv_features)
    assert_close(layer(x_q, x_k), spelled_out(layer, x_q, x_k))
    assert_close(layer(x_q, x_k, x_k), layer(x_q, x_k))
    if len(sizes) == 2:
        assert_close(layer(x_q), layer(x_q, x_q, x_q))


def test_the_attention_function_is_replaceable_and_gets_what_it_needs():
    got = {}

    def first_value(q, k, v, **options):
        got.update(options)
        return jnp.broadcast_to(v[..., :1, :, :], q.shape)

    attention(attention_fn=first_value, dropout_rate=0.5)(normal(2, 5, 8), deterministic=True, is_causal=True)
    dropout = {"dropout_rng": None, "dropout_rate": 0.5, "broadcast_dropout": True, "deterministic": True}
    assert got == {**dropout, "mask": None, "dtype": None, "precision": None, "module": None, "is_causal": True}


def test_dropout_is_drawn_from_a_stream_of_its_own():
    layer, x = attention(dropout_rate=0.5, deterministic=False), normal(2, 5, 8)
    first = layer(x)
    assert int(layer.rngs.count[...]) == 1
    assert np.any(first != layer(x))
    layer.eval()
    assert_close(layer(x), layer(x))
    assert np.any(layer(x, deterministic=False, rngs=nnx.Rngs(3)) != layer(x))


def test_no_stream_is_kept_where_none_is_needed():
    assert attention().rngs is None
    assert attention(dropout_rate=0.5, keep_rngs=False).rngs is None


def test_metadata_of_the_last_projection_default_to_the_others():
    layer = attention(kernel_metadata={"a": 1}, bias_metadata={"b": 2}, out_bias_metadata={"c": 3})
    assert layer.query.kernel.a == layer.out.kernel.a == 1
    assert layer.value.bias.b == 2
    assert not layer.out.bias.has_metadata("b")
    assert layer.out.bias.c == 3


# ---------------------------------------------------------------- decoding
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
@pytest.mark.parametrize("heads", [None, 1])
def test_decoding_position_by_position_is_causal_attention(batch, heads):
    layer, x = attention(num_kv_heads=heads, decode=True), normal(*batch, 5, 8)
    layer.init_cache(x.shape)
    whole = layer(x, decode=False, is_causal=True)
    for i in range(5):
        assert_close(layer(x[..., i : i + 1, :]), whole[..., i : i + 1, :])
    assert int(layer.cache_index[...]) == 5


def test_is_causal_says_nothing_new_while_decoding():
    x, ys = normal(2, 3, 8), []
    for is_causal in (False, True):
        layer = attention(decode=True)
        layer.init_cache(x.shape)
        ys.append([layer(x[:, i : i + 1], is_causal=is_causal) for i in range(3)])
    assert_close(ys[0], ys[1])


def test_decoding_with_a_mask():
    layer, x, seen = attention(decode=True), normal(2, 5, 8), np.array([1, 0, 1, 1, 1], bool)
    layer.init_cache(x.shape)
    ys = [layer(x[:, i : i + 1], mask=seen) for i in range(5)]
    expected = layer(x, decode=False, mask=np.tri(5, dtype=bool) & seen)
    assert_close(jnp.concatenate(ys, 1)[:, [0, 2, 3, 4]], expected[:, [0, 2, 3, 4]])


def test_a_cache_of_another_dtype():
    layer, x = attention(decode=True), normal(2, 5, 8)
    layer.init_cache(x.shape, jnp.bfloat16)
    y = layer(x[:, :1])
    assert (layer.cached_key.dtype, layer.cached_value.dtype, layer.cache_index.dtype) == (
        "bfloat16",
        "bfloat16",
        "int32",
    )
    assert_close(y, layer(x[:, :1], decode=False), 2e-2)


def test_decoding_in_a_jitted_loop():
    layer, x = attention(decode=True), normal(2, 5, 8)
    layer.init_cache(x.shape)
    step = nnx.scan(lambda layer, x: (layer, layer(x[:, None])[:, 0]), in_axes=(nnx.Carry, 1), out_axes=(nnx.Carry, 1))
    layer, y = nnx.jit(step)(layer, x)
    assert_close(y, layer(x, decode=False, is_causal=True))


def test_a_view_decodes_with_a_cache_of_its_own():
    layer, x = attention(decode=None), normal(2, 1, 8)
    view = nnx.view(layer, decode=True, batch_size=2, max_length=9)
    assert (view.decode, view.cached_key.shape, layer.decode, layer.cached_key) == (True, (2, 9, 2, 4), None, None)
    assert view.query.kernel is layer.query.kernel
    assert_close(view(x), nnx.view(layer, decode=False)(x))
    assert nnx.view(layer, decode=True, batch_size=(3, 2), max_length=9).cached_value.shape == (3, 2, 9, 2, 4)


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize("sizes", [(3, 8), (0, 8), (4, 8, 8, 8, 3), (4, 8, 8, 8, 0)])
def test_heads_have_to_divide(sizes):
    with pytest.raises(ArgumentError, match="must be divisible by"):
        attention(*sizes)


def test_inputs_have_to_fit():
    layer = attention(2, 8, in_kv_features=6)
    with pytest.raises(ShapeError, match="Incompatible input dimension"):
        layer(normal(2, 5, 7))
    with pytest.raises(ShapeError, match="in_kv_features=8"):
        layer(normal(2, 5, 8))
    with pytest.raises(ArgumentError, match="`inputs_k` cannot be None"):
        layer(normal(2, 5, 8), None, normal(2, 5, 6))
    with pytest.raises(ShapeError, match="batch dims must match"):
        layer(normal(2, 5, 8), normal(3, 5, 6))


def test_decoding_has_to_be_prepared():
    layer = attention(decode=True)
    with pytest.raises(ArgumentError, match="Autoregressive cache not initialized"):
        layer(normal(2, 1, 8))
    layer.init_cache((2, 5, 8))
    with pytest.raises(ShapeError, match="Autoregressive cache shape error"):
        layer(normal(2, 3, 8))
    with pytest.raises(ArgumentError, match="No `decode` argument"):
        attention(decode=None)(normal(2, 5, 8))


def test_dropout_has_to_be_decided_and_needs_a_stream():
    with pytest.raises(ArgumentError, match="No `deterministic` argument"):
        attention(dropout_rate=0.5)(normal(2, 5, 8))
    with pytest.raises(RngError, match="keep_rngs=False"):
        attention(dropout_rate=0.5, keep_rngs=False)(normal(2, 5, 8), deterministic=False)
    with pytest.raises(RngError, match="no key"):
        attend(*[normal(2, 5, 4, 3)] * 3, dropout_rate=0.5)


@pytest.mark.parametrize(
    ("q", "k", "v", "words"),
    [
        ((5, 4, 3), (2, 7, 4, 3), (2, 7, 4, 3), "same rank"),
        ((2, 3), (2, 3), (2, 3), "same rank"),
        ((1, 5, 4, 3), (2, 7, 4, 3), (2, 7, 4, 3), "batch dims"),
        ((2, 5, 4, 3), (2, 7, 4, 3), (2, 6, 4, 3), "lengths"),
        ((2, 5, 4, 3), (2, 7, 3, 3), (2, 7, 3, 3), "multiple of key heads"),
        ((2, 5, 4, 3), (2, 7, 4, 3), (2, 7, 2, 3), "same number of heads"),
        ((2, 5, 4, 3), (2, 7, 4, 2), (2, 7, 4, 3), "depths"),
    ],
)
def test_queries_keys_and_values_have_to_fit_together(q, k, v, words):
    with pytest.raises(ShapeError, match=words):
        attend(normal(*q), normal(*k), normal(*v))


def test_masks_of_two_ranks_are_refused():
    with pytest.raises(ShapeError, match="same rank"):
        nnx.combine_masks(jnp.ones((5, 5)), jnp.ones((1, 1, 5, 5)))


def test_shared_heads_on_explicit_mesh_axes():
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    query, key = jax.random.normal(jax.random.key(0), (2, 4, 5, 4, 3))[0], jnp.ones((4, 5, 2, 3)).at[1].set(2.0)
    expected = nnx.dot_product_attention(query, key, 3 * key)
    with jax.set_mesh(mesh):
        q = jax.device_put(query, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "heads")))
        k = jax.device_put(key, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        got = nnx.dot_product_attention(q, k, 3 * k)
        assert jax.typeof(got).sharding.spec[2] == "heads"
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
