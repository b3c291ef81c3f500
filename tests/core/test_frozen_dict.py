# SPDX-License-Identifier: Apache-2.0
"""FrozenDict: reading, changed copies, equality, text, and what JAX and pickle see."""

from __future__ import annotations

import pickle

import jax
import pytest

from batiste.core import frozen_dict
from batiste.core.frozen_dict import FrozenDict, copy, freeze, pop, pretty_repr, unfreeze

NESTED = {"b": 1, "a": {"c": 2}}


def test_what_is_read_is_frozen_and_the_source_may_change() -> None:
    source = {"b": 1, "a": {"c": [2]}}
    frozen = FrozenDict(source)
    source["a"]["c"] = 5
    assert isinstance(frozen["a"], FrozenDict) and frozen["a"]["c"] == [2]
    assert isinstance(next(iter(FrozenDict({"x": {"y": 1}}).values())), FrozenDict)
    assert dict(frozen.items())["b"] == 1 and 1 in frozen.values() and list(frozen.keys()) == ["b", "a"]


def test_writing_raises() -> None:
    frozen = freeze(NESTED)
    with pytest.raises(ValueError, match="FrozenDict is immutable"):
        frozen["b"] = 2
    with pytest.raises(AttributeError, match="immutable"):
        del frozen["b"]
    with pytest.raises(KeyError):
        frozen.pop("z")


@pytest.mark.parametrize("make", [dict, FrozenDict])
def test_changed_copies_keep_the_type(make) -> None:
    rest, value = pop(make(NESTED), "b")
    assert (type(rest), rest, value) == (make, {"a": {"c": 2}}, 1)
    more = copy(make(NESTED), {"d": 3})
    assert (type(more), more) == (make, {**NESTED, "d": 3})
    assert unfreeze(make(NESTED)) == NESTED


@pytest.mark.parametrize("change", [lambda x: copy(x), lambda x: pop(x, "a")])
def test_changing_something_else_raises(change) -> None:
    with pytest.raises(TypeError, match="Expected FrozenDict or dict, got <class 'int'>"):
        change(3)


def test_unfreezing_copies_every_container_and_keeps_other_values() -> None:
    frozen = FrozenDict({"a": [1, {"b": 2}]})
    thawed = unfreeze(frozen)
    thawed["a"][1]["b"] = 5
    assert frozen["a"] == [1, {"b": 2}]
    assert unfreeze(3) == 3
    assert type(unfreeze({"a": frozen})["a"]) is dict


def test_equal_to_a_mapping_with_equal_items_and_hashed_by_them() -> None:
    frozen = freeze(NESTED)
    assert frozen == NESTED and frozen == NESTED and frozen == freeze({"a": {"c": 2}, "b": 1})
    assert frozen != freeze({"b": 1}) and frozen != 3
    assert hash(frozen) == hash(freeze({"a": {"c": 2}, "b": 1}))
    with pytest.raises(TypeError, match="unhashable"):
        hash(FrozenDict(a=[1]))


def test_text_has_an_item_per_line() -> None:
    inner = "{\n    b: 1,\n    a: {\n        c: 2,\n    },\n}"
    assert repr(freeze(NESTED)) == f"FrozenDict({inner})" and pretty_repr(NESTED) == inner
    assert repr(FrozenDict()) == "FrozenDict({})" and pretty_repr([1]) == "[1]"
    assert pretty_repr({"x": FrozenDict(y="z")}, 2) == "{\n  x: FrozenDict({\n      y: 'z',\n  }),\n}"
    assert repr(FrozenDict(a=1).keys()) == "frozen_dict_keys(['a'])"
    assert repr(FrozenDict(a=1).values()) == "frozen_dict_values([1])"
    assert isinstance(FrozenDict(a=1).keys(), frozen_dict.FrozenKeysView)


def test_jax_and_pickle_keep_it() -> None:
    frozen = freeze(NESTED)
    assert jax.tree.map(lambda x: 10 * x, frozen) == freeze({"b": 10, "a": {"c": 20}})
    assert jax.tree.leaves(frozen) == [2, 1]
    assert jax.tree.leaves_with_path(frozen)[0][0] == (jax.tree_util.DictKey("a"), jax.tree_util.DictKey("c"))
    assert pickle.loads(pickle.dumps(frozen)) == frozen
