# SPDX-License-Identifier: Apache-2.0
"""Attention of the functional face: its parts are modules, its products can be replaced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.linen as nn

X = jnp.sin(jnp.arange(40.0)).reshape(1, 5, 8)
KEY = jax.random.key(0)


def test_its_parts_are_modules_that_interceptors_see():
    seen = []

    def note(call, args, kwargs, context):
        seen.append((context.module.name, type(context.module).__name__))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        nn.MultiHeadAttention(2, normalize_qk=True).init(KEY, X)
    dense, norm = "DenseGeneral", "LayerNorm"
    assert seen == [(None, "MultiHeadAttention"), ("query", dense), ("key", dense), ("value", dense),
                    ("query_ln", norm), ("key_ln", norm), ("out", dense)]  # fmt: skip


class Counted(nn.Module):
    @nn.compact
    def __call__(self, *args):
        self.variable("calls", "equation", lambda: jnp.zeros(()))
        return jnp.einsum(*args)


def test_classes_of_einsum_are_parts_of_it():
    plain = nn.MultiHeadAttention(2)
    layer = nn.MultiHeadAttention(2, qk_attn_weights_einsum_cls=Counted, attn_weights_value_einsum_cls=Counted)
    y, variables = layer.init_with_output(KEY, X)
    assert list(variables["calls"]) == ["Counted_0", "Counted_1"]
    np.testing.assert_allclose(y, plain.apply({"params": variables["params"]}, X), rtol=1e-5, atol=1e-6)


def test_a_function_for_both_products_replaces_them():
    shapes = []

    def product(x, y, *args, **options):
        shapes.append((x.shape, y.shape))
        return jax.lax.dot_general(x, y, *args, **options)

    q = X.reshape(1, 5, 2, 4)
    y = nn.dot_product_attention(q, q, q, einsum_dot_general=product)
    assert len(shapes) == 2
    np.testing.assert_allclose(y, nn.dot_product_attention(q, q, q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"qk_attn_weights_einsum": jnp.einsum},
                                     {"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum,
                                      "precision": "highest"}])  # fmt: skip
def test_einsums_that_exclude_each_other_are_refused(options):
    q = X.reshape(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"must be specified together|mutually exclusive"):
        nn.dot_product_attention(q, q, q, **options)


def test_weights_in_float32_make_a_result_in_float32():
    q = X.reshape(1, 5, 2, 4).astype(jnp.bfloat16)
    assert nn.dot_product_attention(q, q, q).dtype == jnp.bfloat16
    assert nn.dot_product_attention(q, q, q, force_fp32_for_softmax=True).dtype == jnp.float32


def test_a_function_of_attention_gets_the_arguments_that_it_knows():
    def attend(query, key, value, mask=None, dtype="unset"):
        assert mask is None
        assert dtype is None
        return query + key + value

    assert nn.MultiHeadAttention(2, attention_fn=attend).init_with_output(KEY, X)[0].shape == X.shape


def test_the_cache_is_made_by_the_first_call_that_may_write_it():
    layer = nn.MultiHeadAttention(2, decode=True)
    params = {"params": layer.init(KEY, X)["params"]}
    y, cache = layer.apply(params, X, mutable=["cache"])
    assert y.shape == X.shape
    assert int(cache["cache"]["cache_index"]) == 0
    _, cache = layer.apply({**params, **cache}, X[:, :1], mutable=["cache"])
    assert int(cache["cache"]["cache_index"]) == 1


def test_a_mask_in_the_place_of_values_is_warned_of():
    with pytest.warns(DeprecationWarning, match="the kwarg `mask`"), pytest.raises(ValueError, match="rank"):
        nn.MultiHeadAttention(2).init(KEY, X, X, nn.make_causal_mask(X[..., 0]))
