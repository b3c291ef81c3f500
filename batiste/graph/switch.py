# SPDX-License-Identifier: Apache-2.0
"""Switches: a default that is set from here on, for a block, or for the calls of one function.

Every switch stands on a flag of `config`, which gives its value until a thread sets its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

from .config import config

F = TypeVar("F", bound=Callable[..., Any])

_UNSET = object()


class _Here(threading.local):
    """What this thread has set the switch to."""

    value: Any = _UNSET


class Switch:
    """A setting with three uses: calling it sets it at once, `with` undoes that at the end, and it decorates functions.

    >>> class shout(Switch, flag="flax_profile"):
    ...     '''Whether to shout.'''
    >>> shout.current_value()
    True
    >>> with shout(False):
    ...     shout.current_value()
    False
    >>> shout.current_value()
    True
    """

    _flag: str
    _here: _Here

    def __init_subclass__(cls, flag: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._flag, cls._here = flag, _Here()

    def __init__(self, value: Any, /):
        self._before, self._value = self._here.value, value
        self._here.value = value

    def __enter__(self) -> Self:
        self._here.value = self._value
        return self

    def __exit__(self, *exception: object) -> None:
        self._here.value = self._before

    def __call__(self, f: F) -> F:
        self._here.value = self._before  # only the calls of `f` are meant

        @functools.wraps(f)
        def switched(*args: Any, **kwargs: Any) -> Any:
            with type(self)(self._value):
                return f(*args, **kwargs)

        return switched  # type: ignore[return-value]

    @classmethod
    def current_value(cls) -> Any:
        """What holds here and now."""
        value = cls._here.value
        return getattr(config, cls._flag) if value is _UNSET else value
