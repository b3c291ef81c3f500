# SPDX-License-Identifier: Apache-2.0
"""What is running: the modules whose methods are being called, and what is put around every call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class InterceptorContext:
    """What an interceptor of `intercept_methods` is told: the module, the name of the method, the bound method."""

    module: Any
    method_name: str
    orig_method: Callable[..., Any]


class _Running(threading.local):
    """The modules whose methods are running in this thread, innermost last; None where a call begins anew."""

    def __init__(self):
        self.modules: list[Any] = [None]
        self.interceptors: list[Callable[..., Any]] = []
        self.named = True
        self.told_of_layers: Callable[[Any, Any], None] | None = None  # each object layer that runs, and its scope

    @property
    def module_stack(self) -> list[Any]:
        """None and the modules being called, under Flax's name; those around a call that began anew do not count."""
        begin = max(number for number, module in enumerate(self.modules) if module is None)
        return self.modules[begin:]


running = _Running()


@contextlib.contextmanager
def in_module(module: Any) -> Iterator[None]:
    """Makes `module` the parent of modules that are created inside."""
    running.modules.append(module)
    try:
        yield
    finally:
        running.modules.pop()


@contextlib.contextmanager
def intercept_methods(interceptor: Callable[..., Any]) -> Iterator[None]:
    """Runs `interceptor(next_fun, args, kwargs, context)` around every method call of a module inside.

    The interceptor that was put on first is the outermost; `next_fun(*args, **kwargs)` goes on.
    """
    running.interceptors.append(interceptor)
    try:
        yield
    finally:
        running.interceptors.pop()


@contextlib.contextmanager
def override_named_call(enable: bool = True) -> Iterator[None]:
    """Inside, operations carry the names of the modules they belong to, or do not."""
    before, running.named = running.named, enable
    try:
        yield
    finally:
        running.named = before


def enable_named_call() -> None:
    """From now on operations carry the names of the modules they belong to."""
    running.named = True


def disable_named_call() -> None:
    """From now on operations carry no names of modules."""
    running.named = False


def intercepted(fun: Callable[..., Any], context: InterceptorContext) -> Callable[..., Any]:
    """`fun` inside all interceptors; the one that was put on first is the outermost."""
    call = functools.partial(fun, context.module)
    for interceptor in reversed(running.interceptors):
        call = functools.partial(_through, interceptor, call, context)
    return call


def _through(
    interceptor: Callable[..., Any], call: Callable[..., Any], context: InterceptorContext, /, *args: Any, **kwargs: Any
) -> Any:
    return interceptor(call, args, kwargs, context)
