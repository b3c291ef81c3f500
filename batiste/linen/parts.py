# SPDX-License-Identifier: Apache-2.0
"""A module as a part of another: its name, its parent and its scope, how it gets them, and copies without them.

A module that is made inside a method of another has that one as its parent from the start. One that was made outside
and comes in through a field, or is set as an attribute in `setup`, is *adopted*: a copy of it is attached under the
name of the attribute, followed by the way to it (`layers_0`, `heads_left`).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

from batiste.core.frozen_dict import FrozenDict
from batiste.errors import AssignSubModuleError, CallShareScopeOnUnboundModuleError, NameInUseError
from batiste.graph.config import config
from batiste.graph.errors import ArgumentError

from .context import running
from .scope import Scope


class Unspecified:
    """The type of the default of `parent`: the module that is being called."""

    def __repr__(self) -> str:
        return "unspecified"

    def __reduce__(self) -> str:
        return "unspecified"  # copies are the one object


unspecified = Unspecified()


@dataclasses.dataclass
class _State:
    """What a module remembers beside its settings."""

    in_setup: bool = False
    compact_depth: int = 0
    setup_called: bool = False
    names_made: dict[str, int] = dataclasses.field(default_factory=dict)
    names_taken: set[str] = dataclasses.field(default_factory=set)  # by the last run of the compact method
    children: dict[str, Any] = dataclasses.field(default_factory=dict)
    adopted: dict[int, tuple[Part, weakref.ref[Part]]] = dataclasses.field(default_factory=dict)  # shared by a binding


class Part:
    """A dataclass of settings that can stand under a parent."""

    name: str | None
    scope: Scope | None = None
    _state: _State

    @property
    def parent(self) -> Any:
        """A module, a scope or None. A part does not keep its parent alive: a model is freed when a call is over."""
        parent = vars(self).get("parent")
        return parent() if isinstance(parent, weakref.ref) else parent

    @parent.setter
    def parent(self, parent: Any) -> None:
        vars(self)["parent"] = weakref.ref(parent) if isinstance(parent, Part) else parent

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        parent = running.modules[-1] if isinstance(self.parent, Unspecified) else self.parent
        put("parent", parent)
        put("_state", _State())
        if parent is None:
            return
        if isinstance(parent, Scope):
            put("scope", parent)
            self._adopt_fields()
        elif isinstance(parent, Part):
            if not parent._initialization_allowed:
                raise AssignSubModuleError(type(self).__name__)
            if self.name is None and parent._state.compact_depth:
                kind = type(self).__name__
                number = parent._state.names_made.get(kind, 0)
                parent._state.names_made[kind] = number + 1
                put("name", f"{kind}_{number}")
            if self.name is not None:
                self._attach(parent, self.name)
        else:
            raise ArgumentError("parent must be None, Module or Scope", got=type(parent).__name__,
                                fix="leave it out: a module finds its parent by itself")  # fmt: skip

    @property
    def _initialization_allowed(self) -> bool:
        return self._state.in_setup or self._state.compact_depth > 0

    def _attach(self, parent: Part, name: str) -> None:
        """Becomes the part `name` of `parent`, with the scope of that name."""
        put = functools.partial(object.__setattr__, self)
        put("name", name)
        put("parent", parent)
        self._state.adopted = parent._state.adopted
        if parent.scope is not None:
            if parent.scope.name_reserved(name):
                raise NameInUseError("submodule", name, type(parent).__name__)
            put("scope", parent.scope.push(name))
        parent._state.children[name] = self
        if self.scope is not None:
            self._adopt_fields()

    def _adopt_fields(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = vars(self).get(field.name)
            if field.name not in ("parent", "name") and _may_hold_modules(value):
                object.__setattr__(self, field.name, self._adopt(field.name, value))

    def _adopt(self, name: str, value: Any) -> Any:
        """`value` with the modules in it attached to this one; containers become immutable."""
        return map_modules(self._adopt_module, value, name, seal=True)

    def _adopt_module(self, module: Part, name: str) -> Part:
        if module.parent is None and module.scope is None:  # made outside: a copy joins, one wherever it is met
            _, known = self._state.adopted.get(id(module), (None, lambda: None))
            known = known()
            if known is None:
                keeps = getattr(type(self), "preserve_adopted_names", config.flax_preserve_adopted_names)
                name = module.name if keeps and module.name is not None else name
                known = module.clone(parent=None, name=name)
                self._state.adopted[id(module)] = (module, weakref.ref(known))
                known._attach(self, name)
            return known
        if module.name is None and module.scope is None:  # made in `setup`
            module._attach(self, name)
        return module

    # ------------------------------------------------------------ copies
    def clone(
        self, *, parent: Any = None, _deep_clone: Any = False, _reset_names: bool = False, **updates: Any
    ) -> Self:
        """The same module with other settings, unbound or under another parent."""
        copies: dict[int, Part] = {}

        def unbound(module: Part, name: str) -> Part:
            if module.parent is None and module.scope is None:
                return module
            if id(module) not in copies:
                copies[id(module)] = module.clone(name=None, _reset_names=_reset_names)
            return copies[id(module)]

        settings = {f.name: vars(self)[f.name] for f in dataclasses.fields(self)  # type: ignore[arg-type]
                    if f.init and f.name != "parent"}  # fmt: skip
        if not isinstance(parent, (Part, Unspecified)):
            settings = {name: map_modules(unbound, value) for name, value in settings.items()}
        if _reset_names:
            settings["name"] = None
        return type(self)(**{**settings, **updates, "parent": parent})

    def copy(self, *, parent: Any = unspecified, name: str | None = None, **updates: Any) -> Self:
        """A copy under the module that is being called, with other settings."""
        return self.clone(parent=parent, name=name, **updates)


# ---------------------------------------------------------------- modules in containers
def map_modules(f: Callable[[Any, str], Any], value: Any, name: str = "", seal: bool = False, of: Any = Part) -> Any:
    """`value` with f(module, name) in the place of each module in it: itself, or in containers and struct dataclasses.

    Args:
        name: of `value`; what is in a container is called after it and its place.
        seal: lists become tuples and dicts `FrozenDict`s.
        of: the types that are looked for.
    """
    if isinstance(value, of):
        return f(value, name)
    if not _may_hold_modules(value):
        return value
    old = _items(value)
    new = {key: map_modules(f, x, f"{name}_{key}", seal, of) for key, x in old.items()}
    changed = any(new[key] is not x for key, x in old.items()) or (seal and isinstance(value, (list, Mapping)))
    return _rebuilder(value, seal)(new) if changed else value


def _rebuilder(value: Any, seal: bool) -> Callable[..., Any]:
    if isinstance(value, Mapping):
        return FrozenDict if seal else type(value)
    if isinstance(value, (list, tuple)):
        return _sequence(type(value) if hasattr(value, "_fields") or not seal else tuple)
    return functools.partial(_replaced, value)


def _may_hold_modules(value: Any) -> bool:
    return isinstance(value, (Part, list, tuple, dict, FrozenDict)) or hasattr(type(value), "_flax_dataclass")


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, (list, tuple)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value))
    if isinstance(value, Mapping):
        return dict(value)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)
            if f.init and f.metadata.get("pytree_node", True)}  # fmt: skip


def _sequence(of: Callable[..., Any]) -> Callable[[dict[Any, Any]], Any]:
    return lambda items: of(**items) if hasattr(of, "_fields") else of(items.values())


def _replaced(value: Any, items: dict[str, Any]) -> Any:
    return dataclasses.replace(value, **items)


# ---------------------------------------------------------------- one scope for two
def share_scope(module: Part, other: Part, /) -> None:
    """Lets two modules keep their variables in one scope: in that of `other`, unless it is a part of `module`.

    Raises:
        CallShareScopeOnUnboundModuleError: `module` is unbound.
    """
    if module.scope is None:
        raise CallShareScopeOnUnboundModuleError
    moved, target = other, module.scope
    if other.scope is not None and other.scope.path[: len(module.scope.path)] != module.scope.path:
        moved, target = module, other.scope
    if moved.scope is target:
        return
    old, above = moved.scope, getattr(moved.parent, "scope", None)
    if old is not None and above is not None and above.children.get(old.name) is old:
        del above.children[old.name]
        above.reserved.pop(old.name, None)
    _move(moved, target)


def _move(module: Part, scope: Scope) -> None:
    """Puts a module, and the parts that it has, into another scope."""
    object.__setattr__(module, "scope", scope)
    for name, child in module._state.children.items():
        _move(child, scope.push(name))
