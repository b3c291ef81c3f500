# SPDX-License-Identifier: Apache-2.0
"""The small types of public signatures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from batiste import typing
from batiste.typing import HashableMapping, PytreeDeque, SizeBytes


@pytest.mark.parametrize(
    ("number", "text"), [(4, "4 B"), (1000, "1,000 B"), (4096, "4.1 KB"), (123456, "123.5 KB"), (5 * 2**20, "5.2 MB")]
)
def test_sizes_are_written_with_units(number, text) -> None:
    assert repr(SizeBytes(1000, number)) == f"1,000 ({text})"


def test_sizes_add_up() -> None:
    tree = {"w": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bfloat16), "n": 3}
    assert SizeBytes.from_any(tree) == SizeBytes(6, 24) + SizeBytes(2, 4)
    assert SizeBytes(1, 0) and not SizeBytes(0, 0)


def test_mappings_hashed_by_their_items() -> None:
    mapping = HashableMapping({"a": 1, "b": 2})
    assert mapping == HashableMapping({"b": 2, "a": 1}) and hash(mapping) == hash(HashableMapping({"b": 2, "a": 1}))
    assert mapping.update({"c": 3})["c"] == 3 and "c" not in mapping and list(mapping) == ["a", "b"]


def test_deques_are_pytrees() -> None:
    doubled = jax.tree.map(lambda x: 2 * x, PytreeDeque([1, 2]))
    assert doubled == PytreeDeque([2, 4]) and type(doubled) is PytreeDeque


def test_a_value_holds_in_a_context() -> None:
    class Depth(typing.BaseConfigContext):
        stack: list = []  # noqa: RUF012

        @classmethod
        def get_default(cls):
            return 5

        @classmethod
        def get_stack(cls):
            return cls.stack

    @Depth(9)
    def inside():
        return Depth.current_value()

    with Depth(7):
        assert (Depth.current_value(), inside()) == (7, 9)
    assert Depth.current_value() == 5


def test_protocols() -> None:
    assert typing.has_shape_dtype(jnp.ones(2)) and not typing.has_shape_dtype(3)
    assert typing.is_key_like("a") and typing.In(1) == typing.In(1) != typing.Out(1)
