# SPDX-License-Identifier: Apache-2.0
"""Cursors: notes on every kind of structure, updates and searches by path, operators."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pytest

from batiste import struct
from batiste.core.frozen_dict import FrozenDict
from batiste.cursor import Indexable, cursor, is_named_tuple
from batiste.errors import CursorFindError
from batiste.training.train_state import TrainState


class Pair(NamedTuple):
    x: Any
    y: Any


@struct.dataclass
class Node:
    a: Any
    b: Any = 2


@dataclasses.dataclass(frozen=True)
class Plain:
    a: Any


@pytest.fixture
def tree():
    return {"a": 1, "b": (2, [3, {"c": 4}]), "p": Pair(1, 2), "n": Node(1), "d": Plain(5), "f": FrozenDict(g=6)}


def test_notes_on_every_kind_of_structure(tree) -> None:
    c = cursor(tree)
    c["a"] = 10
    c["b"][0] = 20
    c["b"][1][1]["c"] += 36
    c["p"].x = 100
    c["p"][1] = 100
    c["p"].y += 100
    c["n"].a = Node(7)
    c["n"].a.b = 8
    c["d"].a = c["a"]
    c["f"]["g"] = 60
    c["new"] = 0
    assert c.build() == {
        "a": 10,
        "b": (20, [3, {"c": 40}]),
        "p": Pair(100, 200),
        "n": Node(Node(7, 8)),
        "d": Plain(10),
        "f": FrozenDict(g=60),
        "new": 0,
    }
    assert tree["b"] == (2, [3, {"c": 4}]) and tree["n"] == Node(1)


def test_setting_a_place_gives_the_whole(tree) -> None:
    c = cursor(tree)
    assert c["b"][1][0].set(30)["b"] == (2, [30, {"c": 4}])
    assert c["p"].y.set(0) == {**tree, "b": (2, [30, {"c": 4}]), "p": Pair(1, 0)}
    assert c.set(3) == 3


def test_reading_changes_nothing(tree) -> None:
    c = cursor(tree)
    assert c["b"][1][1]["c"] == 4 and c["n"].a == 1 and c["a"] is c["a"]
    assert c.build() is tree


def test_arrays_and_other_objects() -> None:
    class Thing:
        size = 1

    thing = Thing()
    c = cursor({"x": jnp.arange(3), "thing": thing})
    c["x"][0] = 7
    c["thing"].size = 2
    built = c.build()
    assert built["x"].tolist() == [7, 1, 2]
    assert built["thing"].size == 2 and thing.size == 1


def test_a_train_state() -> None:
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.adam(0.1))
    c = cursor(state)
    c.opt_state[0].count.set(5)
    after = c.params["w"].set(c.params["w"] * 2)
    assert after.params["w"].tolist() == [2.0, 2.0] and after.opt_state[0].count == 5


def test_what_is_not_there(tree) -> None:
    c = cursor(tree)
    with pytest.raises(KeyError, match="Key z not found in"):
        c["z"]
    with pytest.raises(AttributeError, match="Attribute z not found in"):
        c["n"].z  # noqa: B018
    with pytest.raises(AttributeError, match="Attribute z not found in"):
        c["n"].z = 1
    with pytest.raises(IndexError):
        c["b"][9]
    with pytest.raises(NotImplementedError, match="only implemented for tuples and lists"):
        list(c)


def test_updates_by_path_from_the_outside_in(tree) -> None:
    seen = []

    def update(path, value):
        seen.append(path)
        return Pair(0, 0) if path == "p" else 10 * value if isinstance(value, int) else value

    assert cursor(tree).apply_update(update).build() == {
        "a": 10,
        "b": (20, [30, {"c": 40}]),
        "p": Pair(0, 0),
        "n": Node(10, 20),
        "d": Plain(50),
        "f": FrozenDict(g=60),
    }
    assert seen == ["a", "b", "b/0", "b/1", "b/1/0", "b/1/1", "b/1/1/c", "p", "n", "n/a", "n/b", "d", "d/a", "f", "f/g"]


def test_searches_by_path_and_value(tree) -> None:
    assert cursor(tree).find(lambda path, _: path == "b/1").set(0)["b"] == (2, 0)
    found = cursor(tree).find_all(lambda _, value: isinstance(value, Node | dict))
    assert [c._path for c in found] == ["['b'][1][1]", "['n']"]
    with pytest.raises(CursorFindError, match="No object found"):
        cursor(tree).find(lambda path, _: path == "z")
    with pytest.raises(CursorFindError, match=r"More than one object found.*\['a'\] and \['b'\]"):
        cursor(tree).find(lambda path, _: True)


def test_operators_work_on_the_value() -> None:
    c = cursor({"x": 5, "l": [1, 2]})
    x = c["x"]
    assert (x + 1, 1 + x, x - 1, 1 - x, x * x, x / 2, x // 2, x % 2, x**2, 2**x) == (6, 6, 4, -4, 25, 2.5, 2, 1, 25, 32)
    assert (-x, +x, abs(x), ~x, x << 1, x >> 1, x & 4, x | 2, x ^ 1, divmod(x, 2)) == (
        -5,
        5,
        5,
        -6,
        10,
        2,
        4,
        7,
        4,
        (2, 1),
    )
    assert x > 4 and x >= 5 and x < 6 and x <= 5 and x == 5 and x != 4 and round(x) == 5 and str(x) == "5"
    assert len(c["l"]) == 2 and 2 in c["l"] and [int(i + 0) for i in reversed(c["l"])] == [2, 1]
    assert [i.set(0)["l"] for i in cursor({"l": [1, 2]})["l"]] == [[0, 2], [0, 0]]
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)


def test_the_text_shows_the_notes() -> None:
    c = cursor({"a": 1})
    c["a"] = 5
    inner = "Cursor(\n           _obj=5,\n           _changes={}\n         )"
    assert repr(c) == f"Cursor(\n  _obj={{'a': 1}},\n  _changes={{\n    'a': {inner}\n  }}\n)"


def test_kinds() -> None:
    assert is_named_tuple(Pair(1, 2)) and not is_named_tuple((1, 2))
    assert isinstance([], Indexable) and not isinstance(3, Indexable)
