# SPDX-License-Identifier: Apache-2.0
"""What holds the value of a new Variable: the Variable itself, a `jax.Ref`, or a hijax box. Here are the defaults."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

from .config import config

F = TypeVar("F", bound=Callable[..., Any])


class VarDefaults(Mapping[str, bool]):
    """The defaults of `hijax=` and `ref=` of new Variables: a mapping with these two keys, which are attributes too."""

    __slots__ = ("hijax", "ref")

    def __init__(self, *, hijax: bool, ref: bool):
        self.hijax, self.ref = hijax, ref

    def __getitem__(self, key: str) -> bool:
        if key not in self.__slots__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__slots__)

    def __len__(self) -> int:
        return len(self.__slots__)

    def __repr__(self) -> str:
        return f"VarDefaults(hijax={self.hijax}, ref={self.ref})"


class _Here(threading.local):
    """What this thread has set the defaults to."""

    value: VarDefaults | None = None


_here = _Here()


def current_defaults() -> VarDefaults:
    """What holds here and now."""
    return _here.value or VarDefaults(hijax=config.flax_hijax_variable, ref=False)


class VarDefaultsContext:
    """Defaults that hold from now on, until the end of its `with`, or for the calls of the function it decorates."""

    def __init__(self, changes: dict[str, bool]):
        self._before, self._changes = _here.value, changes
        self._set()

    def _set(self) -> None:
        _here.value = VarDefaults(**{**current_defaults(), **self._changes})

    def __enter__(self) -> Self:
        self._set()
        return self

    def __exit__(self, *exception: object) -> None:
        _here.value = self._before

    def __call__(self, f: F) -> F:
        _here.value = self._before  # only the calls of `f` are meant

        @functools.wraps(f)
        def with_defaults(*args: Any, **kwargs: Any) -> Any:
            with VarDefaultsContext(self._changes):
                return f(*args, **kwargs)

        return with_defaults  # type: ignore[return-value]


def var_defaults(*, hijax: bool | None = None, ref: bool | None = None) -> VarDefaultsContext | VarDefaults:
    """The defaults of `hijax=` and `ref=` of new Variables; an argument sets them: at once, for a block or a function.

    >>> with var_defaults(ref=True):
    ...     var_defaults()
    VarDefaults(hijax=False, ref=True)
    >>> var_defaults()["ref"]
    False
    """
    changes = {name: value for name, value in (("hijax", hijax), ("ref", ref)) if value is not None}
    return VarDefaultsContext(changes) if changes else current_defaults()
