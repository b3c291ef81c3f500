# SPDX-License-Identifier: Apache-2.0
"""Hijax Variables: boxes pass for their Variables, and what is written in them inside of JAX's own transforms stays."""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph import hijax
from batiste.graph.errors import ImmutableVariableError
from batiste.graph.jaxcompat import cur_qdd

MODES = [
    dict(graph=True, graph_updates=True),
    dict(graph=True, graph_updates=False),
    dict(graph=False, graph_updates=False),
]


class Doubling(nnx.Variable):
    """A kind with methods of its own."""

    def get_value(self, **kwargs):
        return super().get_value(**kwargs) * 2

    def plus(self, x):
        return self[...] + x

    def reset(self):
        self[...] = jnp.zeros_like(self.get_raw_value())


class Holder(nnx.Module):
    def __init__(self, v):
        self.v = v


def box(**metadata):
    return nnx.Param(jnp.arange(3.0), hijax=True, **metadata)


def increment(v):
    v[...] += 1


def change(change, v):
    """Changes more than values inside of jit; JAX 0.11.2 has no types for that: refused there, and done outside."""
    if cur_qdd:
        jax.jit(change)(v)
    else:
        with pytest.raises(ImmutableVariableError, match="while a transform runs"):
            jax.jit(change)(v)
        change(v)


# ---------------------------------------------------------------- a box passes for its Variable
def test_a_box_is_an_instance_of_its_kind_alone():
    v = box()
    assert isinstance(v, nnx.Param) and isinstance(v, nnx.Variable) and not isinstance(v, nnx.BatchStat)
    assert type(v) is hijax.HijaxVariable and v.type is nnx.Param and v.hijax and not v.ref
    assert not isinstance(jnp.ones(2), nnx.Param)


TEXTS = ["v + 2", "2 - v", "v @ v", "-v", "v < 2", "v ** 2", "jnp.sin(v)", "v.sum()", "v[1:]", "abs(v)", "v == v",
         "v.at[0].set(5)", "v.T", "v.astype(int)", "v.get_value(index=0)"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_inside_and_outside_of_jit_a_box_stands_for_its_value(text):
    expected = eval(text, {"v": nnx.Param(jnp.arange(3.0)), "jnp": jnp})
    np.testing.assert_array_equal(eval(text, {"v": box(), "jnp": jnp}), expected)
    traced = jax.jit(lambda v: jnp.asarray(eval(text, {"v": v, "jnp": jnp})))
    np.testing.assert_array_equal(traced(box()), expected)


def test_metadata_is_read_and_written_in_both_places():
    v = box(note="x")
    seen = []

    @jax.jit
    def f(v):
        seen.append((v.note, v.get_metadata("note"), v.type, isinstance(v, nnx.Param), isinstance(v, nnx.BatchStat)))

    def g(v):
        v.set_metadata(note="y")
        seen.append(v.note)

    f(v)
    change(g, v)
    assert seen == [("x", "x", nnx.Param, True, False), "y"] and v.note == "y"
    v.set_metadata("more", 1)
    v.del_metadata("note")
    assert v.get_metadata(exclude_required=True) == {"more": 1}
    with pytest.raises(AttributeError, match="set_metadata"):
        v.color = 1
    with pytest.raises(AttributeError):
        _ = v.nothing


def test_a_box_shows_its_variable():
    text = repr(Holder(box()))
    assert "Param" in text and "hijax=True" in text and "Hijax" not in text


def test_methods_of_its_own_kind_run_on_a_box():
    v = Doubling(jnp.ones(2), hijax=True)
    np.testing.assert_array_equal(v.plus(1.0), [3, 3])
    np.testing.assert_array_equal(jax.jit(lambda v: v.plus(1.0))(v), [3, 3])
    jax.jit(lambda v: v.reset())(v)
    np.testing.assert_array_equal(v[...], [0, 0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)), lambda v: v.copy()])
def test_copies_are_boxes_of_their_own(duplicate):
    v = box(note=1)
    new = duplicate(v)
    increment(new)
    assert type(new) is type(v) and new.note == 1 and float(v[0]) == 0 and float(new[0]) == 1


def test_a_description_without_arrays_can_be_boxed():
    v = nnx.Param(jax.ShapeDtypeStruct((2,), jnp.float32), hijax=True)
    assert v.get_value().shape == (2,) and v.hijax


# ---------------------------------------------------------------- JAX's own transforms
def test_writes_inside_plain_jit_arrive_also_of_another_structure():
    v = box()
    step = jax.jit(increment)
    for _ in range(3):
        step(v)
    np.testing.assert_array_equal(v[...], [3, 4, 5])
    change(lambda v: v.set_value({"a": v[...], "b": v[...] * 2}), v)
    step = jax.jit(lambda v: v.set_value({"a": v.get_value()["b"], "b": v.get_value()["a"] * 2}))
    step(v)
    np.testing.assert_array_equal(v.get_value()["b"], [6, 8, 10])


def test_a_box_inside_of_a_module_is_written_by_plain_jit():
    m = Holder(box())
    jax.jit(lambda m: increment(m.v))(m)
    assert float(m.v[0]) == 1


def in_jit(v):
    jax.jit(lambda: increment(v))()


def in_scan(v):
    jax.lax.scan(lambda c, x: (increment(v), (c, None))[1], 0, length=1)


def in_loop(v):
    jax.lax.fori_loop(0, 1, lambda i, c: (increment(v), c)[1], 0)


def in_cond(v):
    jax.lax.cond(True, lambda: increment(v), lambda: None)


def in_vmap(v):
    jax.vmap(lambda x: increment(v))(jnp.ones(2))


def in_grad(v):
    jax.grad(lambda x: (increment(v), x)[1])(1.0)


@pytest.mark.parametrize("run", [in_jit, in_scan, in_loop, in_cond, in_vmap, in_grad])
def test_a_box_that_a_function_closes_over_is_written(run):
    v = box()
    run(v)
    np.testing.assert_array_equal(v[...], [1, 2, 3])


def test_a_box_is_a_constant_for_derivatives_by_something_else():
    v = box()
    np.testing.assert_array_equal(jax.grad(lambda x: (v[...] * x).sum())(jnp.ones(3)), [0, 1, 2])
    grad = jax.grad(jax.jit(lambda x, v: (increment(v), (v[...] * x).sum())[1]))
    np.testing.assert_array_equal(grad(jnp.ones(3), v), [1, 2, 3])


def test_a_mutable_box_has_no_derivative_and_the_message_says_what_has():
    for f, x in ((lambda v: v[...].sum(), box()), (lambda x: nnx.Param(x, hijax=True)[...], 1.0)):
        with pytest.raises(NotImplementedError, match="mutable=False"):
            jax.grad(f)(x)
    v = box()
    with pytest.raises(NotImplementedError, match="writing of a hijax Variable"):
        jax.grad(lambda x: (v.set_value(x), x.sum())[1])(jnp.ones(3))
    remat = jax.checkpoint(lambda v: v[...].sum())
    if cur_qdd:
        with pytest.raises(NotImplementedError, match="close over"):
            remat(v)
    else:
        assert float(remat(v)) == 3


# ---------------------------------------------------------------- boxes that are values
def test_an_immutable_box_is_differentiated_as_a_value():
    v = nnx.with_vars(box(), mutable=False)
    assert not v.has_qdd
    for grad in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        found = grad(lambda v: (v[...] ** 2).sum())(v)
        assert isinstance(found, nnx.Param)
        np.testing.assert_array_equal(found[...], [0, 2, 4])
    made = jax.grad(lambda x: (nnx.with_vars(nnx.Param(x), hijax=True, mutable=False)[...] ** 2).sum())(jnp.ones(2))
    np.testing.assert_array_equal(made, [2, 2])
    twice = jax.grad(lambda v: (v[...] * v[...]).sum() + v[...].sum())(v)  # two cotangents are added up
    np.testing.assert_array_equal(twice[...], [1, 3, 5])


def test_an_immutable_box_goes_through_jit_and_loops_and_is_not_written():
    v = nnx.with_vars(box(), mutable=False)
    np.testing.assert_array_equal(jax.jit(lambda v: v.replace(v[...] + 1))(v)[...], [1, 2, 3])
    last, _ = jax.lax.scan(lambda v, x: (v.replace(v[...] * x), None), v, 2 * jnp.ones(3))
    np.testing.assert_array_equal(last[...], [0, 8, 16])
    with pytest.raises(ImmutableVariableError, match="mutable=True"):
        increment(v)


# ---------------------------------------------------------------- this library's functions and transforms
def test_split_keeps_the_box_merge_gives_it_back_and_clone_makes_another():
    m = Holder(box())
    graphdef, state = nnx.split(m)
    assert state["v"] is m.v and nnx.merge(graphdef, state).v is m.v
    other = nnx.clone(m)
    increment(other.v)
    assert float(m.v[0]) == 0 and nnx.graphdef(other) == graphdef
    rebuilt = nnx.merge(graphdef, {"v": jnp.ones(3)})
    assert rebuilt.v.hijax and type(rebuilt.v) is hijax.HijaxVariable
    nnx.update(m, nnx.state(rebuilt))
    np.testing.assert_array_equal(m.v[...], [1, 1, 1])
    np.testing.assert_array_equal(nnx.to_pure_dict(state)["v"], [1, 1, 1])


def test_a_box_takes_over_from_plain_variables_and_back():
    plain, v = nnx.Param(jnp.zeros(3), note=1), box()
    v.copy_from(plain)
    assert v.hijax and v.note == 1 and float(v.sum()) == 0
    increment(v)
    plain.copy_from(v)
    assert not plain.hijax and float(plain.sum()) == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_box_crosses_every_transform_as_itself(mode):
    def run(transform, *args):
        m = Holder(box())
        transform(m, *args)
        return float(m.v[0])

    step = nnx.jit(lambda m: increment(m.v), **mode)
    m = Holder(box())
    for _ in range(3):
        step(m)
    assert float(m.v[0]) == 3
    assert run(lambda m: nnx.cond(True, lambda m: increment(m.v), lambda m: None, m, **mode)) == 1
    assert run(lambda m: nnx.fori_loop(0, 3, lambda i, m: (increment(m.v), m)[1], m, **mode)) == 3
    assert run(lambda m: nnx.grad(lambda x, m: (increment(m.v), m.v[1] * x)[1], **mode)(1.0, m)) == 1
    every = nnx.vmap(lambda m, x: m.v[...] + x, in_axes=(None, 0), **mode)(Holder(box()), jnp.ones(2))
    np.testing.assert_array_equal(every, [[1, 2, 3], [1, 2, 3]])


@pytest.mark.parametrize("mode", MODES)
def test_a_box_made_inside_of_jit_comes_out_as_one(mode):
    m = nnx.jit(lambda x: Holder(nnx.Param(x, hijax=True, note=1)), **mode)(jnp.ones(2))
    assert type(m.v) is hijax.HijaxVariable and m.v.note == 1
    increment(m.v)
    np.testing.assert_array_equal(m.v[...], [2, 2])


def test_sharing_and_identity_are_those_of_plain_variables():
    v = box()
    m = Holder(v)
    m.again = v
    assert nnx.jit(lambda m: m.v is m.again)(m)
    assert nnx.jit(lambda v: v)(v) is v
    nnx.jit(lambda v, w: v.set_value(w[...] + 1))(v, v)
    assert float(v[0]) == 1
    with pytest.raises(ValueError, match="Duplicate Param"):
        nnx.jit(lambda v: v, graph_updates=False)(v)


def test_a_model_of_boxes_trains_with_plain_jit():
    with nnx.var_defaults(hijax=True):
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0], [2.0]])

    @jax.jit
    def step(model):
        graphdef, params = nnx.split(nnx.with_vars(model, hijax=False))
        loss, gradients = jax.value_and_grad(lambda p: ((nnx.merge(graphdef, p)(x) - y) ** 2).mean())(params)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients))
        return loss

    losses = [float(step(model)) for _ in range(50)]
    assert losses[-1] < 0.1 * losses[0] and model.kernel.hijax


def test_hijax_is_loaded_when_the_first_box_is_made():
    program = (
        "import sys\nfrom batiste import nnx\nv = nnx.Param(1.0)\nassert 'batiste.graph.hijax' not in sys.modules\n"
        "nnx.Param(1.0, hijax=True)\nassert 'batiste.graph.hijax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
