# SPDX-License-Identifier: Apache-2.0
"""Pytree dataclasses: which fields JAX sees, replacing, freezing, inheritance."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from batiste import struct


@struct.dataclass
class Point:
    x: Any
    y: Any = 5
    unit: str = struct.field(pytree_node=False, default="m")


class Node(struct.PyTreeNode):
    x: Any
    unit: str = struct.field(pytree_node=False, default="m", metadata={"note": 1})


@pytest.mark.parametrize("make", [Point, Node])
def test_static_fields_are_no_leaves_and_keys_are_attribute_names(make):
    pairs, treedef = jax.tree_util.tree_flatten_with_path(make(1.0, unit="km"))
    assert pairs[0] == ((jax.tree_util.GetAttrKey("x"),), 1.0)
    assert "km" not in [leaf for _, leaf in pairs]
    assert jax.tree.unflatten(treedef, [leaf for _, leaf in pairs]) == make(1.0, unit="km")
    assert treedef != jax.tree.structure(make(1.0, unit="m"))


@pytest.mark.parametrize("make", [Point, Node])
def test_frozen_with_replace(make):
    point = make(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 2
    assert point.replace(x=2, unit="cm") == make(2, unit="cm")
    assert point.x == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        point.replace(z=1)


@pytest.mark.parametrize("make", [Point, Node])
def test_jit_and_pickle_keep_the_type(make):
    mapped = jax.jit(lambda p: p)(make(jnp.arange(3), unit="km"))
    assert type(mapped) is make
    assert mapped.unit == "km"
    assert pickle.loads(pickle.dumps(make(1))) == make(1)


def test_keywords_reach_dataclasses():
    @struct.dataclass(kw_only=True)
    class Keyword:
        x: int = 1
        y: int

    @struct.dataclass(frozen=False)
    class Thawed:
        x: int

    class KeywordNode(Node, kw_only=True):
        z: int

    assert Keyword(y=2) == Keyword(x=1, y=2)
    thawed = Thawed(1)
    thawed.x = 2
    assert jax.tree.leaves(thawed) == [2]
    assert jax.tree.leaves(KeywordNode(1, z=2)) == [1, 2]


def test_decorating_twice_changes_nothing_but_a_subclass_is_decorated_anew():
    assert struct.dataclass(Point) is Point

    @struct.dataclass
    class Point3(Point):
        z: int = 3

    class Plain(Point):
        """Not decorated: a leaf."""

    assert jax.tree.leaves(Point3(1)) == [1, 5, 3]
    assert len(jax.tree.leaves(Plain(1))) == 1


def test_field_keeps_other_metadata_and_options():
    assert dict(dataclasses.fields(Node)[1].metadata) == {"note": 1, "pytree_node": False}
    assert struct.field(default=3, repr=False).default == 3
    assert dict(struct.field(metadata={"pytree_node": False}).metadata) == {"pytree_node": True}


def test_the_base_class_itself_has_no_instances():
    with pytest.raises(NotImplementedError, match="make a subclass"):
        struct.PyTreeNode()
    assert not dataclasses.is_dataclass(struct.PyTreeNode)
