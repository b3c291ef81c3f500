# SPDX-License-Identifier: Apache-2.0
"""Watching a model run: for a while, the calls of its methods are reported."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .module import Dict, List, Module
from .pytree import Object, Pytree

BASES = (Pytree, Object, Module, List, Dict)  # their methods are those of all models, and are not reported

Report = Callable[[Any, str, Callable[..., Any], tuple, dict[str, Any]], Any]

_patching = threading.RLock()


@contextlib.contextmanager
def watching(types: set[type], report: Report) -> Iterator[None]:
    """For a while the public methods of the classes go through `report(self, name, function, args, kwargs)`.

    `report` calls `function(self, *args, **kwargs)` and returns what is to be the result.
    """
    originals: list[tuple[type, str, Any]] = []
    with _patching:
        try:
            for cls in {base for t in types for base in t.__mro__}:
                for name, function in list(vars(cls).items()):
                    if _is_reported(cls, name, function):
                        originals.append((cls, name, function))
                        setattr(cls, name, _reporting(name, function, report))
            yield
        finally:
            for cls, name, function in originals:
                setattr(cls, name, function)


def _is_reported(cls: type, name: str, function: Any) -> bool:
    if cls in BASES or not issubclass(cls, Pytree) or isinstance(function, (type, staticmethod, classmethod, property)):
        return False
    return callable(function) and hasattr(function, "__get__") and (name == "__call__" or not name.startswith("_"))


def _reporting(name: str, function: Any, report: Report) -> Callable[..., Any]:
    def method(self, *args, **kwargs):
        return report(self, name, _unbound(function), args, kwargs)

    return functools.update_wrapper(method, function)


def _unbound(function: Any) -> Callable[..., Any]:
    if inspect.isfunction(function):
        return function
    return lambda self, *args, **kwargs: function.__get__(self, type(self))(*args, **kwargs)
