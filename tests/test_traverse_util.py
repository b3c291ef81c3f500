# SPDX-License-Identifier: Apache-2.0
"""Flat and nested dicts, and the deprecated traversals."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batiste import traverse_util
from batiste.core.frozen_dict import FrozenDict
from batiste.traverse_util import empty_node, flatten_dict, path_aware_map, unflatten_dict

NESTED = st.recursive(st.integers(), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, max_size=3))
DICTS = st.dictionaries(st.text("abc", min_size=1), NESTED, max_size=3)


@given(DICTS)
def test_flattening_and_back_is_the_identity(xs) -> None:
    assert unflatten_dict(flatten_dict(xs, keep_empty_nodes=True)) == xs
    assert unflatten_dict(flatten_dict(xs, keep_empty_nodes=True, sep="/"), sep="/") == xs
    assert path_aware_map(lambda _, x: x, xs) == xs


def test_empty_dicts_are_left_out_or_marked() -> None:
    xs = {"a": {"b": 1, "c": {}}, "d": {}}
    assert flatten_dict(xs) == {("a", "b"): 1}
    assert flatten_dict(xs, keep_empty_nodes=True) == {("a", "b"): 1, ("a", "c"): empty_node, ("d",): empty_node}
    assert flatten_dict({}, keep_empty_nodes=True, sep="/") == {}


def test_dicts_can_be_leaves() -> None:
    xs = {"a": {"b": {"c": 3}}, "d": FrozenDict(e=4)}
    assert flatten_dict(xs, is_leaf=lambda path, x: "c" in x) == {("a", "b"): {"c": 3}, ("d", "e"): 4}
    assert flatten_dict(xs, is_leaf=lambda path, x: path == ("a",), sep=".") == {"a": {"b": {"c": 3}}, "d.e": 4}


def test_what_is_no_dict_raises() -> None:
    with pytest.raises(AssertionError, match=r"expected \(frozen\)dict; got <class 'int'>"):
        flatten_dict(3)
    with pytest.raises(AssertionError, match="input is not a dict"):
        unflatten_dict([("a", 1)])


class Pair(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Point:
    x: int


class Thing:
    def __init__(self):
        self.x = 1


pytestmark = pytest.mark.filterwarnings("ignore:`flax.traverse_util.Traversal`:DeprecationWarning")
whole = traverse_util.t_identity

# traversal, structure, what it chooses, the structure with ten times that
TRAVERSALS = {
    "id": (lambda: whole, 3, [3], 30),
    "item": (lambda: whole[1], [1, 2], [2], [1, 20]),
    "item of a tuple": (lambda: whole[-1], (1, 2), [2], (1, 20)),
    "item of a named tuple": (lambda: whole[0], Pair(1, 2), [1], Pair(10, 2)),
    "item of a dict": (lambda: whole["a"], {"a": 1, "b": 2}, [1], {"a": 10, "b": 2}),
    "slice": (lambda: whole[1:], (1, 2, 3), [2, 3], (1, 20, 30)),
    "attribute of a named tuple": (lambda: whole.x, Pair(1, 2), [1], Pair(10, 2)),
    "attribute of a dataclass": (lambda: whole.x, Point(1), [1], Point(10)),
    "each of a list": (lambda: whole.each(), [1, 2], [1, 2], [10, 20]),
    "each of a tuple": (lambda: whole.each(), (1, 2), [1, 2], (10, 20)),
    "each of a dict": (lambda: whole.each(), {"b": 1, "a": 2}, [1, 2], {"b": 10, "a": 20}),
    "tree": (lambda: whole.tree(), {"a": [1, (2,)], "b": None}, [1, 2], {"a": [10, (20,)], "b": None}),
    "filter": (lambda: whole.each().filter(lambda x: x > 1), [1, 2, 3], [2, 3], [1, 20, 30]),
    "merge": (lambda: whole.merge(whole[0], whole[2]), [1, 2, 3], [1, 3], [10, 2, 30]),
    "composition": (lambda: whole["a"].each()["x"], {"a": [{"x": 1}, {"x": 2}]}, [1, 2], {"a": [{"x": 10}, {"x": 20}]}),
    "parameters": (
        lambda: traverse_util.ModelParamTraversal(lambda path, _: path.endswith("/kernel")),
        {"up": {"kernel": 1, "bias": 2}, "none": {}},
        [1],
        {"up": {"kernel": 10, "bias": 2}, "none": {}},
    ),
}


@pytest.mark.parametrize("name", TRAVERSALS)
def test_reading_and_replacing(name) -> None:
    make, structure, chosen, times_ten = TRAVERSALS[name]
    traversal = make()
    assert list(traversal.iterate(structure)) == chosen
    assert traversal.update(lambda x: 10 * x, structure) == times_ten
    assert traversal.set([10 * x for x in chosen], structure) == times_ten
    assert list(traversal.iterate(structure)) == chosen  # the original is as it was
    with pytest.raises(ValueError, match="Not enough values"):
        traversal.set(chosen[1:], structure)
    with pytest.raises(ValueError, match="Too many values"):
        traversal.set([*chosen, 0], structure)


def test_other_containers() -> None:
    thing = Thing()
    assert whole.x.update(lambda x: 5, thing).x == 5 and thing.x == 1
    np.testing.assert_array_equal(whole[0].update(lambda x: 7, np.arange(3)), [7, 1, 2])
    params = FrozenDict({"up": {"kernel": 1}})
    every = traverse_util.ModelParamTraversal(lambda path, x: True)
    assert isinstance(every.update(lambda x: 2, params), FrozenDict)


@pytest.mark.parametrize("structure", [Pair(1, 2), {1, 2}, 3])
def test_only_the_entries_of_lists_and_tuples(structure) -> None:
    with pytest.raises(ValueError, match="Only the entries of a list or tuple can be traversed"):
        whole.each().update(abs, structure)


def test_parameters_stand_in_dicts() -> None:
    with pytest.raises(ValueError, match="Can only traverse"):
        traverse_util.ModelParamTraversal(lambda path, x: True).update(abs, [1])


def test_traversals_are_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="path_aware_map"):
        traverse_util.TraverseId()
    with pytest.raises(TypeError, match="abstract"):
        traverse_util.Traversal()
