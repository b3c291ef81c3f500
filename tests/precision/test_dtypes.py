# SPDX-License-Identifier: Apache-2.0
"""Dtype promotion: which dtype several arrays are computed in."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from batiste.graph import Param
from batiste.graph.errors import ArgumentError
from batiste.precision import canonicalize_dtype, promote_dtype

F32, BF16, F16, I32, U8, C64 = (
    jnp.ones(2, t) for t in ("float32", "bfloat16", "float16", "int32", "uint8", "complex64")
)


@pytest.mark.parametrize(
    ("arrays", "options", "expected"),
    [
        ((F32, BF16), {}, "float32"),
        ((F16, BF16), {}, "float32"),
        ((BF16, None), {}, "bfloat16"),
        ((1.0, BF16), {}, "bfloat16"),
        ((I32, BF16), {}, "bfloat16"),
        ((C64, F32), {}, "complex64"),
        ((I32,), {}, "float32"),
        ((True, 2), {}, "float32"),
        ((I32, U8), {"inexact": False}, "int32"),
        ((U8,), {"inexact": False}, "uint8"),
        ((F32,), {"dtype": "bfloat16"}, "bfloat16"),
        ((F32,), {"dtype": jnp.int32, "inexact": False}, "int32"),
        ((Param(F32), Param(BF16)), {}, "float32"),
    ],
)
def test_what_is_computed_in(arrays, options, expected):
    assert jnp.dtype(canonicalize_dtype(*arrays, **options)) == expected
    promoted = promote_dtype(arrays, **options)
    assert [None if x is None else x.dtype == expected for x in promoted] == [
        None if x is None else True for x in arrays
    ]


def test_what_has_the_dtype_already_is_returned_as_it_is():
    (same,) = promote_dtype((F32,))
    assert same is F32


def test_a_weak_type_becomes_a_strong_one():
    weak = jnp.asarray(1.0)
    assert weak.weak_type
    assert not promote_dtype((weak, F32))[0].weak_type


@pytest.mark.parametrize(
    ("provoke", "message"),
    [
        (lambda: canonicalize_dtype(), "at least one array or dtype is required"),
        (lambda: promote_dtype((None,)), "at least one array or dtype is required"),
        (lambda: promote_dtype((F32,), dtype=jnp.int32), "Dtype must be inexact"),
    ],
)
def test_refusals(provoke, message):
    with pytest.raises(ArgumentError, match=message):
        provoke()
