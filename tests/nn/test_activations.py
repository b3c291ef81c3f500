# SPDX-License-Identifier: Apache-2.0
"""Activations and initialisers: JAX's functions under their own names, and the learnt slope of PReLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nn
from batiste.graph import Param
from batiste.nn import PReLU, activations, initializers


@pytest.mark.parametrize("name", [name for name in activations.__all__ if name != "PReLU"])
def test_activations_are_those_of_jax(name):
    assert getattr(nn, name) is getattr(jax.nn, name)


@pytest.mark.parametrize("name", [name for name in initializers.__all__ if name[0].islower()])
def test_initialisers_are_those_of_jax(name):
    if name.endswith("s_init"):
        assert getattr(initializers, name)() is getattr(jax.nn.initializers, name.removesuffix("_init"))
    else:
        assert getattr(initializers, name) is getattr(jax.nn.initializers, name)


def test_prelu_scales_what_is_negative():
    layer = PReLU(0.25)
    assert type(layer.negative_slope) is Param
    np.testing.assert_array_equal(layer(jnp.array([-2.0, 0.0, 3.0])), [-0.5, 0.0, 3.0])


def test_the_gradient_of_the_slope_is_the_sum_of_what_is_negative():
    gradient = jax.grad(lambda layer: layer(jnp.array([-2.0, -1.0, 3.0])).sum())(PReLU())
    assert gradient.negative_slope[...] == -3.0


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "of_input", "expected"),
    [
        (None, "float32", "bfloat16", "bfloat16"),
        (None, "bfloat16", "float32", "float32"),
        ("bfloat16", "float32", "float32", "bfloat16"),
        ("float32", "bfloat16", "bfloat16", "float32"),
    ],
)
def test_prelu_keeps_the_inputs_dtype_unless_it_has_one(dtype, param_dtype, of_input, expected):
    layer = PReLU(dtype=dtype, param_dtype=param_dtype)
    assert layer.negative_slope.dtype == param_dtype
    assert layer(jnp.ones(2, of_input)).dtype == expected


def test_metadata_reaches_the_slope():
    assert PReLU(negative_slope_metadata={"note": "slope"}).negative_slope.note == "slope"
