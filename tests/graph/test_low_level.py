# SPDX-License-Identifier: Apache-2.0
"""Passing objects by hand: numberings, contexts, trees of objects, and methods of objects that are cut."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.passing import IndexMap, RefMap


class Layer(nnx.Module):
    def __init__(self):
        self.w, self.b, self.n = nnx.Param(jnp.ones(2)), nnx.BatchStat(jnp.zeros(2)), 3

    def step(self):
        self.b[...] += 1
        return self.n

    def __call__(self, x):
        self.step()
        return x * self.w


# ---------------------------------------------------------------- flatten and unflatten
def test_one_numbering_over_several_objects():
    m = Layer()
    numbers = RefMap()
    first, leaves = nnx.flatten(m, ref_index=numbers)
    assert [path for path, _ in leaves] == [("b",), ("w",)] and leaves[0][1] is m.b
    assert len(numbers) == 3 and numbers[m] == 0 and m.w in numbers and Layer() not in numbers
    second, rest = nnx.flatten({"again": m, "new": nnx.Param(1.0)}, ref_index=numbers)
    assert [path for path, _ in rest] == [("new",)] and len(numbers) == 4
    objects = IndexMap()
    copy = nnx.unflatten(first, leaves, index_ref=objects)
    both = nnx.unflatten(second, rest, index_ref=objects)
    assert both["again"] is copy and copy is not m and copy.w is m.w and len(objects) == 4
    with pytest.raises(KeyError):
        nnx.unflatten(second, rest)


def test_the_two_maps_are_inverse():
    m, v = Layer(), nnx.Param(1.0)
    there = RefMap([(m, 0), (v, 1)])
    back = IndexMap.from_refmap(there)
    assert back == {0: m, 1: v} and list(RefMap.from_indexmap(back).items()) == list(there.items())
    del there[v]
    assert list(there) == [m]


def test_without_paths_leaves_are_plain_values():
    m = Layer()
    graphdef, leaves = nnx.flatten(m, with_paths=False)
    assert [type(x) for x in leaves] == [type(m.w[...])] * 2
    new = nnx.unflatten(graphdef, [x + 1 for x in leaves])
    assert isinstance(new.b, nnx.BatchStat) and float(new.b[0]) == 1 and float(m.b[0]) == 0


@pytest.mark.parametrize("copy", [True, False])
def test_variables_of_a_state_are_taken_or_copied(copy):
    m = Layer()
    graphdef, leaves = nnx.flatten(m)
    assert (nnx.unflatten(graphdef, leaves, copy_variables=copy).w is m.w) != copy


def test_plain_values_may_stay_plain():
    graphdef, state = nnx.split(Layer())
    for new in (
        nnx.merge(graphdef, nnx.as_pure(state), recreate_variables=False),
        nnx.map(lambda path, x: x[...], Layer(), recreate_variables=False),
    ):
        assert isinstance(new.w, jax.Array)
    assert isinstance(nnx.merge(graphdef, nnx.as_pure(state)).w, nnx.Param)


def test_objects_known_outside_are_rebuilt_in_place():
    m = Layer()
    outside = RefMap()
    graphdef, leaves = nnx.flatten(m, ref_index=outside)
    inside = IndexMap()
    copy = nnx.unflatten(graphdef, [x[...] for _, x in leaves], index_ref=inside)
    copy.w[...] = 5
    copy.new, copy.n = nnx.Param(1.0), 4
    del copy.b
    graphdef, leaves = nnx.flatten(copy, ref_outer_index=RefMap.from_indexmap(inside))
    w = m.w
    assert nnx.unflatten(graphdef, leaves, outer_index_outer_ref=IndexMap.from_refmap(outside)) is m
    assert m.w is w and float(w[0]) == 5 and m.n == 4 and m.new.get_value() == 1 and not hasattr(m, "b")


# ---------------------------------------------------------------- contexts
def test_split_and_merge_contexts_keep_sharing_between_objects():
    m = Layer()
    with nnx.split_context() as cut:
        one = cut.split(m, nnx.Param, ...)
        two = cut.split({"m": m, "v": nnx.Param(1.0)})
        three = cut.flatten(nnx.Dict(m=m, x=nnx.Param(2.0)), nnx.Param, ...)
        four = cut.flatten(nnx.Param(3.0), with_paths=False)
        with pytest.raises(ValueError, match="with_paths"):
            cut.flatten(m, nnx.Param, with_paths=False)
    assert len(one) == 3 and list(two[1]) == ["v"] and [p for p, _ in three[1]] == [("x",)] and len(three[2]) == 0
    with nnx.merge_context() as put:
        a, b, c, d = put.merge(*one), put.merge(*two), put.unflatten(*three), put.unflatten(*four)
    assert a is b["m"] is c.m and a is not m and a.w is not m.w and d.get_value() == 3
    assert not vars(cut) and not vars(put)  # a closed context holds no object


def test_an_update_context_carries_all_changes_out_of_jit():
    m = Layer()
    traces = []

    @jax.jit
    def f(parts):
        traces.append(1)
        with nnx.merge_context("up", inner=True) as put:
            inner = put.merge(*parts)
        inner.w[...] += 1
        inner.itself, inner.n = inner, inner.n * 2
        inner.made = nnx.Param(jnp.zeros(1), ref=True)
        inner.array = nnx.data(jax.new_ref(jnp.ones(1)))
        inner.held[...] += 1
        with nnx.split_context("up") as cut:
            return cut.split(inner)

    @nnx.update_context("up")
    def outside(m):
        with nnx.split_context("up") as cut:
            parts = cut.split(m)
        parts = f(parts)
        with nnx.merge_context("up", inner=False) as put:
            return put.merge(*parts)

    m.held = nnx.Param(jnp.zeros(2), ref=True)
    w, ref = m.w, m.held.get_raw_value()
    assert outside(m) is m
    assert m.w is w and float(w[0]) == 2 and m.itself is m and m.n == 6
    assert m.held.get_raw_value() is ref and float(ref[0]) == 1  # JAX carried it
    assert isinstance(m.made.get_raw_value(), jax.Ref) and isinstance(m.array, jax.Ref)
    with pytest.raises(ValueError, match="tag 'up'"):
        nnx.current_update_context("up")


def test_update_contexts_are_found_by_tag_and_belong_to_their_thread():
    with nnx.update_context("a") as a, nnx.update_context("b"), nnx.update_context("a") as inner:
        assert nnx.current_update_context("a") is inner and inner is not a
        failed = []
        thread = threading.Thread(target=lambda: failed.append(_fails(lambda: nnx.current_update_context("a"))))
        thread.start()
        thread.join()
    assert failed == [True] and vars(inner) == {"tag": "a"}
    with pytest.raises(ValueError, match="No update context"), nnx.split_context("a"):
        pass
    with pytest.raises(ValueError, match="inner"), nnx.update_context("a"), nnx.merge_context("a"):
        pass


def _fails(f):
    try:
        f()
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------- trees of objects
def test_to_tree_makes_a_pytree_and_from_tree_gives_the_objects_back():
    m = Layer()
    tree = nnx.to_tree({"a": m, "b": [m, jnp.ones(1)], "c": nnx.Param(1.0), "d": 3})
    assert isinstance(tree["a"], nnx.NodeStates) and tree["d"] == 3
    doubled = nnx.from_tree(jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t))(tree))
    assert doubled["a"] is doubled["b"][0] and doubled["a"] is not m
    np.testing.assert_array_equal(doubled["a"].w[...], [2, 2])
    assert float(m.w[0]) == 1


def test_split_and_merge_functions_see_path_and_prefix():
    m = Layer()
    seen = []

    def split_fn(ctx, path, prefix, x):
        seen.append((jax.tree_util.keystr(path), prefix))
        return nnx.NodeStates.from_split(*ctx.split(x, nnx.Param, ...), metadata=prefix)

    tree = nnx.to_tree((m, {"k": m}, 7), prefix=("p", "p", "q"), split_fn=split_fn)
    assert seen == [("[0]", "p"), ("[1]['k']", "p")]
    assert tree[0].metadata == "p" and len(tree[0].states) == 2
    paths = []
    back = nnx.from_tree(
        tree,
        prefix=(1, 2, 3),
        merge_fn=lambda ctx, path, prefix, x: (paths.append(prefix), ctx.merge(x.graphdef, *x.states))[1],
    )
    assert back[0] is back[1]["k"] and paths == [1, 2] and back[2] == 7
    every = []
    nnx.to_tree((m, 7), prefix=0, split_fn=lambda c, p, f, x: every.append(type(x)), map_non_graph_nodes=True)
    assert every == [Layer, int]


def test_one_object_under_two_prefixes_is_refused_unless_told_otherwise():
    m = Layer()
    with pytest.raises(ValueError, match="Inconsistent aliasing"):
        nnx.to_tree((m, m), prefix=(0, 1))
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    nnx.to_tree((m, m), prefix=(axes, axes))
    nnx.to_tree((m, m), prefix=(0, 1), check_aliasing=False)


def test_node_states_say_what_they_lack():
    parts = nnx.split(Layer(), nnx.Param, ...)
    node = nnx.NodeStates.from_states(*parts[1:])
    with pytest.raises(ValueError, match="graphdef"):
        _ = node.graphdef
    with pytest.raises(ValueError, match="got 2"):
        _ = node.state
    assert nnx.NodeStates.from_prefixes([0, 1], metadata=2).replace(metadata=3).metadata == 3
    with pytest.raises(ValueError, match="NodeStates"):
        nnx.from_tree(1, is_node_leaf=lambda x: True)


# ---------------------------------------------------------------- methods of objects that are cut
def test_call_runs_a_method_and_returns_the_object_cut_again():
    cut = nnx.split({"a": [Layer()]})

    @jax.jit
    def f(cut):
        return nnx.call(cut)["a"][0](jnp.ones(2))

    out, cut = f(cut)
    out, cut = f(cut)
    np.testing.assert_array_equal(out, [1, 1])
    n, (graphdef, state) = cut[0].apply(cut[1])["a"][0].step()
    assert n == 3 and float(nnx.merge(graphdef, state)["a"][0].b[0]) == 3
    assert nnx.call(nnx.split(Layer(), nnx.Param, ...)).step()[0] == 3
    with pytest.raises(AttributeError, match="nothing"):
        nnx.call(cut)["a"][0].nothing()


# ---------------------------------------------------------------- what a structure holds
def test_a_plain_value_that_is_declared_data_is_a_leaf():
    m = Layer()
    m.i, m.nothing = nnx.data(5), nnx.data(None)
    for graph in (True, False):
        assert ("i",) in nnx.flatten(m, graph=graph)[1].paths and "nothing" not in nnx.state(m, graph=graph)
    traces = []

    @nnx.jit
    def f(m):
        traces.append(1)
        m.i = m.i + 1

    for _ in range(4):
        f(m)
    assert int(m.i) == 9 and len(traces) <= 2  # the number became an array, and that was all


def test_unpacked_states_are_mappings_with_the_paths_of_states():
    m = Layer()
    params, rest = nnx.unpack(m, nnx.Param, ...)
    assert params.w is m.w and list(rest) == ["b"]
    with pytest.raises(AttributeError):
        _ = params.b
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    assert paths == ["['w'].value"]
    doubled = jax.tree.map(lambda x: x * 2, params)
    assert float(nnx.merge(doubled, rest).w[0]) == 2
    with pytest.raises(ValueError, match="Expected GraphState object"):
        nnx.merge(params, {"b": 1})
    with pytest.raises(ValueError, match="must be the same"):
        nnx.merge(params, nnx.unpack(nnx.Dict(a=1)))


def test_a_tree_has_no_opaque_objects():
    class Opaque(nnx.Module, pytree=False):
        def __init__(self):
            self.w = nnx.Param(1.0)

    m = nnx.Dict(inside=Opaque())
    for f in (nnx.flatten, nnx.split, nnx.state, lambda m, graph: list(nnx.iter_graph(m, graph=graph))):
        f(m, graph=True)
        with pytest.raises(ValueError, match=r"pytree=False.*Found at path"):
            f(m, graph=False)
