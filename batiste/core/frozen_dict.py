# SPDX-License-Identifier: Apache-2.0
"""FrozenDict: an immutable nested mapping that is a JAX pytree, and functions that work on dicts and FrozenDicts alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax

K = TypeVar("K")
V = TypeVar("V")


def _plain(x: Any) -> Any:
    """Nested dicts, copied; other values as they are."""
    if isinstance(x, FrozenDict):
        x = x._dict
    return {k: _plain(v) for k, v in x.items()} if isinstance(x, dict) else x


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

    def __contains__(self, key) -> bool:
        return key in self._dict

    def __iter__(self):
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __eq__(self, other):
        if isinstance(other, FrozenDict):
            return self._dict == other._dict
        return NotImplemented

    def __hash__(self):
        if self._hash is None:
            self._hash = hash(frozenset((k, self[k]) for k in self._dict))
        return self._hash

    def __repr__(self):
        return self.pretty_repr()

    def __reduce__(self):
        return FrozenDict, (self.unfreeze(),)

    def items(self):
        for key in self._dict:
            yield key, self[key]

    def pretty_repr(self, num_spaces: int = 4) -> str:
        """A text with one item per line."""

        def text(x: Any, depth: int) -> str:
            if not isinstance(x, dict):
                return repr(x)
            pad = " " * num_spaces * (depth + 1)
            return "{\n" + "".join(f"{pad}{k!r}: {text(v, depth + 1)},\n" for k, v in x.items()) + " " * num_spaces * depth + "}"

        return f"FrozenDict({text(self._dict, 0)})" if self._dict else "FrozenDict({})"

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
        return _plain(self)

    def tree_flatten_with_keys(self):
        keys = sorted(self._dict)
        return [(jax.tree_util.DictKey(k), self._dict[k]) for k in keys], tuple(keys)

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
    """A nested dict that can be changed, copied."""
    return _plain(x) if isinstance(x, (FrozenDict, dict)) else x


def copy(x: Any, add_or_replace: Mapping[Any, Any] = {}) -> Any:
    """`x` with more or other items; a dict stays a dict, a FrozenDict stays one.

    Raises:
        TypeError: `x` is neither.
    """
    if isinstance(x, FrozenDict):
        return x.copy(add_or_replace)
    if isinstance(x, dict):
        return {**_plain(x), **add_or_replace}
    raise TypeError(f"Expected FrozenDict or dict, got {type(x)}")


def pop(x: Any, key: Any) -> tuple[Any, Any]:
    """`(the rest, the value)` of a dict or FrozenDict.

    Raises:
        TypeError: `x` is neither.
    """
    if isinstance(x, FrozenDict):
        return x.pop(key)
    if isinstance(x, dict):
        rest = _plain(x)
        return rest, rest.pop(key)
    raise TypeError(f"Expected FrozenDict or dict, got {type(x)}")


def pretty_repr(x: Any, num_spaces: int = 4) -> str:
    """A text with one item per line.

    Raises:
        TypeError: `x` is neither a dict nor a FrozenDict.
    """
    if isinstance(x, (FrozenDict, dict)):
        text = FrozenDict(x).pretty_repr(num_spaces)
        return text if isinstance(x, FrozenDict) else text[len("FrozenDict(") : -1]
    raise TypeError(f"Expected FrozenDict or dict, got {type(x)}")
