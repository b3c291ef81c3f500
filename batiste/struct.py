# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses that are JAX pytrees: fields are children, except those declared with `pytree_node=False`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform, overload

import jax

__all__ = ["PyTreeNode", "dataclass", "field"]

T = TypeVar("T", bound=type)


def field(pytree_node: bool = True, *, metadata: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """A dataclass field; `pytree_node=False` makes it static: hashed and compared by JAX, never traced.

    `kwargs` are those of `dataclasses.field`.
    """
    return dataclasses.field(metadata={**(metadata or {}), "pytree_node": pytree_node}, **kwargs)


@overload
def dataclass(clz: T, **kwargs: Any) -> T: ...


@overload
def dataclass(clz: None = None, **kwargs: Any) -> Callable[[T], T]: ...


@dataclass_transform(field_specifiers=(field,))
def dataclass(clz=None, **kwargs):
    """Makes `clz` a frozen dataclass with a method `replace`, and a JAX pytree.

    `kwargs` are those of `dataclasses.dataclass`; `frozen` is True unless given.

    >>> @dataclass
    ... class Line:
    ...     slope: float
    ...     unit: str = field(pytree_node=False, default="m")
    >>> line = Line(2.0).replace(unit="km")
    >>> jax.tree.map(lambda x: 10 * x, line)
    Line(slope=20.0, unit='km')
    """
    if clz is None:
        return lambda clz: dataclass(clz, **kwargs)
    if "_flax_dataclass" in vars(clz):  # a subclass inherits the mark, but is not a dataclass yet
        return clz
    clz = dataclasses.dataclass(**{"frozen": True, **kwargs})(clz)
    names: dict[bool, list[str]] = {True: [], False: []}
    for f in dataclasses.fields(clz):
        names[bool(f.metadata.get("pytree_node", True))].append(f.name)
    jax.tree_util.register_dataclass(clz, data_fields=names[True], meta_fields=names[False])
    clz.replace = _replace
    clz._flax_dataclass = True
    return clz


def _replace(self, **updates):
    """A copy with the given fields changed."""
    return dataclasses.replace(self, **updates)


_replace.__name__ = "replace"


@dataclass_transform(field_specifiers=(field,))
class PyTreeNode:
    """Base class whose subclasses are made by `dataclass`; its keywords go behind the bases.

    >>> class Point(PyTreeNode, kw_only=True):
    ...     x: float
    ...     y: float = 0.0
    >>> jax.tree.leaves(Point(x=1.0))
    [1.0, 0.0]
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__()  # for Generic among the bases
        dataclass(cls, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError("PyTreeNode has no fields: make a subclass that declares them.")

    def replace(self, **updates: Any):
        """A copy with the given fields changed."""
        return _replace(self, **updates)
