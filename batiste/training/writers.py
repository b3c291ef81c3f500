# SPDX-License-Identifier: Apache-2.0
"""Writers: hooks that keep the numbers of a run as lines of JSON, for TensorBoard, as a picture of the curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

from .hooks import Hook

if TYPE_CHECKING:
    from .loop import Run

__all__ = ["Curves", "JsonLines", "TensorBoard", "read_lines"]


class JsonLines(Hook):
    """One line `{"step": 10, "loss": 0.5}` per record. What is not finite is written as text, such as "nan".

    A run that goes on from a checkpoint first drops the lines after it, so that the file of an interrupted run is in
    the end that of an uninterrupted one, byte for byte.
    """

    once = True

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file: Any = None

    def start(self, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_lines(self.path) if row["step"] <= run.step] if run.step else []
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("".join(_line(row) for row in kept))
        os.replace(beside, self.path)
        run.history[:0] = kept
        self._file = self.path.open("a")

    def record(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def end(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({k: v if math.isfinite(v) else str(v) for k, v in row.items()}) + "\n"


def read_lines(path: str | os.PathLike) -> list[dict[str, float]]:
    """The records of a file that `JsonLines` wrote; a last line that was cut off is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            rows.append({k: float(v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


class ScalarWriter(Protocol):
    """What `TensorBoard` writes through."""

    def scalar(self, tag: str, value: Any, step: int) -> None: ...

    def flush(self) -> None: ...


class TensorBoard(Hook):
    """Each number of each record as a scalar: `TensorBoard(batiste.metrics.tensorboard.SummaryWriter(folder, False))`

    Args:
        writer: or another object with `scalar(tag, value, step)` and `flush()`.
    """

    once = True

    def __init__(self, writer: ScalarWriter):
        self.writer = writer

    def record(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.scalar(name, value, step)

    def end(self, run: Run) -> None:
        self.writer.flush()


class Curves(Hook):
    """At the end, a picture of all numbers over the steps: one panel per metric, `eval/loss` in that of `loss`.

    Put it after a `JsonLines`, which also knows what came before an interruption.
    """

    once = True

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.suffix:
            raise ArgumentError("a picture needs a kind", got=str(path), fix=f"pass {path}.png")

    def end(self, run: Run) -> None:
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in run.history:
            for name, value in row.items():
                if name != "step":
                    panel = panels.setdefault(name.rpartition("/")[2], {})
                    panel.setdefault(name, []).append((row["step"], value))
        if not panels:
            return
        figure = need("matplotlib.figure", extra="demo").Figure(figsize=(5 * len(panels), 4), layout="constrained")
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            for name, points in lines.items():
                axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
            axes.set(title=title, xlabel="step")
            axes.legend()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path)
