# SPDX-License-Identifier: Apache-2.0
"""Variables that a compiled function reads without getting them: their values are constants of the program.

While a program is traced, a `Captured` takes down the Variables from outside that are read. Once one of them has
another value, the program no longer says what the function says.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from .callers import user_place
from .jaxcompat import current_trace

AT_REST = current_trace()
recorders: list[Captured] = []  # of the programs that are being traced, outermost first; nearly always empty


class Held(NamedTuple):
    """One Variable that was read: weakly, with the value it had, its kind, and where it was read."""

    variable: weakref.ref
    value: Any
    kind: str
    place: str

    @property
    def is_stale(self) -> bool:
        """Whether it has another value now, or is gone: then the function must read something else."""
        variable = self.variable()
        return variable is None or variable._raw_value is not self.value


class Captured:
    """The Variables from outside of all transforms that one program has read."""

    def __init__(self):
        self.held: dict[int, Held] = {}
        self.thread = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self.thread = threading.get_ident()
        recorders.append(self)
        try:
            yield
        finally:
            recorders.remove(self)
            self.held = {key: held for key, held in self.held.items() if held.variable() is not None}

    def stale(self) -> Held | None:
        """What no longer is as the program knows it."""
        return next((held for held in self.held.values() if held.is_stale), None)

    def is_current(self) -> bool:
        return not self.held or self.stale() is None


def note_read(variable: Any) -> None:
    """Takes down that the programs that are being traced now read a Variable, if it is from outside."""
    if getattr(variable, "_trace_state", None) == AT_REST:  # a hijax Variable is no constant
        thread = threading.get_ident()
        for recorder in recorders:
            if recorder.thread == thread and id(variable) not in recorder.held:
                recorder.held[id(variable)] = Held(
                    weakref.ref(variable), variable._raw_value, type(variable).__name__, user_place()
                )
