# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit floats: near the exact ones, with current and with delayed scaling, in any model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.precision import DelayedDot, Fp8State, Policy, audit, delayed, explain_precision, fp8_dot_general, policy

DIMS = (((1,), (0,)), ((), ()))


def values(*shape: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("how", ["current", "delayed"])
def test_products_and_gradients_are_near_the_exact_ones_at_any_scale(how: str, scale: float) -> None:
    x, w, g = values(8, 16, scale=scale), values(16, 4), values(8, 4, scale=scale)
    dot = fp8_dot_general
    if how == "delayed":
        dot = DelayedDot(history=2)
        for _ in range(2):  # one call fills the history, the next one takes the scale from it
            dot(x, w, DIMS)
        dot.eval()
    y, pull = jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)
    exact, exact_pull = jax.vjp(lambda x, w: x @ w, x, w)
    for mine, other in zip((y, *pull(g)), (exact, *exact_pull(g)), strict=True):
        assert jnp.linalg.norm(mine - other) < 0.08 * jnp.linalg.norm(other)


def test_the_dtype_of_the_result_is_that_of_any_product() -> None:
    x, w = values(2, 4).astype(jnp.bfloat16), values(4, 3).astype(jnp.bfloat16)
    assert fp8_dot_general(x, w, DIMS).dtype == jnp.bfloat16
    assert fp8_dot_general(x, w, DIMS, preferred_element_type=jnp.float32).dtype == jnp.float32
    assert fp8_dot_general(0 * x, w, DIMS).tolist() == [[0.0] * 3] * 2


class Model(nnx.Module):
    """Every kind of layer that multiplies, one in a stack, and a router."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(11, 16, rngs=rngs)
        self.blocks = nnx.Stack(lambda rngs: nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs), 2, rngs=rngs)
        self.einsum = nnx.Einsum("bd,df->bf", (16, 5), (5,), rngs=rngs)
        self.router = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.blocks(self.table(ids)).mean(1)
        return self.einsum(x) + self.router(x)


IDS = jax.random.randint(jax.random.key(0), (4, 6), 0, 11)


def losses(model: Model, mixed: Policy, steps: int = 12) -> list[float]:
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = mixed.result(mixed(model)(IDS))
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_training_with_current_and_with_delayed_scaling_is_as_good() -> None:
    learner = Model(nnx.Rngs(0))
    delayed(learner, history=4)
    runs = [losses(Model(nnx.Rngs(0)), policy(name)) for name in ("float32", "fp8")]
    runs.append(losses(learner, policy("bfloat16")))
    exact = runs[0]
    assert exact[-1] < 0.2 * exact[0]
    for run in runs[1:]:
        np.testing.assert_allclose(run, exact, atol=0.08)
    scales = learner.blocks.layers.query.dot_general.kernel_scale
    assert isinstance(scales, Fp8State) and scales.shape == (2, 1) and scales[0] != scales[1]
    assert not isinstance(learner.router.dot_general, DelayedDot), "routers are kept"
    before = jax.tree.map(jnp.copy, nnx.state(learner, Fp8State))
    learner.eval()
    learner(IDS)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(learner, Fp8State))


def test_the_preset_replaces_the_products_of_layers_that_are_not_kept() -> None:
    model = Model(nnx.Rngs(0))
    products = audit(policy("fp8")(model), IDS).products
    assert dict(products["einsum"]) == {"float8_e4m3fn x float8_e4m3fn": 1}
    assert dict(products["blocks/layers/query"]) == {"float8_e4m3fn x float8_e4m3fn": 1}
    assert dict(products["router"]) == {"float32 x float32": 1}
    assert model.einsum.einsum_op is jnp.einsum, "the model itself stays"
    own = nnx.Linear(2, 2, dot_general=lambda *args, **options: jax.lax.dot_general(*args), rngs=nnx.Rngs(0))
    assert policy("fp8")(own).dot_general is own.dot_general, "and so does a product that was chosen"


def test_the_explanation_names_what_is_replaced_and_what_is_kept() -> None:
    found = explain_precision(Model(nnx.Rngs(0)), "fp8")
    assert found["blocks/layers/query"][1:] == ("LinearGeneral", "float32", "bfloat16", "bfloat16", "product")
    assert found["router"][1:] == ("Linear", "float32", "float32", "float32", "*router*")
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    assert explain_precision(abstract, policy("fp8")) == found
    assert "product" in str(found)
    whole = explain_precision(Model(nnx.Rngs(0)), Policy(keep=("MultiHeadAttention",)))
    assert whole["blocks/layers/query"].rule == "MultiHeadAttention", "the parts of what is kept are kept"
