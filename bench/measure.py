# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: contenders interleaved in slices of one process, ratios per slice, medians of ratios."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import jax

Call = Callable[[], object]


def machine() -> str:
    """What the figures were taken on, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"Python {platform.python_version()}, jax {version('jax')}, numpy {version('numpy')}"
    return f"{platform.machine()}, {cores} cores, {jax.default_backend()}, {versions}"


class Slices:
    """Seconds per call of each contender, one figure per round; the rounds of all contenders stand side by side."""

    def __init__(self, calls: Mapping[str, Call], seconds: float, slice_seconds: float = 0.02, least: int = 7):
        """Runs every contender in turn for a slice, round after round, for `seconds`, at least `least` rounds."""
        self.cpu: dict[str, list[float]] = {name: [] for name in calls}
        self.wall: dict[str, list[float]] = {name: [] for name in calls}
        repeats = {name: max(1, round(slice_seconds / once(call))) for name, call in calls.items()}
        gc.collect()
        gc.freeze()  # what was built so far is not searched again by every collection
        names, end, rounds = list(calls), time.perf_counter() + seconds, 0
        while rounds < least or time.perf_counter() < end:
            for name in names:
                cpu, wall = timed(calls[name], repeats[name])
                self.cpu[name].append(cpu)
                self.wall[name].append(wall)
            names.append(names.pop(0))  # nobody always follows the same one
            rounds += 1
        gc.unfreeze()
        self.rounds = rounds

    def ratio(self, name: str, floor: str, clock: str = "cpu") -> float:
        """The median over the rounds of `name`'s time by `floor`'s time in the same round."""
        figures: dict[str, list[float]] = getattr(self, clock)
        return statistics.median(a / b for a, b in zip(figures[name], figures[floor]))

    def median(self, name: str, clock: str = "cpu") -> float:
        """Seconds per call."""
        return statistics.median(getattr(self, clock)[name])


def once(call: Call) -> float:
    """Wall seconds of a call that is warm."""
    timed(call, 2)
    return max(timed(call, 3)[1], 1e-7)


def timed(call: Call, repeats: int) -> tuple[float, float]:
    """CPU seconds of the whole process and wall seconds, per call, until the last result is there."""
    out: object = None
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in plain text: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    print(f"\n{title}")
    for row in [headings, ["-" * w for w in widths], *rows]:
        print("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))
