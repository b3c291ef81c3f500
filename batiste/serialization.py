# SPDX-License-Identifier: Apache-2.0
"""State dicts and bytes: any object as nested dicts of arrays, these as msgpack, and the way back.

    object   --to_state_dict-->    nested dict with string keys   --msgpack_serialize-->  bytes
    object'  <--from_state_dict--  nested dict of NumPy arrays    <--msgpack_restore----  bytes

Lists and tuples become dicts with the keys "0", "1", ...; other types say themselves what they become, by
`register_serialization_state`. What is of no registered type is a leaf.

In the bytes, arrays are msgpack extension 1, scalars of NumPy extension 3, complex numbers extension 2. An array is
`(shape, dtype name, little-endian data in C order)`; one of more than MAX_CHUNK_SIZE bytes is a dict of flat pieces.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import numpy as np

from batiste.core.frozen_dict import FrozenDict
from batiste.graph.callers import warn
from batiste.graph.errors import ArgumentError, DtypeError, StateMismatchWarning, StructureError
from batiste.graph.fitting import check_fit
from batiste.graph.optional import need

__all__ = [
    "MAX_CHUNK_SIZE",
    "MismatchError",
    "current_path",
    "from_bytes",
    "from_state_dict",
    "is_serializable",
    "msgpack_restore",
    "msgpack_serialize",
    "register_serialization_state",
    "to_bytes",
    "to_state_dict",
]


class Handler(NamedTuple):
    """How a type becomes a state dict, and how a value takes one in."""

    to: Callable[[Any], Any]
    back: Callable[[Any, Any], Any]


_handlers: dict[Any, Handler] = {}
_restoring = threading.local()


def register_serialization_state(
    ty: Any,
    ty_to_state_dict: Callable[[Any], dict[str, Any]],
    ty_from_state_dict: Callable[[Any, dict[str, Any]], Any],
    override: bool = False,
) -> None:
    """Says how values of the very type `ty` are written and read; subclasses are types of their own.

    Args:
        ty_to_state_dict: `value -> {name: state}`.
        ty_from_state_dict: `(value, {name: state}) -> value` of the same type.

    Raises:
        ValueError: `ty` has a handler already, and `override` is false.
    """
    if not override and _handler_of(ty) is not None:
        raise ArgumentError(
            f'A serialization handler for "{ty.__name__}" is already registered', fix="pass override=True"
        )
    _handlers[ty] = Handler(ty_to_state_dict, ty_from_state_dict)


def _handler_of(ty: Any) -> Handler | None:
    """The handler of a type; dataclasses of `batiste.struct` are registered by what they are."""
    if ty in _handlers:
        return _handlers[ty]
    return _dataclass if "_flax_dataclass" in vars(ty) else None


def is_serializable(target: Any) -> bool:
    """Whether a value, or a type, becomes a state dict of its own."""
    return _handler_of(target if isinstance(target, type) else type(target)) is not None


def to_state_dict(target: Any) -> Any:
    """Nested dicts with string keys that hold the values of `target`.

    >>> to_state_dict({"layers": [1, (2, 3)]})
    {'layers': {'0': 1, '1': {'0': 2, '1': 3}}}
    """
    handler = _handler_of_value(target)
    if handler is None:
        return target
    state = handler.to(target)
    if isinstance(state, dict):
        assert all(isinstance(key, str) for key in state), "A state dict must only have string keys."
    return state


def from_state_dict(target: Any, state: Any, name: str = ".") -> Any:
    """A value like `target` that holds the values of `state`.

    Args:
        name: what `target` is called in messages.

    What `state` has beyond `target` is left out, and an array of another shape or kind is taken, both with a
    `StateMismatchWarning`.

    >>> from_state_dict({"layers": [0, 0]}, {"layers": {"0": 1, "1": 2}})
    {'layers': [1, 2]}

    Raises:
        ValueError: `state` lacks a part of `target`, or has another number of parts.
    """
    handler = _handler_of_value(target)
    with _named(name):
        if handler is None:
            check_fit(target, state, current_path(), "value")
            return state
        return handler.back(target, state)


def _handler_of_value(value: Any) -> Handler | None:
    handler = _handler_of(type(value))
    return _named_tuple if handler is None and isinstance(value, tuple) and hasattr(value, "_fields") else handler


@contextmanager
def _named(name: str) -> Iterator[None]:
    names = _restoring.__dict__.setdefault("names", [])
    names.append(name)
    try:
        yield
    finally:
        names.pop()


def current_path() -> str:
    """The path of what `from_state_dict` is restoring now, for messages."""
    return "/".join(_restoring.__dict__.get("names", ()))


# ---------------------------------------------------------------- how each type is written and read


class MismatchError(StructureError):
    """A state dict has another structure than what it was to be restored into."""

    def __init__(self, problem: str):
        super().__init__(problem, at=f"path {current_path()}")

    def _text(self) -> str:
        return f"{self.problem} at {self.path}"  # a path may be a dot: none follows it


def _parts(state: Any, of: Any) -> dict[str, Any]:
    """The state dict of a container.

    Raises:
        MismatchError: it is something else.
    """
    if not isinstance(state, dict | FrozenDict):
        raise MismatchError(
            f"A {type(of).__name__} can only be restored from a state dict, not from a {type(state).__name__},"
        )
    return dict(state)


def _dict_to(xs: Any) -> dict[str, Any]:
    state = {str(key): to_state_dict(x) for key, x in xs.items()}
    if len(state) < len(xs):
        raise StructureError("Two keys of a dict are the same text", got=list(xs))
    return state


def _dict_from(xs: Any, state: Any) -> dict[Any, Any]:
    parts = _parts(state, xs)
    missing = {str(key) for key in xs} - set(parts)
    if missing:
        raise MismatchError(
            "The target dict keys and state dict keys do not match, target dict contains keys "
            f"{missing} which are not present in state dict"
        )
    if unknown := sorted(set(parts) - {str(key) for key in xs}):
        warn(f"the state has parts at {current_path()} that the target lacks, and they are left out: "
             f"{', '.join(unknown[:8])}.\n  Fix: restore into a target that has them, or take them out of the state.",
             StateMismatchWarning)  # fmt: skip
    return {key: from_state_dict(x, parts[str(key)], name=str(key)) for key, x in xs.items()}


def _list_to(xs: Any) -> dict[str, Any]:
    return {str(i): to_state_dict(x) for i, x in enumerate(xs)}


def _list_from(xs: Any, state: Any) -> list[Any]:
    parts = _parts(state, xs)
    if set(parts) != {str(i) for i in range(len(xs))}:
        sizes = f"got {len(xs)} and {len(parts)}"
        raise MismatchError(f"The size of the list and the state dict do not match, {sizes}")
    return [from_state_dict(x, parts[str(i)], name=str(i)) for i, x in enumerate(xs)]


def _fields_from(xs: Any, parts: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: from_state_dict(getattr(xs, name), parts[name], name=name) for name in names}


def _named_tuple_from(xs: Any, state: Any) -> Any:
    parts = _parts(state, xs)
    if set(parts) == {"name", "fields", "values"}:  # how they were written long ago
        parts = {parts["fields"][i]: parts["values"][i] for i in parts["fields"]}
    if set(parts) != set(xs._fields):
        raise MismatchError(
            "The field names of the state dict and the named tuple do not match, "
            f"got {set(parts)} and {set(xs._fields)}"
        )
    return type(xs)(**_fields_from(xs, parts, xs._fields))


def _data_fields(x: Any) -> list[str]:
    return [f.name for f in fields(x) if f.metadata.get("pytree_node", True)]


def _dataclass_from(x: Any, state: Any) -> Any:
    parts, names, kind = _parts(state, x), _data_fields(x), type(x).__name__
    for name in names:
        if name not in parts:
            raise MismatchError(f"Missing field {name} in state dict while restoring an instance of {kind},")
    unknown = [name for name in parts if name not in names]
    if unknown:
        listed = ",".join(unknown)
        raise MismatchError(f'Unknown field(s) "{listed}" in state dict while restoring an instance of {kind}')
    return x.replace(**_fields_from(x, parts, names))


def _partial_from(x: jax.tree_util.Partial, state: Any) -> jax.tree_util.Partial:
    parts = _dict_from({"args": x.args, "keywords": x.keywords}, state)
    return jax.tree_util.Partial(x.func, *parts["args"], **parts["keywords"])


_dataclass = Handler(lambda x: {name: to_state_dict(getattr(x, name)) for name in _data_fields(x)}, _dataclass_from)
_named_tuple = Handler(lambda x: {name: to_state_dict(getattr(x, name)) for name in x._fields}, _named_tuple_from)
_handlers[dict] = Handler(_dict_to, _dict_from)
_handlers[list] = Handler(_list_to, _list_from)
_handlers[tuple] = Handler(_list_to, lambda xs, state: tuple(_list_from(xs, state)))
_handlers[FrozenDict] = Handler(_dict_to, lambda xs, state: FrozenDict(_dict_from(xs, state)))
_handlers[jax.tree_util.Partial] = Handler(
    lambda x: {"args": to_state_dict(x.args), "keywords": to_state_dict(x.keywords)}, _partial_from
)


# ---------------------------------------------------------------- bytes

ARRAY, COMPLEX, SCALAR = 1, 2, 3  # codes of the msgpack extensions
MAX_CHUNK_SIZE = 2**30  # bytes; msgpack holds less than 4 GiB in one piece
PIECES = "__msgpack_chunked_array__"


def _msgpack() -> Any:
    return need("msgpack", extra="checkpoint")


def to_bytes(target: Any) -> bytes:
    """The state dict of `target` as msgpack bytes, which Flax reads too.

    >>> from_bytes({"step": 0}, to_bytes({"step": 3}))
    {'step': 3}
    """
    return msgpack_serialize(to_state_dict(target), in_place=True)


def from_bytes(target: Any, encoded_bytes: bytes) -> Any:
    """A value like `target` that holds what `to_bytes` wrote; with `target=None`, the state dict.

    As in `from_state_dict`, arrays of another shape or kind and parts beyond the target's are told of, not refused.

    Raises:
        ValueError: the bytes are damaged, or hold another structure than `target`.
    """
    return from_state_dict(target, msgpack_restore(encoded_bytes))


def msgpack_serialize(pytree: Any, in_place: bool = False) -> bytes:
    """Nested dicts and lists of arrays and numbers as msgpack bytes.

    Args:
        in_place: the dicts of `pytree` may be changed, which saves a copy of them.

    Raises:
        TypeError: a value is of a type that has no msgpack form.
        ValueError: an array has a dtype that has none.
    """
    if not in_place:
        pytree = jax.tree.map(lambda x: x, pytree)
    return _msgpack().packb(_chunk_array_leaves_in_place(pytree), default=_msgpack_ext_pack, strict_types=True)


def _chunk_array_leaves_in_place(x: Any) -> Any:
    """`x` with arrays of NumPy, large ones in pieces; dicts are changed in place."""
    if type(x) is dict:
        for key, value in x.items():
            x[key] = _chunk_array_leaves_in_place(value)
        return x
    if isinstance(x, jax.Array):
        x = np.asarray(x)
    return _in_pieces(x) if isinstance(x, np.ndarray) and x.nbytes > MAX_CHUNK_SIZE else x


def _in_pieces(x: np.ndarray) -> dict[str, Any]:
    size = max(1, MAX_CHUNK_SIZE // x.itemsize)
    pieces = [x.reshape(-1)[start : start + size] for start in range(0, x.size, size)]
    return {PIECES: True, "shape": _list_to(x.shape), "chunks": _list_to(pieces)}


def _msgpack_ext_pack(x: Any) -> Any:
    msgpack = _msgpack()
    if isinstance(x, np.ndarray | jax.Array):
        return msgpack.ExtType(ARRAY, _array_bytes(np.asarray(x)))
    if isinstance(x, np.generic):
        return msgpack.ExtType(SCALAR, _array_bytes(np.asarray(x)))
    if isinstance(x, complex):
        return msgpack.ExtType(COMPLEX, msgpack.packb((x.real, x.imag)))
    raise DtypeError(
        f"can not serialize {type(x).__name__!r} object",
        fix="turn it into dicts, lists and arrays first, or register its type with register_serialization_state",
    )


def _array_bytes(x: np.ndarray) -> bytes:
    if x.dtype.byteorder == ">":
        x = x.astype(x.dtype.newbyteorder("="))
    if _dtype_called(x.dtype.name) != x.dtype:
        raise ArgumentError("Arrays of objects, records or text cannot be serialized", got=f"dtype {x.dtype}")
    return _msgpack().packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True)


def _dtype_called(name: str) -> np.dtype | None:
    """The dtype of numbers, booleans or dates that has this very name."""
    try:
        dtype = np.dtype(name)
    except TypeError:
        return None
    return dtype if dtype.name == name and not dtype.hasobject else None


def msgpack_restore(encoded_pytree: bytes) -> Any:
    """What `msgpack_serialize` wrote, with arrays of NumPy that cannot be written to.

    The data may come from anyone: nothing in it is run, and what is announced but not there takes no memory.

    Raises:
        ValueError: the data is cut short, damaged, or not of this format.
    """
    msgpack, size = _msgpack(), memoryview(encoded_pytree).nbytes
    try:
        reader = msgpack.Unpacker(max_buffer_size=max(1, size), strict_map_key=False)
        reader.feed(encoded_pytree)
        reader.skip()  # walks over everything, and stops where data is lacking, before anything is made of it
        del reader
        options = dict(ext_hook=_msgpack_ext_unpack, raw=False, strict_map_key=False)
        return _unchunk_array_leaves_in_place(msgpack.unpackb(encoded_pytree, **options))
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        what = str(error) or type(error).__name__
        raise ArgumentError(
            f"Unpack failed: incomplete input or damaged data in {size} bytes ({what})",
            fix="pass the whole of what msgpack_serialize or to_bytes returned",
        ) from error


def _msgpack_ext_unpack(code: int, data: bytes) -> Any:
    msgpack = _msgpack()
    if code == COMPLEX:
        real, imag = msgpack.unpackb(data)
        return complex(float(real), float(imag))
    if code not in (ARRAY, SCALAR):
        return msgpack.ExtType(code, data)
    shape, name, content = msgpack.unpackb(data)
    dtype = _dtype_called(name) if isinstance(name, str) and len(name) < 40 else None
    if dtype is None or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array of shape {shape!r:.99} and dtype {name!r:.99} with {len(content)} bytes")
    array = np.ndarray(shape, dtype, content)
    return array[()] if code == SCALAR else array


def _unchunk_array_leaves_in_place(x: Any) -> Any:
    """`x` with the pieces of large arrays put together; dicts are changed in place."""
    if not isinstance(x, dict):
        return x
    if PIECES not in x:
        for key, value in x.items():
            x[key] = _unchunk_array_leaves_in_place(value)
        return x
    try:
        shape, pieces = (_list_from([None] * len(x[part]), x[part]) for part in ("shape", "chunks"))
        return np.concatenate(pieces).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"an array in pieces of which some are lacking: {error!s:.99}") from error
