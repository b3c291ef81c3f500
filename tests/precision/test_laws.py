# SPDX-License-Identifier: Apache-2.0
"""What holds for every layer under a policy: one row of the table of layers for each class."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.precision import Policy, policy
from tests.parity.case import Case
from tests.parity.layers import CASES

FUNCTIONS = ("pool", "complex")  # pooling is no layer, and a policy leaves complex numbers alone


def first_of_each_class() -> list[Case]:
    """The first rows in which a layer is given no dtype."""
    found: dict[type, Case] = {}
    for case in CASES:
        if "bf16" not in case.name and not any(word in case.name for word in FUNCTIONS):
            found.setdefault(type(case.build(nnx)), case)
    return list(found.values())


LAYERS = first_of_each_class()


def floats(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def run(case: Case, mixed: Policy) -> tuple[Any, ...]:
    """The results under a policy, the gradients, and the state afterwards."""

    @nnx.jit
    def step(layer: Any, inputs: Any) -> Any:
        def loss(layer: Any) -> Any:
            y = case.call(mixed(layer), *mixed.cast(inputs))
            return sum((x.astype(jnp.float32) ** 2).mean() for x in floats(y)), y

        return nnx.grad(loss, has_aux=True)(layer)

    layer = case.build(nnx)
    gradients, y = step(layer, [jnp.asarray(x) for x in case.inputs])
    return floats(y), floats(gradients), nnx.state(layer)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_computed_narrow_kept_wide_and_about_the_same(case: Case) -> None:
    ours, gradients, after = run(case, policy("bfloat16"))
    exact, exact_gradients, _ = run(case, policy("float32"))
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in (*gradients, *floats(after))} <= {jnp.dtype(jnp.float32)}
    for mine, other in ((ours, exact), (gradients, exact_gradients)):
        scale = max((float(jnp.abs(x).max()) for x in other), default=0.0)
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.04, atol=0.04 * scale)
