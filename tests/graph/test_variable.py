# SPDX-License-Identifier: Apache-2.0
"""Variables: reading, writing, metadata, and writes that would be lost."""

import copy
import gc
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import TraceContextError


def test_a_write_broadcasts_and_casts_into_what_is_there():
    v = nnx.Param(jnp.zeros((2, 3)))
    v[...] = jnp.arange(3)
    assert v.dtype == jnp.float32 and v.shape == (2, 3)
    v[0, 1] = 9
    np.testing.assert_array_equal(v[0], [0, 9, 2])
    v.set_value(jnp.ones(4))
    assert v.shape == (4,)
    with pytest.raises(ValueError):
        v[...] = jnp.ones(5)


def test_a_container_as_value_is_another_object_after_a_write():
    inside = {"a": 1}
    v = nnx.Variable(inside)
    v["a"] = 2
    assert v["a"] == 2 and inside == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "v + 2",
        "2 - v",
        "v @ v",
        "-v",
        "v < 2",
        "v ** 2",
        "jnp.sin(v)",
        "v.sum()",
        "v[1:]",
        "abs(v)",
        "v == v",
        "v / v",
        "1 / v",
    ],
)
def test_a_variable_stands_for_its_value(text):
    value = jnp.arange(1.0, 4.0)
    expected = eval(text, {"v": value, "jnp": jnp})
    np.testing.assert_array_equal(eval(text, {"v": nnx.Param(value), "jnp": jnp}), expected)


def test_in_place_operators_are_refused():
    v = nnx.Param(1)
    with pytest.raises(NotImplementedError, match="variable"):
        v += 1


def test_metadata_and_its_forms():
    v = nnx.Param(1, a=1)
    v.set_metadata("b", 2)
    v.set_metadata(c=3)
    assert (v.a, v.b, v.c) == (1, 2, 3) and v.get_metadata(exclude_required=True) == {"a": 1, "b": 2, "c": 3}
    v.set_metadata({"d": 4})
    assert v.get_metadata(exclude_required=True) == {"d": 4} and not v.has_metadata("a") and v.get_metadata("a", 0) == 0
    v.del_metadata("d")
    with pytest.raises(KeyError):
        v.get_metadata("d")
    with pytest.raises(AttributeError, match="set_metadata"):
        v.d = 4


def test_copies():
    v = nnx.Param(jnp.ones(2), a=1)
    for other in (v.copy(), v.replace(), copy.deepcopy(v), pickle.loads(pickle.dumps(v)), jax.tree.map(lambda x: x, v)):
        assert other is not v and type(other) is nnx.Param and other.a == 1
        np.testing.assert_array_equal(other, v)
    assert v.replace(3, b=2).b == 2
    with pytest.raises(ValueError, match="incompatible"):
        v.copy_from(nnx.BatchStat(1))


def test_a_subclass_may_translate_what_is_stored():
    class Scaled(nnx.Variable):
        def get_value(self, **kw):
            return super().get_value(**kw) * 2

        def set_value(self, value, **kw):
            super().set_value(value / 2, **kw)

    v = Scaled(jnp.ones(2))
    v[...] = jnp.full(2, 8.0)
    np.testing.assert_array_equal(v[...], [8, 8])
    np.testing.assert_array_equal(v.get_raw_value(), [4, 4])


def test_names_of_kinds():
    class Odd(nnx.Variable):
        pass

    assert nnx.variable_type_from_name("params") is nnx.Param
    assert nnx.variable_name_from_type(nnx.BatchStat) == "batch_stats"
    with pytest.raises(ValueError, match="not registered"):
        nnx.variable_name_from_type(Odd)
    assert nnx.variable_name_from_type(Odd, allow_register=True) == "Odd"
    with pytest.raises(ValueError, match="already mapped"):
        nnx.register_variable_name("params", Odd)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())])
def test_a_captured_variable_cannot_be_written(transform):
    class M(nnx.Module):
        def __init__(self):
            self.v = nnx.Param(jnp.ones(3))

    m = M()

    def write(x):
        m.v[...] = x
        return x

    with pytest.raises(TraceContextError, match="Cannot mutate Param"):
        transform(write)(jnp.ones(3))
    np.testing.assert_array_equal(m.v, jnp.ones(3))


class Counter(nnx.Module):
    def __init__(self):
        self.inner = nnx.Dict(count=nnx.Variable(jnp.zeros(())), weight=nnx.Param(jnp.ones(())))

    def __call__(self, x):
        self.inner.count[...] += 1
        return x * self.inner.weight


FOREIGN = {
    "jit": lambda f, m: jax.jit(f)(m, 1.0),
    "vmap": lambda f, m: jax.vmap(f, (None, 0))(m, jnp.ones(2)),
    "grad": lambda f, m: jax.grad(f)(m, 1.0),
    "eval_shape": lambda f, m: jax.eval_shape(f, m, 1.0),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_update_lost_in_a_foreign_transform_is_named(name):
    m = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        FOREIGN[name](lambda m, x: m(x), m)
        gc.collect()
    lost = [str(w.message) for w in seen if issubclass(w.category, nnx.LostUpdateWarning)]
    assert len(lost) == 1 and "inner/count" in lost[0] and "Fix" in lost[0]


@pytest.mark.parametrize("name", ["jit", "eval_shape"])
def test_an_update_that_is_returned_is_not_lost(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FOREIGN[name](lambda m, x: (m(x), m), Counter())
        FOREIGN[name](lambda m, x: (m(x), nnx.state(m)), Counter())
        FOREIGN[name](lambda m, x: m.inner.weight * x, Counter())
        gc.collect()


def test_what_comes_out_of_a_transform_inside_another_is_at_home_there():
    def summed(m, xs):
        _, steps = jax.lax.scan(lambda c, x: (c, jax.tree.map(lambda a: a + x, nnx.state(m))), 0.0, xs)
        nnx.cond(True, lambda t: nnx.update(t, jax.tree.map(lambda a: 2 * a, t)), lambda t: None, steps)
        return steps["inner"]["count"][...]

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(nnx.jit(summed)(Counter(), jnp.ones(3)), [2, 2, 2])
        gc.collect()
    assert not seen, [str(w.message) for w in seen]


def test_a_copy_made_inside_a_transform_may_be_written_and_dropped():
    m = Counter()

    @nnx.jit
    def f(m):
        scratch = jax.tree.map(lambda x: x, m)
        return scratch(1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(m)
        gc.collect()
    assert float(m.inner.count[...]) == 0
