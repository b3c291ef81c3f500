# SPDX-License-Identifier: Apache-2.0
"""Variables backed by `jax.Ref`, bare Refs, the defaults of new Variables, and another backing for old ones."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.backing import VarDefaults
from batiste.graph.config import config

MODES = [
    dict(graph=True, graph_updates=True),
    dict(graph=True, graph_updates=False),
    dict(graph=False, graph_updates=False),
]


class Holder(nnx.Module):
    def __init__(self, v):
        self.v = v


def variable(**metadata):
    return nnx.Param(jnp.arange(3.0), ref=True, **metadata)


def increment(x):
    x[...] += 1


# ---------------------------------------------------------------- one Variable
def test_the_value_is_in_a_ref_and_reads_and_writes_go_through_it():
    v = variable()
    assert isinstance(v.get_raw_value(), jax.Ref) and v.ref and not v.hijax
    v[0] = 5
    v[1:] = v[1:] * 2
    np.testing.assert_array_equal(v.get_value(), [5, 2, 4])
    with pytest.raises(ValueError, match="Ref"):
        nnx.Param(v.get_raw_value())


def test_copies_have_a_ref_of_their_own_unless_asked():
    v = variable()
    other, same = v.copy(), v.replace(_copy_ref=False)
    increment(v)
    assert float(other[0]) == 0 and float(same[0]) == 1
    assert isinstance(v.replace(2.0).get_raw_value(), jax.Ref)
    plain = v.replace(ref=False)
    assert isinstance(plain.get_raw_value(), jax.Array) and not plain.ref


def test_writes_inside_plain_jit_arrive():
    m = Holder(variable())
    for target, pick in ((m, lambda m: m.v), (m.v, lambda v: v), (m.v.get_raw_value(), lambda r: r)):
        jax.jit(lambda x, pick=pick: increment(pick(x)))(target)
    np.testing.assert_array_equal(m.v[...], [3, 4, 5])


def test_update_writes_into_the_ref_that_is_there():
    m = Holder(variable())
    ref = m.v.get_raw_value()
    nnx.update(m, {"v": jnp.ones(3)})
    nnx.update(m, nnx.State({"v": nnx.Param(2 * jnp.ones(3))}))
    assert m.v.get_raw_value() is ref
    np.testing.assert_array_equal(ref[...], [2, 2, 2])


# ---------------------------------------------------------------- transforms
@pytest.mark.parametrize("mode", MODES)
def test_a_ref_crosses_every_transform_without_writing_back(mode):
    def run(transform):
        m = Holder(variable())
        ref = m.v.get_raw_value()
        transform(m)
        assert m.v.get_raw_value() is ref
        return float(m.v[0])

    step = nnx.jit(lambda m: increment(m.v), **mode)
    assert run(lambda m: [step(m) for _ in range(3)]) == 3
    assert run(lambda m: nnx.cond(True, lambda m: increment(m.v), lambda m: None, m, **mode)) == 1
    assert run(lambda m: nnx.vmap(lambda m: increment(m.v), **mode)(m)) == 1
    assert run(lambda m: nnx.remat(lambda m: increment(m.v), **mode)(m)) == 1
    assert run(lambda m: nnx.fori_loop(0, 3, lambda i, m: (increment(m.v), m)[1], m, **mode)) == 3
    assert run(lambda m: nnx.grad(lambda x, m: (increment(m.v), m.v[1] * x)[1], **mode)(1.0, m)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_new_variable_with_a_ref_comes_out_of_jit_and_vmap(mode):
    m = nnx.jit(lambda x: Holder(nnx.Param(x, ref=True)), **mode)(jnp.ones(2))
    many = nnx.vmap(lambda x: Holder(nnx.Param(x, ref=True)), **mode)(jnp.ones((4, 2)))
    assert m.v.ref and isinstance(m.v.get_raw_value(), jax.Ref) and many.v.get_raw_value().shape == (4, 2)
    increment(many.v)
    np.testing.assert_array_equal(many.v[0], [2, 2])


def test_two_variables_around_one_ref_share_it_everywhere():
    v = variable()
    m = Holder(v)
    m.w = v.replace(_copy_ref=False)
    graphdef, state = nnx.split(m)
    assert list(state) == ["v"]  # the value travels once
    again = nnx.merge(graphdef, state)
    assert again.v.get_raw_value() is again.w.get_raw_value()
    nnx.jit(lambda m: increment(m.w))(m)
    nnx.jit(lambda m, r: increment(r))(m, v.get_raw_value())
    np.testing.assert_array_equal(m.v[...], [2, 3, 4])


def test_bare_refs_are_shared_and_handed_out_again():
    ref = jax.new_ref(jnp.zeros(2))
    assert nnx.jit(lambda r: r)(ref) is ref
    nnx.jit(lambda r, s: increment(r) if r is s else None)(ref, ref)
    m = nnx.Dict(a=ref, b=ref)
    nnx.jit(lambda m: increment(m.a))(m)
    np.testing.assert_array_equal(ref[...], [2, 2])
    assert m.a is m.b is ref
    with pytest.raises(ValueError, match="Duplicate Ref"):
        nnx.split(m, graph=False)


# ---------------------------------------------------------------- defaults
def test_defaults_are_set_at_once_for_a_block_and_for_a_function():
    assert nnx.var_defaults() == {"hijax": False, "ref": False}
    with nnx.var_defaults(ref=True), nnx.var_defaults(hijax=True):
        assert nnx.var_defaults() == {"hijax": True, "ref": True}
        with nnx.var_defaults(hijax=False):
            v = nnx.Param(1.0)
    assert v.ref and not v.hijax and not nnx.Param(1.0).ref

    @nnx.var_defaults(ref=True)
    def make():
        return nnx.Param(1.0)

    assert make().ref and not nnx.Param(1.0).ref and not nnx.Param(1.0, ref=False).ref
    setting = nnx.var_defaults(ref=True)
    try:
        assert nnx.Param(1.0).ref and not nnx.Param(1.0, ref=False).ref
    finally:
        setting.__exit__(None, None, None)
    assert not nnx.Param(1.0).ref


def test_defaults_are_a_mapping_of_this_thread_and_begin_with_the_flag():
    defaults = nnx.var_defaults()
    assert (
        dict(**defaults) == {"hijax": False, "ref": False} and list(defaults) == ["hijax", "ref"] and len(defaults) == 2
    )
    assert defaults.ref is defaults["ref"] and repr(defaults) == "VarDefaults(hijax=False, ref=False)"
    with pytest.raises(KeyError):
        defaults["color"]
    found = []
    with nnx.var_defaults(ref=True):
        thread = threading.Thread(target=lambda: found.append(nnx.var_defaults()))
        thread.start()
        thread.join()
    assert found == [VarDefaults(hijax=False, ref=False)]
    with config.temp_flip_flag("hijax_variable", True):
        assert nnx.var_defaults().hijax and nnx.Param(1.0).hijax


# ---------------------------------------------------------------- another backing
KINDS = [dict(hijax=False, ref=False), dict(hijax=True, ref=False), dict(hijax=False, ref=True)]


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_with_vars_turns_every_backing_into_every_other(old, new):
    m = Holder(nnx.Param(jnp.arange(3.0), note=1, **old))
    other = nnx.with_vars(m, **new)
    assert (other.v.hijax, other.v.ref, other.v.note) == (new["hijax"], new["ref"], 1)
    assert (other.v is m.v) == (old == new)
    np.testing.assert_array_equal(other.v[...], m.v[...])
    if old != new:
        increment(other.v)
        assert float(m.v[0]) == 0


def test_with_vars_changes_what_only_selects_and_refuses_sharing_there():
    m = nnx.Dict(p=nnx.Param(jnp.ones(1)), s=nnx.BatchStat(jnp.ones(1)))
    new = nnx.with_vars(m, ref=True, only=nnx.BatchStat)
    assert new.s.ref and new.p is m.p
    m.q = m.p
    with pytest.raises(ValueError, match="duplicate at paths:\n  ---\n  p\n  q"):
        nnx.with_vars(m, ref=True)
    shared = nnx.with_vars(m, ref=True, allow_duplicates=True)
    assert shared.p is shared.q and shared.p.ref
    with pytest.warns(DeprecationWarning, match="with_vars"):
        nnx.vars_as(m.s, ref=True)
