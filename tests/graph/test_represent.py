# SPDX-License-Identifier: Apache-2.0
"""The layout of reprs, on small stand-ins for Variables, nodes, States and sequences."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope

from batiste.graph.config import config
from batiste.graph.represent import Layout, Nested, Size, bytes_text, represent, sizes_by_kind, treescope_form


class Shown:
    def __init__(self, *items, **named):
        self.items = [*items, *named.items()]

    def __repr__(self):
        return represent(self)

    def __treescope_repr__(self, path, subtree_renderer):
        return treescope_form(self, path, subtree_renderer)


class Weight(Shown):
    def __init__(self, value, **metadata):
        super().__init__(("value", value), **metadata)

    def __batiste_repr__(self):
        return Layout(type(self).__name__, self.items, kind=type(self).__name__)


class Bias(Weight):
    pass


class Part(Shown):
    def __batiste_repr__(self):
        return Layout("Part", self.items, counted=True)


class Row(Shown):
    def __batiste_repr__(self):
        return Layout("Row", enumerate(self.items), brackets=("([", "])"), join="")


class Tree(Shown):
    def __batiste_repr__(self):
        items = [(key, Nested(value) if isinstance(value, dict) else value) for key, value in self.items]
        return Layout("Tree", items, brackets=("({", "})"), join=": ")


def text(expected: str) -> str:
    return textwrap.dedent(expected).strip()


def test_a_variable_alone_shows_its_values_and_size():
    assert repr(Weight(jnp.zeros((2, 2)), note="x")) == text("""
        Weight( # 4 (16 B)
          value=Array([[0., 0.],
                 [0., 0.]], dtype=float32),
          note='x'
        )""")


def test_below_a_node_arrays_are_shown_by_shape_and_sizes_add_up_by_kind():
    part = Part(
        kernel=Weight(jnp.zeros((2, 3))), bias=Bias(np.zeros(3)), scale=Bias(jnp.ones(1)), size=2, dtype=jnp.float32
    )
    assert repr(part) == text("""
        Part( # Bias: 4 (28 B), Weight: 6 (24 B), Total: 10 (52 B)
          kernel=Weight( # 6 (24 B)
            value=Array(shape=(2, 3), dtype=dtype('float32'))
          ),
          bias=Bias( # 3 (24 B)
            value=Array(shape=(3,), dtype=dtype('float64'))
          ),
          scale=Bias( # 1 (4 B)
            value=Array([1.], dtype=float32)
          ),
          size=2,
          dtype=float32
        )""")


def test_a_repeated_object_is_shown_and_counted_once():
    shared = Part(kernel=Weight(jnp.zeros(3)))
    whole = Part(a=shared, b=shared, row=Row(shared))
    whole.items.append(("itself", whole))
    assert repr(whole) == text("""
        Part( # Weight: 3 (12 B)
          a=Part( # Weight: 3 (12 B)
            kernel=Weight( # 3 (12 B)
              value=Array(shape=(3,), dtype=dtype('float32'))
            )
          ),
          b=Part(...),
          row=Row([
            Part(...)
          ]),
          itself=Part(...)
        )""")
    assert repr(whole) == repr(whole), "what one call has shown is unknown to the next"


def test_mappings_are_nested_and_show_values():
    tree = Tree(("a", {"b": 1, 3: Weight(2)}), ("c", jnp.zeros(2)))
    assert repr(tree) == text("""
        Tree({
          'a': {
            'b': 1,
            3: Weight(
              value=2
            )
          },
          'c': Array([0., 0.], dtype=float32)
        })""")


def test_plain_containers_show_the_objects_in_them():
    class Pair(NamedTuple):
        x: Any
        y: Any

    part = Part(f=[jnp.zeros(2), {"x": (Bias(jnp.zeros(2)),)}], n=Pair(Part(), "a\nb"), e=())
    assert repr(part) == text("""
        Part( # Bias: 2 (8 B)
          f=[Array(shape=(2,), dtype=dtype('float32')), {'x': (Bias( # 2 (8 B)
            value=Array(shape=(2,), dtype=dtype('float32'))
          ),)}],
          n=Pair(x=Part(), y='a\\nb'),
          e=()
        )""")


def test_a_class_may_have_a_repr_of_its_own():
    class Quiet(Part):
        def __repr__(self):
            return "<quiet>"

    assert repr(Part(a=Quiet(b=1))) == "Part(\n  a=<quiet>\n)"


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0, "Part(...)"),
        (1, "Part( # Weight: 2 (8 B)\n  w=Weight(...)\n)"),
        (2, "Part( # Weight: 2 (8 B)\n  w=Weight( # 2 (8 B)\n    value=Array(...)\n  )\n)"),
    ],
)
def test_the_depth_can_be_limited(depth, expected):
    with config.temp_flip_flag("max_repr_depth", depth):
        assert repr(Part(w=Weight(jnp.zeros(2)))) == expected


def test_empty_objects_have_no_lines():
    assert (repr(Part()), repr(Row()), repr(Tree())) == ("Part()", "Row([])", "Tree({})")


def test_tracers_deleted_arrays_and_refs_are_shown_without_being_read():
    gone = jnp.zeros(1)
    gone.delete()
    assert repr(Weight(gone)) == "Weight( # 1 (4 B)\n  value=Array(shape=(1,), dtype=dtype('float32'))\n)"
    assert "ArrayRef(shape=(2,)" in repr(Part(r=Weight(jax.new_ref(jnp.zeros(2)))))
    seen = []
    jax.eval_shape(lambda x: seen.append(repr(Part(w=Weight(x)))), jnp.zeros((2, 3)))
    assert "value=Array(shape=(2, 3), dtype=dtype('float32'))" in seen[0]


def test_sizes_cover_abstract_values_pytrees_and_keys():
    assert Size.of(jax.ShapeDtypeStruct((300, 1000), jnp.float32)) == Size(300_000, 1_200_000)
    assert Size.of({"a": jnp.zeros(3, jnp.bfloat16), "b": "text"}) == Size(3, 6)
    assert Size.of(jax.random.key(0)).elements == 1
    assert sizes_by_kind(Part(w=Weight("text"))) == {}


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1000, "1,000 B"), (1024, "1.0 KB"), (10**7, "10.0 MB"), (12 * 10**11, "1,200.0 GB")],
)
def test_bytes_have_units(count, expected):
    assert bytes_text(count) == expected


@pytest.mark.filterwarnings("ignore:The chararray class is deprecated")  # treescope looks at every name of numpy
def test_treescope_shows_the_same_items():
    shown = treescope.render_to_text(Part(w=Weight(jnp.zeros((2, 3))), row=Row(1), tree=Tree(("a", {"b": 1}))))
    assert "Part( # Weight: 6 (24 B)" in shown
    assert "w=Weight(" in shown
    assert "float32(2, 3)" in shown
    assert "row=Row([1])" in shown
    assert "tree=Tree({'a': {'b': 1}})" in shown
