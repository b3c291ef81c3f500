# SPDX-License-Identifier: Apache-2.0
"""vmap, pmap and the axes they speak of: what comes back, what is refused, and who is named."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import AliasError, ArgumentError, CapturedError, ShapeError

MODES = [
    dict(graph=True, graph_updates=True),
    dict(graph=True, graph_updates=False),
    dict(graph=False, graph_updates=False),
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])


class Pair(nnx.Module):
    def __init__(self, n=4):
        self.w = nnx.Param(jnp.arange(2.0 * n).reshape(n, 2))
        self.b = nnx.BatchStat(jnp.zeros(n))


class Holder(nnx.Module):
    def __init__(self):
        self.inner = nnx.List([Pair(), Pair()])
        self.count = nnx.Variable(jnp.array(0))


def add(m, x):
    m.b[...] = m.b + x
    return m.w.sum() + x


# ---------------------------------------------------------------- vmap
@every_mode
def test_vmap_agrees_with_a_loop(mode):
    m = Pair()
    out = nnx.vmap(add, **mode)(m, jnp.arange(4.0))
    np.testing.assert_array_equal(out, [m.w[i].sum() + i for i in range(4)])
    np.testing.assert_array_equal(m.b[...], jnp.arange(4.0))


@every_mode
def test_an_exception_leaves_the_objects_as_they_were(mode):
    m = Pair()

    def f(m):
        m.b[...] = m.b + 1
        m.new = 3
        raise RuntimeError("in the middle")

    before = m.b.get_value()
    with pytest.raises(RuntimeError, match="in the middle"):
        nnx.vmap(f, **mode)(m)
    assert m.b.get_value() is before and not hasattr(m, "new")


@every_mode
def test_who_is_named_when_a_broadcast_variable_differs_along_the_axis(mode):
    def f(h, x):
        h.count[...] = h.count + x

    with pytest.raises(ArgumentError, match="argument 0/'count': got axis spec None but output was batched on axis 0"):
        nnx.vmap(f, in_axes=(None, 0), **mode)(Holder(), jnp.arange(3))


@every_mode
def test_which_result_is_named_when_it_differs_along_the_axis(mode):
    with pytest.raises(ArgumentError, match="result/1/'late': got axis spec None"):
        nnx.vmap(lambda x: (1.0, {"late": x}), out_axes=None, **mode)(jnp.arange(3))


@every_mode
def test_who_is_named_when_sizes_differ(mode):
    sizes = r"size 4: axis 0 of argument 0/b, shape \(4,\)(.|\n)*size 3: axis 0 of argument 1"
    with pytest.raises(ShapeError, match=sizes):
        nnx.vmap(add, **mode)(Pair(), jnp.arange(3.0))


def test_both_places_and_axes_are_named_when_one_variable_gets_two():
    h = Holder()
    with pytest.raises(AliasError, match=r"0/inner/1/b: 0\n  1: None"):
        nnx.vmap(lambda h, b: b + 1, in_axes=(nnx.StateAxes({nnx.Variable: 0}), None))(h.inner and h, h.inner[1].b)


@every_mode
def test_objects_that_were_not_passed_cannot_be_returned(mode):
    m = Pair()
    with pytest.raises(CapturedError, match="out/b"):
        nnx.vmap(lambda x: m, **mode)(jnp.arange(2))


@every_mode
def test_one_module_without_variables_may_stand_at_two_places(mode):
    class Plain(nnx.Module):
        def __init__(self):
            self.power = 2

    m = Plain()
    out = nnx.vmap(lambda a, b, x: x**a.power + b.power, in_axes=(None, None, 0), **mode)(m, m, jnp.arange(3.0))
    np.testing.assert_array_equal(out, [2, 3, 6])


def test_structure_made_inside_comes_back_with_the_axes_of_its_filter():
    m = Pair()

    def f(m):
        m.inner = nnx.List([nnx.Param(m.w * 2), nnx.Cache(jnp.ones(()))])
        del m.b

    nnx.vmap(f, in_axes=(nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, ...: None}),))(m)
    assert m.inner[0].shape == (4, 2) and m.inner[1].shape == () and not hasattr(m, "b")


@every_mode
def test_values_that_are_trees_are_mapped_leaf_by_leaf(mode):
    v = nnx.Variable({"a": jnp.arange(3.0), "b": (jnp.zeros((3, 2)),)})

    def f(v):
        tree = v.get_value()
        v.set_value({"a": tree["a"] + 1, "b": tree["b"]})
        return tree["b"][0].shape

    assert nnx.vmap(f, out_axes=None, **mode)(v) == (2,)
    np.testing.assert_array_equal(v.get_value()["a"], [1, 2, 3])


@every_mode
def test_variables_that_hold_refs_are_written_in_place(mode):
    v = nnx.Param(jnp.arange(3.0), ref=True)

    def f(v, x):
        v[...] = v[...] + x

    nnx.vmap(f, **mode)(v, jnp.ones(3))
    np.testing.assert_array_equal(v[...], [1, 2, 3])


def test_a_list_of_axes_is_taken_as_a_tuple():
    np.testing.assert_array_equal(nnx.vmap(lambda x, y: x + y, in_axes=[0, None])(jnp.arange(3), 1), [1, 2, 3])


def test_keyword_arguments_without_a_place_are_mapped_over_their_first_axis():
    out = nnx.vmap(lambda x, *, y: x + y, in_axes=(None,))(1, y=jnp.arange(3))
    np.testing.assert_array_equal(out, [1, 2, 3])


def test_the_name_and_the_text_of_the_function_are_kept():
    @nnx.vmap(in_axes=0)
    def f(x):
        """Says what it does."""
        return x

    assert (f.__name__, f.__doc__) == ("f", "Says what it does.") and callable(f.__wrapped__)


def test_hooks_of_a_variable_hear_of_the_axis():
    heard = []

    class Named(nnx.Variable):
        def add_axis(self, index, name):
            heard.append(("add", index, name))

        def remove_axis(self, index, name):
            heard.append(("remove", index, name))

    v = Named(jnp.arange(6.0).reshape(3, 2))
    nnx.vmap(lambda v: Named(v * 2), out_axes=1, transform_metadata={nnx.PARTITION_NAME: "layer"})(v)
    assert heard == [("remove", 0, "layer"), ("add", 0, "layer"), ("add", 1, "layer")]


# ---------------------------------------------------------------- StateAxes and prefix
def test_state_axes_compare_by_what_they_say():
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    same = nnx.StateAxes([(nnx.Param, 0), (..., None)])
    assert axes == same and hash(axes) == hash(same)
    assert axes != nnx.StateAxes({nnx.Param: 1, ...: None})
    assert (list(axes.keys()), list(axes.values()), axes.axes) == ([nnx.Param, ...], [0, None], (0, None))
    assert axes.map_prefix(("w",), nnx.Param(1.0)) == 0


def test_a_leaf_that_no_filter_matches_is_named():
    with pytest.raises(ArgumentError, match=r"No filter matched leaf at count(.|\n)*`\.\.\.`"):
        nnx.vmap(lambda h: None, in_axes=(nnx.StateAxes({nnx.Param: 0, nnx.RngState: None}),), out_axes=None)(Holder())


def test_a_prefix_has_labels_in_the_place_of_leaves():
    h = Holder()
    axes = nnx.prefix(h, {nnx.Param: 0, ...: None})
    assert type(axes) is Holder and axes.inner[1].w == 0 and axes.inner[1].b is None and axes.count is None
    assert h.inner[1].w.shape == (4, 2)


def test_a_prefix_by_a_function_sees_paths():
    seen = []

    def choose(path, x):
        seen.append(path)
        return len(path)

    tree = {"m": Pair(), "x": [jnp.ones(2), 3], "none": None}
    axes = nnx.prefix(tree, choose)
    assert seen == [("m", "b"), ("m", "w"), ("x", 0), ("x", 1)]
    assert (axes["m"].w, axes["x"], axes["none"]) == (2, [2, 2], None)


def test_a_prefix_of_a_shared_module_is_shared():
    m = Pair()
    axes = nnx.prefix([m, m], {...: 0})
    assert axes[0] is axes[1]
    out = nnx.vmap(lambda ms: ms[0].w + ms[1].w, in_axes=(axes,), graph_updates=False)([m, m])
    np.testing.assert_array_equal(out, 2 * m.w[...])


def test_a_shared_variable_with_two_labels_is_refused():
    v = nnx.Param(jnp.arange(3.0))
    axes = nnx.prefix([v, v], {nnx.PathContains(0): 0, ...: None})
    assert axes == [0, None]
    with pytest.raises(AliasError, match="Inconsistent aliasing"):
        nnx.vmap(lambda pair: pair[0] + pair[1], in_axes=(axes,))([v, v])


def test_a_prefix_of_a_cycle_ends():
    class Ring(nnx.Module):
        def __init__(self):
            self.w, self.me = nnx.Param(jnp.arange(3.0)), self

    r = Ring()
    axes = nnx.prefix(r, {...: 0})
    assert axes.me is axes
    np.testing.assert_array_equal(nnx.vmap(lambda r: r.me.w * 2, in_axes=(axes,), graph_updates=False)(r), [0, 2, 4])


def test_one_label_may_stand_for_a_whole_part():
    h, axes = Holder(), nnx.prefix(Holder(), {...: None})
    axes.inner = nnx.data(0)
    out = nnx.vmap(lambda h: h.inner[0].w.sum() + h.count, in_axes=(axes,), graph=False, graph_updates=False)(h)
    assert out.shape == (4,)


# ---------------------------------------------------------------- pmap
@every_mode
def test_pmap_agrees_with_vmap(mode):
    a, b = Pair(), Pair()
    np.testing.assert_array_equal(nnx.pmap(add, **mode)(a, jnp.arange(4.0)), nnx.vmap(add, **mode)(b, jnp.arange(4.0)))
    np.testing.assert_array_equal(a.b[...], b.b[...])


def test_pmap_traces_once_per_structure():
    traces = []

    @nnx.pmap
    def f(m, x):
        traces.append(1)
        return add(m, x)

    m = Pair()
    for _ in range(2):  # JAX traces again when the values have moved to their devices
        f(m, jnp.ones(4))
    before = len(traces)
    f(m, jnp.ones(4))
    assert len(traces) == before
    np.testing.assert_array_equal(m.b[...], 3 * np.ones(4))
    m.flag = True
    f(m, jnp.ones(4))
    assert len(traces) == before + 1


def test_pmap_gives_away_what_it_was_told_to():
    m, x = Pair(), jax.device_put(jnp.arange(4.0))
    m.c = nnx.Cache(jnp.ones(4))

    def f(m, x):
        m.w[...] = m.w * x

    nnx.pmap(f, donate_argnums=0)(m, x)
    np.testing.assert_array_equal(m.w[...], np.arange(8.0).reshape(4, 2) * np.arange(4.0)[:, None])
    np.testing.assert_array_equal(m.c[...], np.ones(4))
    assert not x.is_deleted()


def test_pmap_of_groups_with_as_many_values_as_there_are_groups():
    v, scale = nnx.Param(jnp.arange(4.0)), nnx.Cache(jnp.ones(4))
    axes = nnx.StateAxes({nnx.BatchStat: None, ...: 0})
    out = nnx.pmap(lambda d: d["v"] + d["s"], in_axes=(axes,))({"v": v, "s": scale})
    np.testing.assert_array_equal(out, np.arange(4.0) + 1)


def test_what_was_mapped_is_freed():
    @nnx.pmap
    def f(m):
        return m.w * 2

    m = Pair()
    f(m)
    dead = weakref.ref(m)
    del m
    gc.collect()
    assert dead() is None
