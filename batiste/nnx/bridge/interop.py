# SPDX-License-Identifier: Apache-2.0
"""Linen modules, and modules of the object face, as parts of a bridge module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from batiste import linen
from batiste.graph import Rngs
from batiste.graph.errors import ArgumentError
from batiste.graph.module import Module

from . import module as bridge_module
from .wrappers import ToNNX

M = TypeVar("M", bound=Module)


def nnx_in_bridge_mdl(factory: Callable[[Rngs], M], name: str | None = None) -> M:
    """The object that `factory(rngs)` makes, as a part of the bridge module that is running.

    In a compact method it becomes the attribute `name`, made up from its class where that is None; in `setup` it
    becomes the attribute it is assigned to.

    Raises:
        ArgumentError: no bridge module is running.
    """
    around = _around("nnx_in_bridge_mdl")
    scope = around.module.scope
    if around.module.is_initializing():
        return _placed(around, factory(scope.rngs), name)  # type: ignore[union-attr]
    rngs = Rngs(0)  # for what is drawn only to be replaced
    for key, stream in scope.rngs.items():  # type: ignore[union-attr]
        setattr(rngs, key, stream)
    return _placed(around, factory(rngs), name)


def linen_in_bridge_mdl(linen_module: linen.Module, name: str | None = None) -> ToNNX:
    """A Linen module as a part of the bridge module that is running; see `nnx_in_bridge_mdl`.

    Raises:
        ArgumentError: no bridge module is running.
    """
    around = _around("linen_in_bridge_mdl")
    node = ToNNX(linen_module, rngs=around.module.scope.rngs)  # type: ignore[union-attr]
    return _placed(around, node, name, type(linen_module))


def _around(function: str) -> bridge_module.ModuleStackEntry:
    around = bridge_module.current_context()
    if around is None:
        raise ArgumentError(f"{function}() only needed inside bridge Module",
                            fix="elsewhere assign the module, or a ToNNX of it, to an attribute")  # fmt: skip
    return around


def _placed(around: bridge_module.ModuleStackEntry, node: Any, name: str | None, kind: type | None = None) -> Any:
    if around.in_compact and not isinstance(node, bridge_module.Module):  # those find their place by themselves
        name = bridge_module._auto_submodule_name(around, kind or type(node)) if name is None else name
        around.module.set_attr_priority(name, bridge_module.AttrPriority.INIT_PARENT)
        setattr(around.module, name, node)
    return node
