# SPDX-License-Identifier: Apache-2.0
"""Normalising layers of the functional face: the precision of their moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen as nn

LAYERS = {
    "BatchNorm": nn.BatchNorm(use_running_average=False),
    "GroupNorm": nn.GroupNorm(num_groups=2),
    "InstanceNorm": nn.InstanceNorm(),
    "LayerNorm": nn.LayerNorm(),
    "RMSNorm": nn.RMSNorm(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_half_precision_overflow_only_where_that_is_asked_for(name: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4)).astype(jnp.float16) * 1000  # whose squares are too large
    wide = LAYERS[name].clone(force_float32_reductions=True)
    narrow = LAYERS[name].clone(force_float32_reductions=False)
    variables = wide.init(jax.random.key(1), x)
    outputs = [layer.apply(variables, x, mutable=["batch_stats"])[0] for layer in (wide, narrow)]
    assert [y.dtype for y in outputs] == [jnp.float32, jnp.float32]
    assert np.std(outputs[0]) > 0.5 and not np.any(np.isclose(*outputs))


@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_single_precision_are_the_same(name: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    layers = [LAYERS[name].clone(force_float32_reductions=force) for force in (True, False)]
    a, b = [layer.init_with_output(jax.random.key(1), x)[0] for layer in layers]
    np.testing.assert_array_equal(a, b)
