# SPDX-License-Identifier: Apache-2.0
"""State dicts of every registered type, bytes and back, and bytes that were damaged or made to harm."""

from __future__ import annotations

import resource
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batiste import serialization, struct
from batiste.core.frozen_dict import FrozenDict
from batiste.serialization import (
    from_bytes,
    from_state_dict,
    msgpack_restore,
    msgpack_serialize,
    to_bytes,
    to_state_dict,
)


class Pair(NamedTuple):
    x: Any
    y: Any


@struct.dataclass
class Point:
    x: Any
    y: Any = 5
    unit: str = struct.field(pytree_node=False, default="m")


# a value, its state dict, and a value of the same structure with other numbers
STRUCTURES = {
    "a list": ([1, [2]], {"0": 1, "1": {"0": 2}}, [0, [0]]),
    "a tuple": ((1, 2), {"0": 1, "1": 2}, (0, 0)),
    "a named tuple": (Pair(1, {"z": 3}), {"x": 1, "y": {"z": 3}}, Pair(0, {"z": 0})),
    "a dict with numbers for keys": ({1: 2}, {"1": 2}, {1: 0}),
    "a frozen dict": (FrozenDict(a={"b": 1}), {"a": {"b": 1}}, FrozenDict(a={"b": 0})),
    "a dataclass": (Point((1, 2)), {"x": {"0": 1, "1": 2}, "y": 5}, Point((0, 0), 0)),
    "a leaf": (3, 3, 0),
    "nothing": ({"a": None, "b": ()}, {"a": None, "b": {}}, {"a": None, "b": ()}),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_state_dicts_and_bytes(name) -> None:
    value, state, target = STRUCTURES[name]
    assert to_state_dict(value) == state
    for restored in (from_state_dict(target, state), from_bytes(target, to_bytes(value))):
        assert restored == value and type(restored) is type(value)


def test_optimizer_states() -> None:
    params = {"w": jnp.arange(3.0)}
    transformation = optax.chain(optax.clip(1.0), optax.adam(0.1))
    _, state = transformation.update(params, transformation.init(params), params)
    restored = from_bytes(transformation.init(params), to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_partials_keep_their_function() -> None:
    partial = jax.tree_util.Partial(pow, 1, exp=2)
    state = to_state_dict(partial)
    assert state == {"args": {"0": 1}, "keywords": {"exp": 2}}
    assert from_state_dict(partial, {"args": {"0": 3}, "keywords": {"exp": 4}})() == 81


def test_named_tuples_as_they_were_written_long_ago() -> None:
    old = {"name": "Pair", "fields": {"0": "x", "1": "y"}, "values": {"0": 3, "1": 4}}
    assert from_state_dict(Pair(1, 2), old) == Pair(3, 4)


MISMATCHES = {
    "short list": ([1, 2], {"0": 3}, r"size of the list and the state dict do not match, got 2 and 1 at path \."),
    "no list": ([1], 3, "A list can only be restored from a state dict"),
    "other fields": (Pair(1, 2), {"x": 3}, "field names of the state dict and the named tuple do not match"),
    "lacking key": ({"a": {"b": 1}}, {"a": {}}, r"keys {'b'} which are not present in state dict at path \./a"),
    "lacking field": (Point(1), {"x": 3}, "Missing field y in state dict while restoring an instance of Point"),
    "static field": (Point(1), {"x": 3, "y": 4, "unit": "km"}, 'Unknown field.* "unit" in state dict'),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_state_of_another_structure_is_refused(name) -> None:
    target, state, message = MISMATCHES[name]
    with pytest.raises(ValueError, match=message):
        from_state_dict(target, state)
    assert serialization.current_path() == ""


def test_two_keys_with_the_same_text_are_refused() -> None:
    with pytest.raises(ValueError, match="same text"):
        to_state_dict({1: 2, "1": 3})


def test_a_type_registers_itself() -> None:
    class Custom:
        pass

    paths = []
    register = serialization.register_serialization_state
    register(Custom, lambda x: {"a": 1}, lambda x, state: paths.append(serialization.current_path()))
    assert serialization.is_serializable(Custom) and serialization.is_serializable(Custom())
    assert to_state_dict([Custom()]) == {"0": {"a": 1}}
    from_state_dict({"q": [Custom()]}, {"q": {"0": {"a": 1}}})
    assert paths == ["./q/0"]
    for known in (Custom, Point):
        with pytest.raises(ValueError, match="is already registered"):
            register(known, dict, dict)
    register(Custom, lambda x: {1: 1}, lambda x, state: x, override=True)
    with pytest.raises(AssertionError, match="must only have string keys"):
        to_state_dict(Custom())


LEAVES = {
    "matrix": np.arange(6, dtype=np.int16).reshape(2, 3).T,
    "big-endian": np.arange(3, dtype=">i4"),
    "bfloat16": jnp.ones((2, 2), jnp.bfloat16),
    "float8": jnp.ones(2, jnp.float8_e4m3fn),
    "int4": jnp.ones(2, jnp.int4),
    "empty": np.zeros((0, 3)),
    "no dims": np.array(3.0),
    "dates": np.array(["2020-01-01"], "datetime64[D]"),
}


@pytest.mark.parametrize("name", LEAVES)
def test_arrays(name) -> None:
    restored = msgpack_restore(msgpack_serialize({"a": LEAVES[name]}))["a"]
    np.testing.assert_array_equal(restored, np.asarray(LEAVES[name]))
    assert restored.dtype.name == LEAVES[name].dtype.name and restored.shape == LEAVES[name].shape


@pytest.mark.parametrize("leaf", [np.float32(2), np.bool_(True), 1 + 2j, True, None, "text", b"bytes", 3, 2.5, [1, 2]])
def test_scalars_keep_their_type(leaf) -> None:
    restored = msgpack_restore(msgpack_serialize(leaf))
    assert restored == leaf and type(restored) is type(leaf)


@pytest.mark.parametrize(
    ("leaf", "error"),
    [
        (np.array(["text"]), ValueError),
        (np.array([object()]), ValueError),
        (np.zeros(2, [("a", "i4")]), ValueError),
        ({1, 2}, TypeError),
        ((1, 2), TypeError),
    ],
)
def test_what_has_no_bytes_is_refused(leaf, error) -> None:
    with pytest.raises(error, match="serialize"):
        msgpack_serialize({"a": leaf})


def test_large_arrays_are_written_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)
    tree = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": {"c": jnp.ones((3, 4), jnp.bfloat16)}}
    encoded = msgpack_serialize(tree)
    assert isinstance(tree["b"]["c"], jax.Array)  # the tree is as it was
    assert sorted(msgpack.unpackb(encoded)["a"]["chunks"]) == ["0", "1", "2"]
    jax.tree.map(np.testing.assert_array_equal, msgpack_restore(encoded), tree)
    jax.tree.map(np.testing.assert_array_equal, msgpack_restore(msgpack_serialize(np.arange(12.0))), np.arange(12.0))


WHOLE = msgpack_serialize({"a": np.arange(3), "b": [1, "x", 2.5, {"c": None}], "d": np.float32(2), "e": 1j})


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_data_cut_short_anywhere_is_refused(length) -> None:
    with pytest.raises(ValueError, match="Unpack failed: incomplete input"):
        msgpack_restore(WHOLE[:length])


def restored(data: bytes) -> tuple[Any, str]:
    """What the data holds, or why it is refused."""
    try:
        return msgpack_restore(data), ""
    except ValueError as error:
        return None, str(error)


@given(st.binary(max_size=80))
def test_any_bytes_give_a_value_or_one_error(data) -> None:
    assert restored(data)[1].partition(":")[0] in ("", "Unpack failed")


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_changed_byte_gives_a_value_or_one_error(place, byte) -> None:
    data = WHOLE[:place] + bytes([byte]) + WHOLE[place + 1 :]
    assert restored(data)[1].partition(":")[0] in ("", "Unpack failed")


def array(*parts: Any) -> bytes:
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb(parts)))


HOSTILE = {
    "more after the end": WHOLE + b"x",
    "nested beyond any limit": b"\x91" * 10**6 + b"\x00",
    "nested dicts": b"\x81\xa1a" * 1020 + b"\x00",
    "lists in lists that announce much": b"\xdd\x00\x0f\xff\xff" * 10**5,
    "a list of four billion": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "an array larger than its data": array([2**40], "float32", b"abcd"),
    "an array of negative size": array([-1, -1], "int8", b"a"),
    "an array of fractions": array([2.0], "int8", b"ab"),
    "an array of objects": array([1], "object", b"abcdefgh"),
    "an array of records": array([1], "i4,i4", b"abcdefgh"),
    "an array of an unknown dtype": array([1], "nonsense", b"abcd"),
    "an array with a dtype of megabytes": array([1], "i4," * 10**6, b"abcd"),
    "an array without its data": array([1], "int8"),
    "no array at all": msgpack.packb(msgpack.ExtType(1, b"abc")),
    "pieces that are not there": msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
    "pieces of another size": msgpack.packb({"__msgpack_chunked_array__": True, "shape": {"0": 9}, "chunks": {}}),
    "a list for a key": msgpack.packb({(1, 2): 3}, use_bin_type=True),
    "text that is none": b"\xa2\xff\xff",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data_is_refused_in_little_memory(name) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, why = restored(HOSTILE[name])
    assert value is None and why.startswith("Unpack failed") and len(why) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_nesting_that_fits_is_read() -> None:
    value, depth = msgpack_restore(b"\x91" * 900 + b"\x00"), 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == 900
