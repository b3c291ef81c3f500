# SPDX-License-Identifier: Apache-2.0
"""scan, while_loop and fori_loop: what goes round, what comes back, what is refused, and who is named."""

import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError, CallError, CarryError, StructureError, TraceContextError

MODES = [
    dict(graph=True, graph_updates=True),
    dict(graph=True, graph_updates=False),
    dict(graph=False, graph_updates=False),
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])
without_updates = pytest.mark.parametrize("mode", MODES[1:], ids=["graph", "tree"])


class Pair(nnx.Module):
    def __init__(self, n=3):
        self.w = nnx.Param(jnp.arange(2.0 * n).reshape(n, 2))
        self.b = nnx.BatchStat(jnp.zeros(n))


class Holder(nnx.Module):
    def __init__(self):
        self.inner = nnx.List([Pair(), Pair()])
        self.total = jnp.float32(0)


def add(m, x):
    m.b[...] = m.b + x
    return m, m.b.sum()


def add_deep(h, x):
    add(h.inner[1], x)
    return h, x


# ---------------------------------------------------------------- scan
@every_mode
def test_scan_agrees_with_a_loop(mode):
    m, by_hand = Pair(), Pair()
    _, sums = nnx.scan(add, **mode)(m, jnp.arange(4.0))
    expected = [add(by_hand, x)[1] for x in jnp.arange(4.0)]
    np.testing.assert_array_equal(sums, expected)
    np.testing.assert_array_equal(m.b[...], by_hand.b[...])


@every_mode
def test_scan_is_traced_once_per_structure(mode):
    traces = []

    @nnx.scan(**mode)
    def f(h, x):
        traces.append(1)
        return add_deep(h, x)

    h = Holder()
    for _ in range(3):
        f(h, jnp.ones(2))
    assert len(traces) == 1
    np.testing.assert_array_equal(h.inner[1].b[...], np.full(3, 6.0))
    f(Holder(), jnp.ones(2))
    assert len(traces) == 1
    h.flag = True
    f(h, jnp.ones(2))
    assert len(traces) == 2


def test_a_scanned_function_keeps_no_object_alive():
    f = nnx.scan(add_deep)
    h = Holder()
    f(h, jnp.ones(2))
    dead = weakref.ref(h)
    del h
    gc.collect()
    assert dead() is None


@every_mode
def test_an_exception_leaves_the_objects_as_they_were(mode):
    def f(h, x):
        add_deep(h, x)
        h.flag = True
        raise RuntimeError("in the middle")

    h = Holder()
    for run in (nnx.scan(f, **mode), lambda h, _: nnx.fori_loop(0, 3, lambda i, h: f(h, i), h, **mode)):
        with pytest.raises(RuntimeError, match="in the middle"):
            run(h, jnp.ones(2))
    np.testing.assert_array_equal(h.inner[1].b[...], np.zeros(3))
    assert not hasattr(h, "flag")


def test_what_is_written_to_broadcast_variables_is_dropped_and_said(caplog):
    h, rngs = Holder(), nnx.Rngs(0)

    def f(c, h, rngs):
        rngs()
        return c + add(h.inner[1], 1.0)[1], c

    with caplog.at_level(logging.WARNING):
        total, _ = nnx.scan(f, in_axes=(nnx.Carry, None, None), length=4)(0.0, h, rngs)
    assert total == 4 * 3
    np.testing.assert_array_equal(h.inner[1].b[...], np.zeros(3))
    assert rngs.default.count[...] == 0
    (record,) = caplog.records
    assert "BatchStat at argument 1/inner/1/b" in record.getMessage() and "Rng" not in record.getMessage()


@without_updates
def test_what_is_written_to_broadcast_variables_goes_round_without_updates(mode, caplog):
    h = Holder()
    f = lambda c, h: (c + add(h.inner[1], 1.0)[1], c)
    total, _ = nnx.scan(f, in_axes=(nnx.Carry, None), length=4, **mode)(0.0, h)
    assert total == 3 * (1 + 2 + 3 + 4) and not caplog.records
    np.testing.assert_array_equal(h.inner[1].b[...], np.full(3, 4.0))


def test_a_new_variable_on_a_broadcast_module_is_refused():
    def f(c, m):
        m.new = nnx.Param(c)
        return c, c

    with pytest.raises(CarryError, match="a new Variable or array belongs to what is carried or broadcast"):
        nnx.scan(f, in_axes=(nnx.Carry, None), length=2)(0.0, Pair())


@every_mode
def test_what_changed_in_the_carry_is_named(mode):
    def f(h, x):
        h.inner[1].new = nnx.Param(x)
        return h, x

    with pytest.raises(CarryError, match="the carry/inner/1: 'new' is new"):
        nnx.scan(f, **mode)(Holder(), jnp.ones(2))


@every_mode
def test_the_carried_variable_whose_type_changed_is_named(mode):
    def f(h, x):
        h.inner[1].b.set_value(jnp.zeros(4))
        return h, x

    with pytest.raises(CarryError, match=r"equal types, but they differ at argument 0/inner/1/b: got float32\[4\]"):
        nnx.scan(f, **mode)(Holder(), jnp.ones(2))


@every_mode
def test_another_object_in_the_carry_is_refused_with_the_way_out(mode):
    with pytest.raises(CarryError, match=r"got another Param, expected the Param that came in\.\n  Fix: write into"):
        nnx.scan(lambda v, x: (nnx.Param(v + x), x), **mode)(nnx.Param(jnp.float32(0)), jnp.ones(2))


@every_mode
def test_results_that_do_not_fit_out_axes(mode):
    with pytest.raises(StructureError, match="got a tuple of 3, expected a tuple of 2"):
        nnx.scan(lambda c, x: (c, x, x), **mode)(0.0, jnp.ones(2))
    with pytest.raises(StructureError, match="expected a tuple of 2"):
        nnx.scan(lambda c, x: c, **mode)(0.0, jnp.ones(2))


@every_mode
def test_arguments_that_do_not_fit_in_axes(mode):
    with pytest.raises(ArgumentError, match="in_axes does not fit"):
        nnx.scan(lambda c, x, y: (c, x), **mode)(0.0, jnp.ones(2), jnp.ones(2))
    with pytest.raises(CallError, match="could not be resolved to positions"):
        nnx.scan(lambda c, *, x: (c, x), **mode)(0.0, x=jnp.ones(2))


@every_mode
def test_keyword_arguments_take_their_places(mode):
    carry, ys = nnx.scan(lambda c, x: (c + x, c), **mode)(0.0, x=jnp.ones(3))
    assert carry == 3 and ys.tolist() == [0, 1, 2]


@without_updates
def test_a_carry_may_be_rebuilt_around_the_same_variables(mode):
    class Box(nnx.Pytree):
        def __init__(self, v, step):
            self.v, self.step = v, nnx.data(step)

    v = nnx.Param(jnp.float32(1))

    def f(box, x):
        box.v[...] = box.v + x
        return Box(box.v, box.step + 1), x

    out, _ = nnx.scan(f, **mode)(Box(v, jnp.int32(0)), jnp.arange(3.0))
    assert isinstance(out, Box) and out.v is v and v[...] == 4 and out.step == 3


@every_mode
def test_values_that_are_trees_go_round_and_are_cut(mode):
    v = nnx.Variable({"a": jnp.float32(0)})
    cut = nnx.Variable((jnp.arange(6.0).reshape(2, 3), jnp.zeros((2, 3))))

    def f(v, cut):
        first, second = cut.get_value()
        v.set_value({"a": v.get_value()["a"] + first.sum()})
        cut.set_value((first, second + 1))
        return v, first

    _, firsts = nnx.scan(f, in_axes=(nnx.Carry, 1), out_axes=(nnx.Carry, 1), **mode)(v, cut)
    assert v.get_value()["a"] == 15 and firsts.shape == (2, 3)
    np.testing.assert_array_equal(cut.get_value()[1], np.ones((2, 3)))


@every_mode
def test_variables_that_hold_refs_are_written_in_place(mode):
    carried, fixed = nnx.Param(jnp.float32(0), ref=True), nnx.Param(jnp.float32(0), ref=True)

    def f(v, fixed, x):
        v[...] = v[...] + x
        fixed[...] = fixed[...] + 1
        return v, v[...] * 1

    out, ys = nnx.scan(f, in_axes=(nnx.Carry, None, 0), **mode)(carried, fixed, jnp.arange(3.0))
    assert out is carried and carried[...] == 3 and fixed[...] == 3 and ys.tolist() == [0, 1, 3]


@every_mode
def test_a_variable_that_is_not_passed_cannot_be_written(mode):
    v = nnx.Variable(jnp.float32(0))

    def f(c, x):
        v[...] = v + x
        return c, x

    with pytest.raises(TraceContextError):
        nnx.scan(f, **mode)(0.0, jnp.ones(2))


@every_mode
def test_scan_of_no_iterations(mode):
    m = Pair()
    _, ys = nnx.scan(add, **mode)(m, jnp.zeros(0))
    assert ys.shape == (0,)
    np.testing.assert_array_equal(m.b[...], np.zeros(3))


@every_mode
def test_without_compilation(mode):
    m, v = Pair(), nnx.Variable(jnp.int32(0))

    def step(v):
        v[...] = v + 1
        return v

    with jax.disable_jit():
        _, sums = nnx.scan(add, **mode)(m, jnp.arange(3.0))
        nnx.while_loop(lambda v: v < 3, step, v, **mode)
        nnx.while_loop(lambda v: v < 0, step, v, **mode)
        nnx.fori_loop(0, 2, lambda i, v: step(v), v, **mode)
    assert sums.tolist() == [0, 3, 9] and v[...] == 5


def test_derivatives_go_through_layers_that_are_scanned():
    layers = nnx.vmap(lambda key: nnx.Param(jax.random.normal(key, (2, 2))))(jax.random.split(jax.random.key(0), 3))

    def loss(layers, x):
        return nnx.scan(lambda x, w: jnp.tanh(x @ w), out_axes=nnx.Carry)(x, layers).sum()

    def by_hand(w, x):
        for part in w:
            x = jnp.tanh(x @ part)
        return x.sum()

    grads = nnx.grad(loss)(layers, jnp.ones(2))[...]
    np.testing.assert_allclose(grads, jax.grad(by_hand)(layers[...], jnp.ones(2)), rtol=1e-5)


# ---------------------------------------------------------------- while_loop, fori_loop
@every_mode
def test_loops_write_deep_into_objects(mode):
    h = Holder()
    nnx.fori_loop(0, 3, lambda i, h: add_deep(h, i)[0], h, **mode)
    nnx.while_loop(lambda h: h.inner[1].b[0] < 9, lambda h: add_deep(h, 3)[0], h, **mode)
    np.testing.assert_array_equal(h.inner[1].b[...], np.full(3, 9.0))
    np.testing.assert_array_equal(h.inner[0].b[...], np.zeros(3))


def test_live_loops_write_arrays_that_stand_in_attributes():
    h = Holder()

    def body(i, value):
        h, x = value
        h.total = h.total + i
        return h, x * 2

    out, x = nnx.fori_loop(0, 4, body, (h, jnp.float32(1)))
    assert out is h and h.total == 6 and x == 16


@every_mode
def test_what_the_condition_writes_is_dropped_with_a_warning(mode):
    m = Pair()

    def goes_on(m):
        return add(m, 1.0)[1] < 9

    with pytest.warns(nnx.LostUpdateWarning, match="BatchStat at argument 0/b"):
        nnx.while_loop(goes_on, lambda m: add(m, 1.0)[0], m, **mode)
    np.testing.assert_array_equal(m.b[...], np.full(3, 2.0))


@every_mode
def test_the_condition_may_answer_with_a_variable(mode):
    v = nnx.Variable(jnp.array(True))

    def body(value):
        v, n = value
        v[...] = n < 2
        return v, n + 1

    _, n = nnx.while_loop(lambda value: value[0], body, (v, jnp.int32(0)), **mode)
    assert n == 3 and not v[...]


@every_mode
def test_the_setting_that_a_loop_changes_is_named(mode):
    def body(h):
        h.inner[0].rate = 2
        return h

    h = Holder()
    h.inner[0].rate = 1
    with pytest.raises(CarryError, match="the carry/inner/0: the setting 'rate' was 1 and became 2"):
        nnx.while_loop(lambda h: True, body, h, **mode)


@every_mode
def test_a_loop_that_returns_nothing_is_refused(mode):
    with pytest.raises(CarryError, match=r"the carry: PyTreeDef\(\*\) became PyTreeDef\(None\)"):
        nnx.fori_loop(0, 3, lambda i, m: None, Pair(), **mode)


def test_a_loop_hands_on_what_shares_a_variable():
    a, b = Pair(), Pair()
    b.w = a.w

    def body(i, pair):
        pair[1].w[...] = pair[0].w + 1
        return pair

    nnx.fori_loop(0, 3, body, (a, b))
    assert a.w is b.w and a.w[0, 0] == 3
