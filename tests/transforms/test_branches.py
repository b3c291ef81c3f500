# SPDX-License-Identifier: Apache-2.0
"""cond and switch: all Variables come back, and the branches have to agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import BranchError, CapturedError, TraceContextError

MODES = [
    dict(graph=True, graph_updates=True),
    dict(graph=True, graph_updates=False),
    dict(graph=False, graph_updates=False),
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])


class Pair(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.arange(6.0).reshape(3, 2))
        self.b = nnx.BatchStat(jnp.zeros(3))


class Holder(nnx.Module):
    def __init__(self):
        self.inner = nnx.List([Pair(), Pair()])


def count(h):
    h.inner[1].b[...] = h.inner[1].b + 1


def rest(h):
    pass


@every_mode
@pytest.mark.parametrize("taken", [True, False])
def test_the_branch_that_is_taken_writes(mode, taken):
    h = Holder()
    nnx.cond(jnp.array(taken), count, rest, h, **mode)
    np.testing.assert_array_equal(h.inner[1].b[...], np.full(3, float(taken)))


@every_mode
def test_the_predicate_may_be_a_variable(mode):
    h, index = Holder(), nnx.Variable(jnp.array(1))
    nnx.switch(index, [rest, count], h, **mode)
    nnx.cond(nnx.Variable(jnp.array(True)), count, rest, h, **mode)
    np.testing.assert_array_equal(h.inner[1].b[...], np.full(3, 2.0))


@every_mode
def test_the_predicate_may_read_what_is_passed(mode):
    h = Holder()

    @nnx.jit(**mode)
    def f(h):
        nnx.cond(h.inner[0].b.sum() == 0, count, rest, h, **mode)

    f(h)
    np.testing.assert_array_equal(h.inner[1].b[...], np.ones(3))


@every_mode
def test_an_exception_leaves_the_objects_as_they_were(mode):
    def f(h):
        count(h)
        raise RuntimeError("in the middle")

    h = Holder()
    with pytest.raises(RuntimeError, match="in the middle"):
        nnx.cond(True, count, f, h, **mode)
    np.testing.assert_array_equal(h.inner[1].b[...], np.zeros(3))


@every_mode
def test_a_variable_that_is_not_passed_cannot_be_written(mode):
    v = nnx.Variable(jnp.array(0))
    with pytest.raises(TraceContextError):
        nnx.cond(True, lambda: v.set_value(v + 1), lambda: None, **mode)


@every_mode
def test_a_module_that_is_not_passed_cannot_be_returned(mode):
    m = Pair()
    with pytest.raises(CapturedError, match="out/b"):
        nnx.cond(True, lambda: m, lambda: m, **mode)


def test_new_objects_come_back_and_may_share():
    h = Holder()

    def make(value):
        def f(h):
            h.extra = nnx.Dict(a=nnx.Param(jnp.full(2, value)), w=h.inner[0].w)
            return h.extra

        return f

    out = nnx.cond(False, make(1.0), make(2.0), h)
    assert out is h.extra and h.extra.w is h.inner[0].w
    np.testing.assert_array_equal(h.extra.a[...], [2, 2])


def test_structure_may_change_in_all_branches_alike():
    h = Holder()
    nnx.switch(1, [lambda h: h.inner.pop(), lambda h: h.inner.pop()], h)
    assert len(h.inner) == 1


def test_the_attribute_that_one_branch_sets_is_named():
    def set_new(h):
        h.inner[1].new = nnx.Param(jnp.ones(2))

    with pytest.raises(BranchError, match=r"true_fun and false_fun: the arguments/0/inner/0: 'b' is gone"):
        nnx.cond(True, set_new, lambda h: delattr(h.inner[0], "b"), Holder())
    with pytest.raises(BranchError, match="one of them adds, removes or replaces attributes"):
        nnx.cond(True, set_new, rest, Holder())


def test_the_setting_that_differs_is_named():
    def setter(value):
        return lambda h: setattr(h.inner[0], "rate", value)

    text = r"branch 0 and branch 2: the arguments/0/inner/0: the setting 'rate' was 1 and became 3"
    with pytest.raises(BranchError, match=text):
        nnx.switch(0, [setter(1), setter(1), setter(3)], Holder())


@every_mode
def test_the_results_that_differ_are_named(mode):
    with pytest.raises(BranchError, match=r"the results: PyTreeDef\(.*\) became PyTreeDef\(\*\)"):
        nnx.cond(True, lambda x: (x, x), lambda x: x, 1.0, **mode)
    with pytest.raises(BranchError, match=r"at result/b: got float32\[3\] and float32\[\]"):
        nnx.cond(True, lambda x: {"a": x, "b": jnp.ones(3)}, lambda x: {"a": x, "b": x}, jnp.float32(1), **mode)


@every_mode
def test_the_variable_whose_type_differs_is_named(mode):
    def f(h):
        h.inner[1].b.set_value(jnp.zeros(3, jnp.int32))

    with pytest.raises(BranchError, match=r"argument 0/inner/1/b: got int32\[3\] and float32\[3\]"):
        nnx.cond(True, f, rest, Holder(), **mode)


@every_mode
def test_weakly_typed_results_are_promoted(mode):
    assert nnx.cond(True, lambda x: 1.0, lambda x: x, jnp.float32(2), **mode).dtype == jnp.float32


@every_mode
def test_values_that_are_trees_and_refs(mode):
    tree, ref = nnx.Variable({"a": jnp.zeros(2)}), nnx.Variable(jnp.zeros(2), ref=True)

    def f(tree, ref):
        tree.set_value({"a": tree.get_value()["a"] + 1})
        ref[...] = ref[...] + 2

    nnx.cond(True, f, lambda tree, ref: None, tree, ref, **mode)
    np.testing.assert_array_equal(tree.get_value()["a"], [1, 1])
    np.testing.assert_array_equal(ref[...], [2, 2])


@every_mode
def test_without_compilation(mode):
    h = Holder()
    with jax.disable_jit():
        nnx.cond(True, count, rest, h, **mode)
        nnx.switch(0, [rest, count], h, **mode)
    np.testing.assert_array_equal(h.inner[1].b[...], np.ones(3))


def test_derivatives_go_through():
    m = Pair()

    def loss(m, p):
        return nnx.cond(p, lambda m: (m.w**2).sum(), lambda m: m.w.sum(), m)

    np.testing.assert_array_equal(nnx.grad(loss)(m, True)["w"][...], 2 * m.w[...])
    np.testing.assert_array_equal(nnx.grad(loss)(m, False)["w"][...], np.ones((3, 2)))
