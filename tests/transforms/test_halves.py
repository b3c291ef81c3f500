# SPDX-License-Identifier: Apache-2.0
"""Foreign transforms lifted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from batiste import nnx
from batiste.transforms.halves import merge_inputs, split_inputs


class Counter(nnx.Module):
    def __init__(self):
        self.n = nnx.Variable(jnp.zeros(()))
        self.w = nnx.Param(jnp.ones(3))


def test_updates_and_new_structure_come_back_through_jax_jit():
    @split_inputs
    @jax.jit
    @merge_inputs
    def step(m, x):
        m.n[...] += 1
        m.new = nnx.Param(x)
        return m, m.w * x

    m = Counter()
    same, y = step(m, 2.0)
    assert same is m and float(m.n[...]) == 1 and float(m.new[...]) == 2
    np.testing.assert_array_equal(y, [2, 2, 2])


def test_branches_share_what_they_change():
    def count(m, x):
        m.n[...] += x
        return x

    def leave(m, x):
        return -x

    m = Counter()
    for choice, result in ((True, 2.0), (False, -2.0)):
        assert float(split_inputs(jax.lax.cond)(choice, merge_inputs(count), merge_inputs(leave), m, 2.0)) == result
    assert float(m.n[...]) == 2


def test_axes_speak_of_inputs_and_output():
    axes = (None, 0)

    @split_inputs
    @functools.partial(jax.vmap, in_axes=axes, out_axes=(axes, 0))
    @merge_inputs
    def scale(m, x):
        return m.w * x

    assert scale(Counter(), jnp.ones((5, 3))).shape == (5, 3)
