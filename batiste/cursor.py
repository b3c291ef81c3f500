# SPDX-License-Identifier: Apache-2.0
"""Cursors: changes deep inside immutable structures, written as if they could be changed in place.

A cursor stands on a dict, list, tuple, named tuple, dataclass or leaf. Reading an item or attribute gives a cursor on
it; writing one is noted; `build` gives the structure with everything noted, and leaves the original as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import operator
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from batiste.core.frozen_dict import FrozenDict
from batiste.errors import CursorFindError, TraverseTreeError

__all__ = ["AccessType", "Cursor", "Indexable", "ParentKey", "cursor", "is_named_tuple"]

A = TypeVar("A")
Key = Any


@runtime_checkable
class Indexable(Protocol):
    """What has items."""

    def __getitem__(self, key: Any) -> Any: ...


class AccessType(enum.Enum):
    """How a part is reached: `x[key]` or `x.key`."""

    ITEM = enum.auto()
    ATTR = enum.auto()


@dataclasses.dataclass
class ParentKey(Generic[A]):
    """Where a cursor stands: in which other cursor, under which key."""

    parent: Cursor[A]
    key: Key
    access_type: AccessType


def is_named_tuple(obj: Any) -> bool:
    """Whether this is a tuple with named fields."""
    return isinstance(obj, tuple) and hasattr(obj, "_fields") and hasattr(obj, "_asdict")


def cursor(obj: A) -> Cursor[A]:
    """A cursor on the whole of `obj`.

    >>> model = {"layers": [{"width": 8}, {"width": 16}], "name": "mlp"}
    >>> c = cursor(model)
    >>> c["layers"][1]["width"] += 4
    >>> c["name"] = "wide"
    >>> c.build()
    {'layers': [{'width': 8}, {'width': 20}], 'name': 'wide'}
    >>> model["name"]
    'mlp'
    """
    return Cursor(obj, None)


# ---------------------------------------------------------------- walking over a structure

Step = tuple[Key, AccessType]


def _parts(obj: Any) -> Iterator[tuple[Step, Any]]:
    """The parts of a container, each with the step to it."""
    if isinstance(obj, Mapping):
        yield from (((key, AccessType.ITEM), value) for key, value in obj.items())
    elif is_named_tuple(obj):
        yield from (((name, AccessType.ATTR), getattr(obj, name)) for name in obj._fields)
    elif isinstance(obj, list | tuple):
        yield from (((i, AccessType.ITEM), value) for i, value in enumerate(obj))
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        yield from (((f.name, AccessType.ATTR), getattr(obj, f.name)) for f in dataclasses.fields(obj))


def _traverse_tree(
    path: tuple[Step, ...],
    obj: Any,
    *,
    update_fn: Callable[[str, Any], Any] | None = None,
    cond_fn: Callable[[str, Any], bool] | None = None,
) -> Generator[Any, None, None]:
    """Yields `(path, new value)` of what `update_fn` replaces, or the paths of what `cond_fn` accepts.

    Both get the keys joined by "/" and the value. The parts of what was replaced or accepted are not visited.

    Raises:
        TraverseTreeError: both functions are given, or none.
    """
    if (update_fn is None) == (cond_fn is None):
        raise TraverseTreeError(update_fn, cond_fn)
    for step, value in _parts(obj):
        here = (*path, step)
        text = "/".join(str(key) for key, _ in here)
        if update_fn is not None:
            new = update_fn(text, value)
            if new is not value:
                yield here, new
                continue
        elif cond_fn is not None and cond_fn(text, value):
            yield here
            continue
        yield from _traverse_tree(here, value, update_fn=update_fn, cond_fn=cond_fn)


def _with_parts(obj: Any, changes: dict[Key, tuple[AccessType, Any]]) -> Any:
    """A copy of `obj` with some items or attributes replaced."""
    values = {key: value for key, (_, value) in changes.items()}
    if isinstance(obj, FrozenDict):
        return obj.copy(values)
    if is_named_tuple(obj):
        return obj._replace(**values)
    if isinstance(obj, tuple):
        return type(obj)(_with_parts(list(obj), changes))
    if dataclasses.is_dataclass(obj):
        return dataclasses.replace(obj, **values)  # pyright: ignore[reportArgumentType]
    if hasattr(obj, "at"):  # an array of JAX
        for key, value in values.items():
            obj = obj.at[key].set(value)
        return obj
    obj = copy.copy(obj)
    for key, (access, value) in changes.items():
        if access is AccessType.ITEM:
            obj[key] = value
        else:
            setattr(obj, key, value)
    return obj


# ---------------------------------------------------------------- the cursor


def _plain(x: Any) -> Any:
    return x._obj if isinstance(x, Cursor) else x


def _on_value(function: Callable[..., Any]) -> Any:
    """A method that is a function of the values that the cursor and its arguments stand on."""
    return lambda self, *args: function(self._obj, *map(_plain, args))


def _on_value_reflected(function: Callable[..., Any]) -> Any:
    return lambda self, other: function(other, self._obj)


class Cursor(Generic[A]):
    """A place in a structure, and the changes noted below it; made by `cursor`."""

    _obj: A
    _parent_key: ParentKey[Any] | None
    _changes: dict[Key, Cursor[Any]]

    def __init__(self, obj: A, parent_key: ParentKey[Any] | None):
        vars(self).update(_obj=obj, _parent_key=parent_key, _changes={}, _assigned=False)

    @property
    def _root(self) -> Cursor[Any]:
        return self if self._parent_key is None else self._parent_key.parent._root

    @property
    def _path(self) -> str:
        """How the place is written, such as `.params['mlp'][0]`."""
        if self._parent_key is None:
            return ""
        key = self._parent_key.key
        step = f"[{key!r}]" if self._parent_key.access_type is AccessType.ITEM else f".{key}"
        return self._parent_key.parent._path + step

    def _child(self, key: Key, access: AccessType, value: Callable[[], Any]) -> Cursor[Any]:
        if key not in self._changes:
            self._changes[key] = Cursor(value(), ParentKey(self, key, access))
        return self._changes[key]

    def _assign(self, key: Key, access: AccessType, value: Any) -> None:
        child = Cursor(value.build() if isinstance(value, Cursor) else value, ParentKey(self, key, access))
        vars(child).update(_assigned=True)
        self._changes[key] = child

    def __getitem__(self, key: Key) -> Cursor[Any]:
        if is_named_tuple(self._obj):
            return getattr(self, self._obj._fields[key])  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self._obj, Mapping) and key not in self._obj and key not in self._changes:
            raise KeyError(f"Key {key} not found in {self._obj}")
        return self._child(key, AccessType.ITEM, lambda: self._obj[key])  # pyright: ignore[reportIndexIssue]

    def __setitem__(self, key: Key, value: Any) -> None:
        if is_named_tuple(self._obj):
            return setattr(self, self._obj._fields[key], value)  # pyright: ignore[reportAttributeAccessIssue]
        self._assign(key, AccessType.ITEM, value)

    def __getattr__(self, name: str) -> Cursor[Any]:
        if name.startswith("__") or not hasattr(self._obj, name):
            raise AttributeError(f"Attribute {name} not found in {self._obj}")
        return self._child(name, AccessType.ATTR, lambda: getattr(self._obj, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(self._obj, name):
            raise AttributeError(f"Attribute {name} not found in {self._obj}")
        self._assign(name, AccessType.ATTR, value)

    def set(self, value: Any) -> Any:
        """The whole structure with `value` in this place, and everything else that was noted."""
        if self._parent_key is None:
            return value
        self._parent_key.parent._assign(self._parent_key.key, self._parent_key.access_type, value)
        return self._root.build()

    def build(self) -> A:
        """What the cursor stands on, with everything that was noted below it; if nothing was, the very same."""
        changes = {
            key: (child._parent_key.access_type, child.build())  # pyright: ignore[reportOptionalMemberAccess]
            for key, child in self._changes.items()
            if child._changed()
        }
        return _with_parts(self._obj, changes) if changes else self._obj

    def _changed(self) -> bool:
        return vars(self)["_assigned"] or any(child._changed() for child in self._changes.values())

    def apply_update(self, update_fn: Callable[[str, Any], Any]) -> Cursor[A]:
        """Notes `update_fn("path/of/part", part)` for every part, from the outside in; returns this cursor.

        What `update_fn` returns unchanged is not noted, and its parts are visited; the whole itself is not.

        >>> grow = cursor({"up": {"kernel": 1, "bias": 2}}).apply_update(lambda p, x: 10 * x if "kernel" in p else x)
        >>> grow.build()
        {'up': {'kernel': 10, 'bias': 2}}
        """
        for (*above, (key, access)), value in _traverse_tree((), self._obj, update_fn=update_fn):
            self._at(above)._assign(key, access, value)
        return self

    def find_all(self, cond_fn: Callable[[str, Any], bool]) -> Generator[Cursor[Any], None, None]:
        """Cursors on the outermost parts for which `cond_fn("path/of/part", part)` is true."""
        yield from (self._at(path) for path in _traverse_tree((), self._obj, cond_fn=cond_fn))

    def find(self, cond_fn: Callable[[str, Any], bool]) -> Cursor[Any]:
        """The cursor on the one part for which `cond_fn("path/of/part", part)` is true.

        Raises:
            CursorFindError: there is none, or more than one.
        """
        found = self.find_all(cond_fn)
        first, second = next(found, None), next(found, None)
        if first is None or second is not None:
            raise CursorFindError(first, second)
        return first

    def _at(self, path: Any) -> Cursor[Any]:
        place = self
        for key, access in path:
            place = place[key] if access is AccessType.ITEM else getattr(place, key)
        return place

    def __iter__(self) -> Iterator[Cursor[Any]]:
        return iter(self._items("__iter__"))

    def __reversed__(self) -> Iterator[Cursor[Any]]:
        return reversed(self._items("__reversed__"))

    def _items(self, method: str) -> list[Cursor[Any]]:
        if not isinstance(self._obj, list | tuple):
            raise NotImplementedError(
                f"{method} method only implemented for tuples and lists, not type {type(self._obj)}"
            )
        return [self[i] for i in range(len(self._obj))]

    def __str__(self) -> str:
        return str(self._obj)

    def __repr__(self) -> str:
        return self._pretty_repr()

    def _pretty_repr(self, indent: int = 2, _prefix_indent: int = 0) -> str:
        def line(depth: int, text: str) -> str:
            return " " * (_prefix_indent + depth * indent) + text

        changes = "{}"
        if self._changes:
            names = {key: " " * (2 * indent) + f"{key!r}: " for key in self._changes}
            texts = [
                " " * _prefix_indent + name + self._changes[key]._pretty_repr(indent, _prefix_indent + len(name))
                for key, name in names.items()
            ]
            changes = "{\n" + ",\n".join(texts) + "\n" + line(1, "}")
        obj = repr(self._obj).replace("\n", "\n" + line(1, ""))
        return f"Cursor(\n{line(1, f'_obj={obj}')},\n{line(1, f'_changes={changes}')}\n{line(0, ')')}"

    __hash__ = None  # pyright: ignore[reportAssignmentType]
    __len__, __bool__, __contains__ = _on_value(len), _on_value(bool), _on_value(operator.contains)
    __eq__, __ne__ = _on_value(operator.eq), _on_value(operator.ne)
    __lt__, __le__ = _on_value(operator.lt), _on_value(operator.le)
    __gt__, __ge__ = _on_value(operator.gt), _on_value(operator.ge)
    __pos__, __neg__, __invert__ = _on_value(operator.pos), _on_value(operator.neg), _on_value(operator.invert)
    __abs__, __round__ = _on_value(abs), _on_value(round)
    __add__, __radd__ = _on_value(operator.add), _on_value_reflected(operator.add)
    __sub__, __rsub__ = _on_value(operator.sub), _on_value_reflected(operator.sub)
    __mul__, __rmul__ = _on_value(operator.mul), _on_value_reflected(operator.mul)
    __matmul__, __rmatmul__ = _on_value(operator.matmul), _on_value_reflected(operator.matmul)
    __truediv__, __rtruediv__ = _on_value(operator.truediv), _on_value_reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _on_value(operator.floordiv), _on_value_reflected(operator.floordiv)
    __mod__, __rmod__ = _on_value(operator.mod), _on_value_reflected(operator.mod)
    __divmod__, __rdivmod__ = _on_value(divmod), _on_value_reflected(divmod)
    __pow__, __rpow__ = _on_value(pow), _on_value_reflected(pow)
    __lshift__, __rlshift__ = _on_value(operator.lshift), _on_value_reflected(operator.lshift)
    __rshift__, __rrshift__ = _on_value(operator.rshift), _on_value_reflected(operator.rshift)
    __and__, __rand__ = _on_value(operator.and_), _on_value_reflected(operator.and_)
    __or__, __ror__ = _on_value(operator.or_), _on_value_reflected(operator.or_)
    __xor__, __rxor__ = _on_value(operator.xor), _on_value_reflected(operator.xor)
