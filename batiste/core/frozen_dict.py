# SPDX-License-Identifier: Apache-2.0
"""FrozenDict: an immutable nested mapping that is a JAX pytree, and functions of dicts and FrozenDicts alike."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, KeysView, Mapping, ValuesView
from typing import Any, TypeVar

import jax

K = TypeVar("K")
V = TypeVar("V")


class FrozenKeysView(KeysView):
    """The keys of a FrozenDict."""

    def __repr__(self):
        return f"frozen_dict_keys({list(self)!r})"


class FrozenValuesView(ValuesView):
    """The values of a FrozenDict."""

    def __repr__(self):
        return f"frozen_dict_values({list(self)!r})"


def _plain(x: Any) -> Any:
    """Nested dicts, copied; other values as they are."""
    if isinstance(x, FrozenDict):
        x = x._dict
    return {k: _plain(v) for k, v in x.items()} if isinstance(x, dict) else x


def _copied(x: Any) -> Any:
    """The same leaves in new containers."""
    return jax.tree.map(lambda leaf: leaf, x)


class FrozenDict(Mapping[K, V]):
    """An immutable mapping; nested mappings in it are FrozenDicts too when they are read.

    >>> d = FrozenDict({"a": {"b": 1}})
    >>> d["a"]["b"], d.copy({"c": 2})["c"]
    (1, 2)
    """

    __slots__ = ("_dict", "_hash")

    def __init__(self, *args, __unsafe_skip_copy__: bool = False, **kwargs):
        given = dict(*args, **kwargs)
        self._dict: dict = given if __unsafe_skip_copy__ else _plain(given)
        self._hash: int | None = None

    def __getitem__(self, key: K) -> Any:
        value = self._dict[key]
        return FrozenDict(value, __unsafe_skip_copy__=True) if isinstance(value, dict) else value

    def __setitem__(self, key, value):
        raise ValueError("FrozenDict is immutable: make a changed copy with d.copy({...}).")

    def __delitem__(self, key):
        raise AttributeError("FrozenDict is immutable: d.pop(key) gives the rest and the value.")

    def __contains__(self, key) -> bool:
        return key in self._dict

    def __iter__(self):
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __eq__(self, other):
        if isinstance(other, FrozenDict):
            return self._dict == other._dict
        return self._dict == _plain(other) if isinstance(other, Mapping) else NotImplemented

    def __hash__(self):
        if self._hash is None:
            self._hash = hash(frozenset((k, self[k]) for k in self._dict))
        return self._hash

    def __repr__(self):
        return self.pretty_repr()

    def __reduce__(self):
        return FrozenDict, (self.unfreeze(),)

    def keys(self) -> FrozenKeysView:
        return FrozenKeysView(self)

    def values(self) -> FrozenValuesView:
        return FrozenValuesView(self)

    def items(self) -> Iterator[tuple[K, Any]]:
        """Pairs, each read once: an iterator, not a view."""
        return ((key, self[key]) for key in self._dict)

    def pretty_repr(self, num_spaces: int = 4) -> str:
        """A text with one item per line."""
        return f"FrozenDict({_indented(self._dict, num_spaces)})"

    def copy(self, add_or_replace: Mapping[K, V] = {}) -> FrozenDict[K, V]:
        """A new FrozenDict with more or other items."""
        return type(self)({**self, **unfreeze(add_or_replace)})

    def pop(self, key: K) -> tuple[FrozenDict[K, V], V]:
        """`(the rest, the value)`."""
        rest = dict(self._dict)
        value = self[key]
        del rest[key]
        return type(self)(rest), value

    def unfreeze(self) -> dict[K, V]:
        """A nested dict, copied."""
        return unfreeze(self)

    def tree_flatten_with_keys(self):
        keys = sorted(self._dict)
        return tuple((jax.tree_util.DictKey(k), self._dict[k]) for k in keys), tuple(keys)

    @classmethod
    def tree_unflatten(cls, keys, values):
        return cls(dict(zip(keys, values)), __unsafe_skip_copy__=True)


jax.tree_util.register_pytree_with_keys(
    FrozenDict, FrozenDict.tree_flatten_with_keys, FrozenDict.tree_unflatten,
    lambda d: ([d._dict[k] for k in sorted(d._dict)], tuple(sorted(d._dict))),
)  # fmt: skip


def freeze(xs: Mapping[Any, Any]) -> FrozenDict[Any, Any]:
    """A nested mapping, immutable."""
    return FrozenDict(xs)


def unfreeze(x: Any) -> dict[Any, Any]:
    """A nested dict that can be changed: containers are copied, keys sorted as JAX sorts them."""
    return _copied(_plain(x)) if isinstance(x, FrozenDict | dict) else x


def copy(x: Any, add_or_replace: Mapping[Any, Any] = {}) -> Any:
    """`x` with more or other items; a dict stays a dict, a FrozenDict stays one.

    Raises:
        TypeError: `x` is neither.
    """
    if isinstance(x, FrozenDict):
        return x.copy(add_or_replace)
    if isinstance(x, dict):
        return {**_copied(x), **add_or_replace}
    raise TypeError(f"Expected FrozenDict or dict, got {type(x)}")


def pop(x: Any, key: Any) -> tuple[Any, Any]:
    """`(the rest, the value)` of a dict or FrozenDict.

    Raises:
        TypeError: `x` is neither.
    """
    if isinstance(x, FrozenDict):
        return x.pop(key)
    if isinstance(x, dict):
        rest = _copied(x)
        return rest, rest.pop(key)
    raise TypeError(f"Expected FrozenDict or dict, got {type(x)}")


def pretty_repr(x: Any, num_spaces: int = 4) -> str:
    """A text with one item per line; of what is no dict, its repr.

    >>> print(pretty_repr({"up": {"bias": 0}}, num_spaces=2))
    {
      up: {
        bias: 0,
      },
    }
    """
    return x.pretty_repr(num_spaces) if isinstance(x, FrozenDict) else _indented(x, num_spaces)


def _indented(x: Any, num_spaces: int) -> str:
    if not isinstance(x, dict):
        return repr(x)
    items = "".join(f"{key}: {_indented(value, num_spaces)},\n" for key, value in x.items())
    return "{\n" + textwrap.indent(items, " " * num_spaces) + "}" if x else "{}"
