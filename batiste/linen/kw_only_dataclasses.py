# SPDX-License-Identifier: Apache-2.0
"""Dataclasses whose keyword-only fields come last, and may be added from outside."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, field
from typing import Any, TypeVar

from batiste.graph.errors import ArgumentError

__all__ = ["KW_ONLY", "dataclass", "field"]

M = TypeVar("M", bound=type)


def dataclass(
    cls: type | None = None, extra_fields: Iterable[tuple[str, Any, Any]] | None = None, **kwargs: Any
) -> Any:
    """`dataclasses.dataclass`, with keyword-only fields after all others, also those of base classes.

    A field that is keyword-only in a base class is so in subclasses that give it another default.

    Args:
        extra_fields: (name, type, default or field) of more fields.
        kwargs: of `dataclasses.dataclass`.

    Raises:
        ArgumentError: a keyword-only field has no default.

    >>> @dataclass
    ... class Base:
    ...     name: str = field(default="x", kw_only=True)
    >>> @dataclass
    ... class Child(Base):
    ...     size: int
    >>> Child(3), [f.name for f in dataclasses.fields(Child)]
    (Child(name='x', size=3), ['size', 'name'])
    """
    make: Callable[[type], type] = lambda cls: _made(cls, tuple(extra_fields or ()), kwargs)
    return make if cls is None else make(cls)


def _made(cls: type, extra: tuple[tuple[str, Any, Any], ...], options: dict[str, Any]) -> type:
    cls.__annotations__ = {**inspect.get_annotations(cls), **{name: kind for name, kind, _ in extra}}
    for name, _, default in extra:
        setattr(cls, name, default)
    for base in cls.__mro__[1:]:  # what is keyword-only in a base stays so
        for name, old in getattr(base, "__dataclass_fields__", {}).items():
            if old.kw_only and name in cls.__annotations__:
                own = vars(cls).get(name, old.default)
                own = own if isinstance(own, dataclasses.Field) else field(default=own)
                own.kw_only = True
                setattr(cls, name, own)
    made = dataclasses.dataclass(**options)(cls)
    fields = made.__dataclass_fields__  # type: ignore[attr-defined]
    last = [name for name, f in fields.items() if f.kw_only]
    for name in last:
        if fields[name].default is dataclasses.MISSING and fields[name].default_factory is dataclasses.MISSING:
            raise ArgumentError("Keyword-only fields with no default are not supported", at=cls.__name__, got=name,
                                fix="give the field a default")  # fmt: skip
        fields[name] = fields.pop(name)
    return made
