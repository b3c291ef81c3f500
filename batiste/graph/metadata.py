# SPDX-License-Identifier: Apache-2.0
"""What a Variable knows beside its value: metadata, hooks among them, and a form of it to compare and hash."""

from __future__ import annotations

import dataclasses
import operator
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

A = TypeVar("A")

REQUIRED = frozenset({"hijax", "ref", "eager_sharding"})
HOOKS = ("on_get_value", "on_set_value", "on_create_value", "on_add_axis", "on_remove_axis")
_RENAMED = ("sharding", "sharding_names")


@dataclasses.dataclass
class VariableMetadata(Generic[A]):
    """A value with metadata, before it becomes a Variable: what an initialiser under `with_metadata` returns."""

    raw_value: A
    on_set_value: tuple | Callable = ()
    on_get_value: tuple | Callable = ()
    on_create_value: tuple | Callable = ()
    on_add_axis: tuple | Callable = ()
    on_remove_axis: tuple | Callable = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def all_metadata(self) -> dict[str, Any]:
        """The metadata with the hooks that are set, each a callable or a tuple of callables."""
        hooks = {name: getattr(self, name) for name in HOOKS}
        return {**self.metadata, **{name: hook for name, hook in hooks.items() if hook}}


def rename_sharding(metadata: dict[str, Any]) -> None:
    """Moves what stands under an old name of `out_sharding`, and warns whoever made the Variable."""
    for name in _RENAMED:
        if name in metadata:
            warnings.warn(f"'{name}' is deprecated, use 'out_sharding' instead.", DeprecationWarning, stacklevel=4)
            metadata["out_sharding"] = metadata.pop(name)


def class_hooks(cls: type) -> dict[str, Any]:
    """The hooks that a Variable type defines as methods."""
    hooks = _hooks_of.get(cls)
    if hooks is None:
        hooks = _hooks_of[cls] = {name: getattr(cls, name) for name in HOOKS if hasattr(cls, name)}
    return hooks


_hooks_of: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def as_tuple(hooks: Any) -> tuple:
    """One hook, several or none, as a tuple."""
    return tuple(hooks) if isinstance(hooks, (tuple, list)) else (hooks,) if hooks else ()


def run_hooks(hooks: Any, variable: Any, value: Any) -> Any:
    """The value after one hook, or after each of several."""
    for hook in as_tuple(hooks):
        value = hook(variable, value)
    return value


# ---------------------------------------------------------------- metadata that can be compared and hashed
class Frozen:
    """The metadata of a Variable as a part of a structure: compared by value, hashed when first asked."""

    __slots__ = ("items", "_hash")

    def __init__(self, metadata: dict[str, Any]):
        self.items = tuple(sorted(metadata.items(), key=_first))
        self._hash: int | None = None

    def __hash__(self):
        if self._hash is None:
            self._hash = hash(self.items)
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, Frozen) and self.items == other.items)

    def __repr__(self):
        return f"Frozen({dict(self.items)})"


_first = operator.itemgetter(0)
_common: dict[tuple, Frozen] = {}


def frozen_metadata(variable: Any) -> Frozen:
    """The Variable's metadata in comparable form; plain Variables all share one object."""
    frozen = variable._frozen
    if frozen is None:
        metadata = variable._var_metadata
        frozen = Frozen(metadata)
        if len(metadata) == len(REQUIRED):
            frozen = _common.setdefault(frozen.items, frozen)
        object.__setattr__(variable, "_frozen", frozen)
    return frozen
