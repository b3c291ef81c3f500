# SPDX-License-Identifier: Apache-2.0
"""Parts of layers that programs import from below `linen` to make layers of their own: the same from either library."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FACES = ("batiste", "flax")
X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
TYPES = {
    "linear": "Module Dtype PRNGKey PaddingLike PrecisionLike DotGeneralT LaxPadding PromoteDtypeFn Shape",
    "attention": "Dtype PRNGKey PrecisionLike DotGeneralT Shape",
    "normalization": "Dtype Module PRNGKey Shape canonicalize_dtype",
    "recurrent": "Dtype PRNGKey PrecisionLike",
}


@pytest.mark.parametrize("path", TYPES)
def test_names_that_annotations_need(path) -> None:
    for face in FACES:
        module = import_module(f"{face}.linen.{path}")
        assert [name for name in TYPES[path].split() if not hasattr(module, name)] == []


def test_dims() -> None:
    ours, theirs = (import_module(f"{face}.linen.linear") for face in FACES)
    for shape in [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5)]:
        assert ours._conv_dimension_numbers(shape) == theirs._conv_dimension_numbers(shape)
    for x in (3, [1, 2], (4,)):
        assert ours._canonicalize_tuple(x) == theirs._canonicalize_tuple(x)
    assert ours._normalize_axes((-1, 0), 3) == theirs._normalize_axes((-1, 0), 3)
    ours, theirs = (import_module(f"{face}.linen.normalization") for face in FACES)
    for axes in (-1, (0, -2), [2]):
        assert ours._canonicalize_axes(3, axes) == theirs._canonicalize_axes(3, axes)


@pytest.mark.parametrize("settings", [{}, {"use_mean": False}, {"use_fast_variance": False}, {"mask": X > 0}], ids=str)
def test_moments(settings) -> None:
    settings = {key: jnp.asarray(value) if key == "mask" else value for key, value in settings.items()}
    ours, theirs = (import_module(f"{face}.linen.normalization")._compute_stats for face in FACES)
    for dtype, x in ((None, X), (jnp.bfloat16, X), (None, X.astype(jnp.bfloat16))):
        for got, expected in zip(ours(x, (0, -2), dtype, **settings), theirs(x, (0, -2), dtype, **settings)):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def _norm(face: str, features: Any, dtype: Any, use_bias: bool) -> tuple[Any, Any]:
    linen, parts = import_module(f"{face}.linen"), import_module(f"{face}.linen.normalization")
    inits = jax.nn.initializers.normal(), jax.nn.initializers.normal(1.0)

    class Norm(linen.Module):
        @linen.compact
        def __call__(self, x):
            mean, var = parts._compute_stats(x, (0,), dtype)
            return parts._normalize(
                self, x, mean, var, (0,), features, dtype, jnp.float32, 1e-3, use_bias, True, *inits
            )

    y, variables = Norm().init_with_output(jax.random.key(0), X)
    return y, variables


@pytest.mark.parametrize("features", [-1, (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["same", "bfloat16"])
def test_a_norm_made_of_parts(features, dtype) -> None:
    (got, variables), (expected, theirs) = (_norm(face, features, dtype, features == -1) for face in FACES)
    assert jax.tree.structure(variables) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=1e-5, atol=1e-5)
