# SPDX-License-Identifier: Apache-2.0
"""Clock: where the time of a run goes; the share that goes into steps is its goodput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

__all__ = ["Clock"]

PARTS = ("step", "input", "compile", "checkpoint", "evaluation", "other")


class _Compilations:
    """How many programs XLA has compiled or loaded in this process, since somebody first asked."""

    count = 0
    listening = False

    @classmethod
    def so_far(cls) -> int:
        if not cls.listening:
            jax.monitoring.register_event_duration_secs_listener(cls._heard)
            cls.listening = True
        return cls.count

    @classmethod
    def _heard(cls, event: str, duration_secs: float, **_: object) -> None:
        cls.count += event.endswith("backend_compile_duration")


class Clock:
    """Seconds by part: step, input, compile, checkpoint, evaluation, other.

    A step in which a program was compiled counts whole as compilation.

    >>> clock = Clock()
    >>> with clock("input"):
    ...     time.sleep(0.01)
    >>> clock.seconds()["input"] >= 0.01, 0 <= clock.goodput <= 1
    (True, True)
    """

    def __init__(self):
        self.began = time.perf_counter()
        self._spent: dict[str, float] = dict.fromkeys(PARTS[:-1], 0.0)
        _Compilations.so_far()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time of a block; that of the step in which something is compiled as compilation."""
        began, compiled = time.perf_counter(), _Compilations.count
        try:
            yield
        finally:
            if part == "step" and _Compilations.count > compiled:
                part = "compile"
            self._spent[part] += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds by part, which add up to the time since the clock was made."""
        total = time.perf_counter() - self.began
        return {**self._spent, "other": max(0.0, total - sum(self._spent.values()))}

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps."""
        seconds = self.seconds()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def __str__(self) -> str:
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        parts = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in seconds.items() if s > 0.0005 * total)
        return f"{total:.1f} s: {parts}"
