# SPDX-License-Identifier: Apache-2.0
"""Globs, axes per dim, and what is left for the axes that no rule uses."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec as P

from batiste.graph.errors import ArgumentError, ShapeError
from batiste.sharding.rules import check, expanded, filled, fits, mesh_axes, shown, spread, suits, to_spec

SIZES = {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("kernel", "kernel", True),
        ("kernel", "a/0/kernel", True),
        ("kernel", "a/dot_kernel", False),
        ("up/kernel", "up/kernel/scale", False),
        ("*/kernel", "up/kernel", True),
        ("*/kernel", "kernel", False),
        ("attn/**/kernel", "layers/3/attn/kernel", True),
        ("attn/**/kernel", "attn/a/b/kernel", True),
        ("attn/**", "attn", False),
        ("attn/**", "x/attn/a/b", True),
        ("**", "anything/at/all", True),
        ("{q,k}_proj/kernel", "0/k_proj/kernel", True),
        ("{q,k}_proj/kernel", "0/v_proj/kernel", False),
        ("fc?/kernel", "fc1/kernel", True),
        ("a.b/kernel", "aXb/kernel", False),
        ("/embed/kernel", "model/embed/kernel", True),
    ],
)
def test_a_glob_is_held_against_the_end_of_a_path(glob, path, expected):
    assert fits(glob, path) is expected


def test_a_glob_is_shown_with_the_name_that_was_met():
    assert shown("{up,gate}/kernel", "mlp/gate/kernel") == "gate/kernel"
    assert shown("mlp/**/{up,gate}", "mlp/gate") == "mlp/**/{up,gate}"


def test_one_entry_per_dim():
    assert expanded(("a",), 3, "", "") == ("a", None, None)
    assert expanded((..., "a"), 3, "", "") == (None, None, "a")
    assert expanded(("a", ..., "b"), 2, "", "") == ("a", "b")
    with pytest.raises(ShapeError, match="the rule has 3 entries, the value has 2 dims at mlp/kernel"):
        expanded(("a", "b", "c"), 2, "mlp/kernel", "the rule")


def test_rules_speak_of_values_of_their_rank():
    assert suits((), 5)
    assert suits((None, "a"), 2)
    assert not suits((None, "a"), 3)
    assert suits((..., "a", None), 2)
    assert not suits((..., "a", None), 1)


def test_an_entry_stands_for_mesh_axes():
    names = {"mlp": "tensor", "batch": ("data", "tensor"), "embed": None}
    assert mesh_axes("mlp", names, SIZES, "", "") == ("tensor",)
    assert mesh_axes("batch", names, SIZES, "", "") == ("data", "tensor")
    assert mesh_axes(("mlp", "data"), names, SIZES, "", "") == ("tensor", "data")
    assert mesh_axes("embed", names, SIZES, "", "") == mesh_axes(None, names, SIZES, "", "") == ()
    with pytest.raises(ArgumentError, match="'mpl' in the rule is no axis name of the plan"):
        mesh_axes("mpl", names, SIZES, "p", "the rule")


def test_axes_that_cannot_divide_a_value_are_errors():
    check([("data",), ("tensor",)], (2, 4), SIZES, "", "")
    with pytest.raises(ArgumentError, match="puts the mesh axis 'data' on dims 0 and 1"):
        check([("data",), ("data",)], (2, 4), SIZES, "", "the rule")
    with pytest.raises(ShapeError, match="spreads dim 1 over the 8 devices of data x tensor"):
        check([(), ("data", "tensor")], (2, 4), SIZES, "", "the rule")


def test_the_shortest_spec():
    assert to_spec([(), ("a",), ("b", "c"), ()]) == P(None, "a", ("b", "c"))
    assert to_spec([(), ()]) == P()


def test_axes_fill_the_largest_free_dim_that_they_divide():
    assert filled([(), ()], (6, 8), ("data",), SIZES) == [(), ("data",)]
    assert filled([(), ()], (6, 7), ("data",), SIZES) == [("data",), ()]
    assert filled([(), ("tensor",)], (2, 64), ("data",), SIZES) == [("data",), ("tensor",)]
    assert filled([(), ("tensor",)], (3, 64), ("data",), SIZES) == [(), ("tensor", "data")]
    assert filled([()], (8,), ("data",), SIZES, least=9) == [()]
    assert filled([("data",), ()], (8, 8), ("data",), SIZES) == [("data",), ()]
    assert filled([()], (7,), ("data",), SIZES) == [()]


def test_a_value_is_spread_as_far_as_it_goes():
    assert spread((16, 3), SIZES, ("tensor", "data")) == P(("tensor", "data"))
    assert spread((4, 2), SIZES, ("tensor", "data")) == P("tensor", "data")
    assert spread((3, 5), SIZES, ("tensor", "data")) == P()
    assert spread((), SIZES, ("tensor",)) == P()
