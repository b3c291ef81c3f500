# SPDX-License-Identifier: Apache-2.0
"""Laws of the one traversal, over every shape of object."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import StaticError
from batiste.graph.flatten import flatten_graph
from batiste.graph.unflatten import unflatten_graph
from tests.graph.zoo import NAMES, TREES, zoo


def leaves_of(node):
    return flatten_graph(node).values()


def same_values(a, b):
    a, b = leaves_of(a), leaves_of(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        if jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_unflatten_is_the_inverse_of_flatten(name):
    node = zoo(nnx)[name]
    flat = flatten_graph(node)
    again, objects = unflatten_graph(flat.graphdef.root, flat.values())
    assert flatten_graph(again).graphdef == flat.graphdef
    assert set(objects) == set(flat.objects)
    assert all(type(objects[i]) is type(x) and objects[i] is not x for i, x in flat.objects.items())
    same_values(node, again)


@pytest.mark.parametrize("name", NAMES)
def test_reuse_rebuilds_the_very_same_objects(name):
    node = zoo(nnx)[name]
    flat = flatten_graph(node)
    again, _ = unflatten_graph(flat.graphdef.root, flat.values(), reuse=flat.objects)
    if not isinstance(node, dict):
        assert again is node
    assert flatten_graph(node).graphdef == flat.graphdef


@pytest.mark.parametrize("name", NAMES)
def test_equal_structures_are_equal_and_hash_alike(name):
    a, b = nnx.graphdef(zoo_twice[0][name]), nnx.graphdef(zoo_twice[1][name])
    assert (a == b) is (name not in HAVE_THEIR_OWN_CLASS)
    assert hash(a) == hash(nnx.graphdef(zoo_twice[0][name]))
    assert a == nnx.graphdef(nnx.clone(zoo_twice[0][name]))


zoo_twice = zoo(nnx), zoo(nnx)
HAVE_THEIR_OWN_CLASS = {
    "layer",
    "nothing",
    "stack",
    "shared",
    "cycle",
    "mixed",
    "plain",
    "tree",
}  # classes made per call


@pytest.mark.parametrize("name", NAMES)
def test_merge_is_the_inverse_of_split(name):
    node = zoo(nnx)[name]
    graphdef, params, rest = nnx.split(node, nnx.Param, ...)
    again = nnx.merge(graphdef, params, rest)
    assert nnx.graphdef(again) == graphdef
    same_values(node, again)


@pytest.mark.parametrize("name", NAMES)
def test_structures_pickle(name):
    graphdef = nnx.graphdef(zoo(nnx)["rngs"] if name != "variable" else zoo(nnx)[name])
    assert pickle.loads(pickle.dumps(graphdef)) == graphdef


@pytest.mark.parametrize("name", NAMES)
def test_a_clone_shares_nothing_and_a_light_clone_shares_the_variables(name):
    node = zoo(nnx)[name]
    for variables in (True, False):
        flat, other = flatten_graph(node), flatten_graph(nnx.clone(node, variables=variables))
        for x, y in zip(flat.leaves, other.leaves):
            if isinstance(x, nnx.Variable):
                assert (x is y) is (not variables)


@pytest.mark.parametrize("name", ["stack", "shared", "cycle", "mixed", "plain", "rngs"])
def test_deepcopy_keeps_sharing_and_copies_settings(name):
    node = zoo(nnx)[name]
    other = copy.deepcopy(node)
    assert nnx.graphdef(other) == nnx.graphdef(node)
    assert nnx.find_duplicates(other) == nnx.find_duplicates(node)
    if name == "mixed":
        assert other.settings == node.settings and other.settings is not node.settings


@pytest.mark.parametrize("name", TREES)
def test_a_module_is_a_jax_pytree(name):
    node = zoo(nnx)[name]
    leaves, treedef = jax.tree.flatten(node)
    again = jax.tree.unflatten(treedef, leaves)
    assert jax.tree.structure(again) == treedef
    assert nnx.graphdef(again) == nnx.graphdef(node)


@pytest.mark.parametrize("name", ["shared", "cycle"])
def test_a_tree_refuses_sharing_and_names_both_paths(name):
    with pytest.raises(ValueError, match="Duplicate"):
        nnx.split(zoo(nnx)[name], graph=False)


def test_settings_are_compared_by_value_and_type():
    class M(nnx.Module):
        def __init__(self, x):
            self.x = x

    assert nnx.graphdef(M(1)) != nnx.graphdef(M(True))
    assert nnx.graphdef(M(1)) != nnx.graphdef(M(1.0))
    assert nnx.graphdef(M([1, {"a": 2}])) == nnx.graphdef(M([1, {"a": 2}]))
    assert hash(nnx.graphdef(M([1, {"a": 2}]))) == hash(nnx.graphdef(M([1, {"a": 2}])))


def test_a_setting_that_cannot_be_hashed_is_named():
    class Unhashable:
        __hash__ = None

    class M(nnx.Module):
        def __init__(self):
            self.odd = Unhashable()

    with pytest.raises(StaticError, match="odd"):
        hash(nnx.graphdef(M()))


def test_ten_elements_and_more_keep_their_order():
    flat = nnx.to_flat_state(nnx.state(nnx.List([nnx.Param(i) for i in range(12)])))
    assert flat.paths == tuple((i,) for i in range(12))
