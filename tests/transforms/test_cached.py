# SPDX-License-Identifier: Apache-2.0
"""Functions with fixed first arguments: what they share with the caller's objects, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from batiste import nnx

TREES = [dict(graph=True, graph_updates=False), dict(graph=False, graph_updates=False), dict(graph=False)]


class Layer(nnx.Module):
    def __init__(self):
        self.w, self.n = nnx.Param(jnp.ones(2)), 1


def add(m, x):
    m.w[...] += x
    return m.w.sum()


# ---------------------------------------------------------------- cached_partial
def test_values_are_shared_both_ways():
    m = Layer()
    f = nnx.cached_partial(nnx.jit(add), m)
    assert float(f(1.0)) == 4 and float(m.w[0]) == 2
    m.w[...] = 0
    assert float(f(1.0)) == 2 and f.__name__ == "add"


def test_later_changes_of_structure_are_not_seen():
    m = Layer()
    w = m.w
    f = nnx.cached_partial(nnx.jit(add), m)
    m.n, m.more, m.w = 2, nnx.Param(1.0), nnx.Param(jnp.zeros(2))
    f(1.0)
    assert float(w[0]) == 2 and float(m.w[0]) == 0


def grow(m, x):
    m.more = nnx.Param(x)


def setting(m, x):
    m.n = 7


def temporary(m, x):
    m.more = nnx.Param(x)
    nnx.pop(m, lambda path, v: "more" in path)
    return x + 1


@pytest.mark.parametrize("change", [grow, setting])
def test_the_function_must_not_change_the_structure_and_can_be_called_again(change):
    m = Layer()
    f = nnx.cached_partial(nnx.jit(change), m)
    for _ in range(2):
        with pytest.raises(ValueError, match="cached_partial was mutated"):
            f(1.0)
    assert not hasattr(m, "more") and m.n == 1


def test_a_temporary_change_is_fine_and_so_are_changes_elsewhere():
    m, other = Layer(), Layer()
    f = nnx.cached_partial(nnx.jit(temporary), m)
    nnx.jit(grow)(other, 1.0)
    assert float(f(1.0)) == 2 and hasattr(other, "more")


def test_sharing_between_the_fixed_arguments_is_kept_and_the_caller_gets_the_copy():
    m = Layer()
    assert bool(nnx.cached_partial(nnx.jit(lambda a, b, c: a is b["m"] and a is not c), m, {"m": m})(m))
    copy = nnx.cached_partial(nnx.jit(lambda m: m), m)()
    assert copy is not m and copy.w is m.w


def test_arrays_variables_and_any_transform_may_be_fixed():
    v, m = nnx.Param(jnp.ones(2)), Layer()
    nnx.cached_partial(nnx.jit(lambda v, x: v.set_value(v[...] + x)), v)(1.0)
    np.testing.assert_array_equal(v[...], [2, 2])
    np.testing.assert_array_equal(nnx.cached_partial(nnx.jit(jnp.add), jnp.ones(2))(jnp.ones(2)), [2, 2])
    grads = nnx.cached_partial(nnx.grad(lambda m, x: (m.w * x).sum()), m)(jnp.ones(2))
    np.testing.assert_array_equal(grads.w[...], [1, 1])


def test_objects_must_be_live():
    for mode in TREES:
        with pytest.raises(ValueError, match="graph_updates=True"):
            nnx.cached_partial(nnx.jit(add), Layer(), **mode)
    with nnx.set_graph_mode(False):
        nnx.compat.cached_partial(nnx.compat.jit(add), Layer())(1.0)


# ---------------------------------------------------------------- jit_partial
@pytest.mark.parametrize("mode", TREES)
def test_a_training_step_with_fixed_model_and_optimizer(mode):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    x, y = jnp.ones((4, 2)), jnp.ones((4, 3))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean(), graph=False, graph_updates=False)(model)
        optimizer.update(model, grads)
        return loss

    f = nnx.jit_partial(step, model, optimizer, **mode)
    losses = [float(f(x, y)) for _ in range(20)]
    assert losses[-1] < losses[0] and int(optimizer.step[...]) == 20 and float(jnp.abs(model.bias).sum()) > 0


@pytest.mark.parametrize("mode", TREES)
def test_only_values_travel(mode):
    m = Layer()
    w = m.w
    nnx.jit_partial(grow, m, **mode)(1.0)
    assert not hasattr(m, "more")
    f = nnx.jit_partial(add, m, **mode)
    m.w = nnx.Param(jnp.zeros(2))
    assert float(f(1.0)) == 4 and float(w[0]) == 2 and float(m.w[0]) == 0


def test_static_donated_and_keyword_arguments_count_the_fixed_ones():
    m = Layer()
    mode = TREES[1]
    f = nnx.jit_partial(lambda m, x, double: 2 * x if double else x, m, static_argnums=2, **mode)
    assert float(f(3.0, True)) == 6 and float(f(3.0, False)) == 3
    named = nnx.jit_partial(lambda m, x, double: 2 * x if double else x, m, static_argnames="double", **mode)
    assert float(named(x=3.0, double=True)) == 6
    old = m.w[...]
    assert float(nnx.jit_partial(add, m, donate_argnums=0, **mode)(1.0)) == 4 and old.is_deleted()


def test_stages_know_the_fixed_arguments():
    m = Layer()
    f = nnx.jit_partial(add, m, **TREES[1])
    assert f.eval_shape(1.0).shape == () and "add" in f.lower(1.0).as_text()
    assert f.trace(1.0).jaxpr is not None and "jit_partial" in repr(f)
    assert float(m.w[0]) == 1


def test_what_jit_partial_refuses():
    m = Layer()
    with pytest.raises(ValueError, match="graph_updates"):
        nnx.jit_partial(add, m)
    with pytest.raises(ValueError, match="non-partial arguments"):
        nnx.jit_partial(lambda m, n: 0, m, **TREES[0])(Layer())
    with pytest.raises(ValueError, match=r"Duplicate[\s\S]*jit_partial"):
        nnx.jit_partial(lambda m, n: 0, m, m, **TREES[1])
    with pytest.raises(ValueError, match=r"Duplicate[\s\S]*jit_partial"):
        nnx.jit_partial(lambda m: m.w, m, **TREES[1])()
    with pytest.raises(ValueError, match="StateSharding"):
        nnx.jit_partial(add, m, in_shardings=nnx.StateSharding({...: P()}), **TREES[1])
    assert bool(nnx.jit_partial(lambda m, n: m is n, m, m, **TREES[0])())
