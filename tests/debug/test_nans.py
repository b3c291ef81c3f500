# SPDX-License-Identifier: Apache-2.0
"""The search for the first NaN: the right part, operation, parameter, line and iteration, under every transform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen, nnx
from batiste.debug import why_nan
from batiste.graph import iter_graph
from tests.parity.layers import CASES

X = np.ones((2, 3), np.float32)


class Sandwich(nnx.Module):
    """The same layer three times; the one in the middle can be hurt."""

    def __init__(self, case):
        self.before, self.hurt, self.behind = (case.build(nnx) for _ in range(3))
        self.poison = nnx.Variable(jnp.zeros(()))

    def __call__(self, case, inputs):
        add = lambda x: x + self.poison.astype(x.dtype) if np.issubdtype(x.dtype, np.floating) else x
        outs = [
            case.call(self.before, *inputs),
            case.call(self.hurt, *map(add, inputs)),
            case.call(self.behind, *inputs),
        ]
        return sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(outs))


def one_case_per_layer() -> list:
    chosen = {}
    for case in CASES:
        chosen.setdefault(type(case.build(nnx)).__name__, case)
    return list(chosen.values())


LAYERS = one_case_per_layer()
WAYS = {
    "jit": lambda f: nnx.jit(f),
    "grad": lambda f: nnx.jit(nnx.value_and_grad(f)),
    "remat": lambda f: nnx.jit(nnx.value_and_grad(nnx.remat(f))),
    "vmap": lambda f: nnx.jit(lambda model, xs: nnx.vmap(f, in_axes=(None, 0))(model, [x[None] for x in xs])),
}


def hurt(model: Sandwich) -> str | None:
    """Puts a NaN into a parameter of the layer in the middle, else into what it is given. Gives the path."""
    for path, x in iter_graph(model.hurt):
        if isinstance(x, nnx.Param) and x[...] is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x[...] = jnp.full_like(x[...], jnp.nan)
            return "/".join(map(str, ("hurt", *path)))
    model.poison[...] = jnp.array(jnp.nan)
    return None


def test_there_are_at_least_twenty_layers() -> None:
    assert len(LAYERS) >= 20


@pytest.mark.parametrize("n", range(len(LAYERS)), ids=[case.name for case in LAYERS])
def test_an_injected_nan_is_found_in_the_right_part(n: int) -> None:
    case, way = LAYERS[n], list(WAYS.values())[n % len(WAYS)]
    model = Sandwich(case)
    where = hurt(model)
    found = why_nan(way(lambda model, inputs: model(case, inputs)), model, [jnp.asarray(x) for x in case.inputs])
    assert found is not None and found.what == "nan"
    if where is None:
        assert found.argument == "model/poison"
    else:
        assert found.argument == f"model/{where}" and found.came_in
        assert found.module is not None and found.module.startswith("hurt"), str(found)


class Overflow(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jnp.exp(self.linear(x) * 1e3 + 1e3)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs), Overflow(rngs), nnx.LayerNorm(3, rngs=rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_an_infinity_that_becomes_a_nan_later_is_the_cause() -> None:
    found = why_nan(nnx.jit(nnx.grad(lambda model, x: jnp.sum(model(x)))), Net(nnx.Rngs(0)), X * 10)
    assert (found.what, found.operation, found.module) == ("inf", "exp", "blocks/1 (Overflow)")
    assert "test_nans.py" in found.source and "(Overflow.__call__)" in found.source
    assert not found.backward
    assert "module    blocks/1 (Overflow)" in str(found)


def test_the_iteration_of_a_scan_is_named() -> None:
    stack = nnx.Stack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 4, rngs=nnx.Rngs(0), remat="full")
    stack.layers.kernel[...] = stack.layers.kernel[...].at[2, 0, 0].set(jnp.nan)
    found = why_nan(nnx.jit(nnx.grad(lambda model, x: jnp.sum(model(x)))), stack, X)
    assert (found.argument, found.index) == ("model/layers/kernel", (2, 0, 0))
    assert found.module == "layers (Linear)" and found.iterations == ("2 of 4",)


def test_a_gradient_that_is_nan_where_the_value_is_not() -> None:
    def safe(x):
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))

    assert why_nan(safe, jnp.zeros(3)) is None
    found = why_nan(jax.grad(safe), jnp.zeros(3))
    assert found is not None and found.argument == "x" and "<locals>.safe)" in found.source


def test_what_comes_to_nothing_is_passed_over() -> None:
    assert why_nan(lambda x: jnp.where(x > 2, jnp.log(-x), x) + jnp.nan_to_num(x / 0), jnp.ones(3)) is None


def test_while_loops_branches_and_batched_ones() -> None:
    def looped(x):
        return jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.log(c[1] - 1)), (0, x))[1]

    found = why_nan(jax.vmap(looped), jnp.array([50.0, 3.0]))
    assert found.operation == "log" and found.iterations == ("1",)
    uneven = lambda x: jax.lax.while_loop(lambda c: c < 8, lambda c: c * jnp.where(c < 0, jnp.nan, 2), x)
    assert why_nan(jax.vmap(uneven), jnp.array([1.0, 3.0])) is None
    branched = lambda p, x: jax.lax.cond(p, lambda x: x / 0, lambda x: x, x)
    assert why_nan(branched, False, 1.0) is None
    assert why_nan(branched, True, 1.0).operation == "div"


def test_a_jitted_method_that_two_parts_share_is_told_apart() -> None:
    class Inner(nnx.Module):
        def __init__(self, scale):
            self.scale = nnx.Param(jnp.array(scale))

        @nnx.jit
        def __call__(self, x):
            return jnp.log(x * self.scale)

    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = Inner(1.0), Inner(-1.0)

        def __call__(self, x):
            return self.a(x) + self.b(x)

    model = Two()
    model(X)
    assert why_nan(model, X).module == "b (Inner)"


def test_the_functional_face() -> None:
    class Face(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3, name="second")(linen.Dense(3, name="first")(x))

    variables = Face().init(jax.random.key(0), X)
    variables["params"]["second"]["kernel"] = variables["params"]["second"]["kernel"].at[0, 0].set(jnp.nan)
    found = why_nan(jax.jit(Face().apply), variables, X)
    assert found.argument.endswith("params/second/kernel") and "second" in found.module


def test_what_a_step_gives_away_stays() -> None:
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda model, x: jnp.log(model(x) - jnp.inf), donate_argnums=0)
    assert why_nan(step, model, X).operation == "sub"
    assert np.isfinite(model.kernel[...]).all(), "the buffers are still there"


def test_nothing_is_written() -> None:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    why_nan(model, X * jnp.nan)
    assert np.isfinite(model.mean[...]).all()
