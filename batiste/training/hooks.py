# SPDX-License-Identifier: Apache-2.0
"""Hooks: what happens beside the steps of a training loop. A hook is an object with some of the methods of `Hook`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

from .early_stopping import EarlyStopping
from .epochs import Epochs
from .evaluation import evaluate
from .scores import Score

if TYPE_CHECKING:
    from .loop import Run

__all__ = ["Evaluation", "Hook", "Progress", "StopEarly"]

Values = Mapping[str, float]


class Hook:
    """Does nothing, at every occasion; subclasses do something at some.

    What a hook needs to go on after an interruption it gives as `state()`, of which JSON can be made.

    Attributes:
        once: of several processes only the first one calls it: what writes to files and terminals.
    """

    once = False

    def start(self, run: Run) -> None:
        """Before the first step, after a checkpoint was read."""

    def step(self, run: Run) -> None:
        """After each step was handed to the device; its results are not there yet, and must not be waited for."""

    def epoch(self, run: Run) -> None:
        """After the last batch of an epoch."""

    def record(self, run: Run, step: int, values: Values) -> None:
        """Numbers have arrived: means over some steps, or an evaluation. A hook writes some with `run.record`."""

    def finish(self, run: Run) -> None:
        """After the last step of a run that came to its end."""

    def end(self, run: Run) -> None:
        """When the run is over, also where it failed or was interrupted."""

    def state(self) -> Any:
        """What is part of a checkpoint."""
        return None

    def restore(self, state: Any) -> None:
        """Takes what `state` gave."""


class Evaluation(Hook):
    """Evaluates the model on held-out data, and records `name/metric` for each metric.

    Args:
        data: batches, read anew at each evaluation.
        metrics, predict, labels: as for `evaluate`.
        every: steps between evaluations; None: after every epoch.
        sanity: so many batches are evaluated before the first step, so that a mistake shows at once and not after an
            hour; 0 for none.
        model: which model, of the run; `lambda run: step.ema.apply_to(run.model)` takes the averaged one.
    """

    def __init__(
        self,
        data: Any,
        metrics: Mapping[str, Score],
        *,
        every: int | None = None,
        name: str = "eval",
        sanity: int = 2,
        predict: Callable[..., Any] | None = None,
        labels: Callable[[Any], Any] | None = None,
        model: Callable[[Run], Any] = lambda run: run.model,
    ):
        self.data, self.metrics, self.every, self.name, self.sanity = data, metrics, every, name, sanity
        self.predict, self.labels, self.model = predict, labels, model
        self._latest = 0

    def start(self, run: Run) -> None:
        if self.sanity and run.step == 0:
            with run.clock("evaluation"):
                self._figures(run, self.sanity)

    def step(self, run: Run) -> None:
        if self.every and run.step % self.every == 0:
            self._evaluate(run)

    def epoch(self, run: Run) -> None:
        if not self.every:
            self._evaluate(run)

    def finish(self, run: Run) -> None:
        self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        if self._latest == run.step:
            return
        self._latest = run.step
        run.catch_up()
        with run.clock("evaluation"):
            figures = self._figures(run, run.limit)
        run.record({f"{self.name}/{name}": value for name, value in figures.items()})

    def _figures(self, run: Run, limit: int | None) -> dict[str, float]:
        report = evaluate(self.model(run), Epochs(self.data).first(limit), self.metrics, predict=self.predict,
                          labels=self.labels, resamples=0)  # fmt: skip
        return {name: float(f.value) for name, f in report.figures.items() if isinstance(f.value, float)}


class StopEarly(Hook):
    """Stops the run when a metric has not become better by `least` in `patience` records on end.

    Args:
        metric: its name in the records, such as "eval/accuracy".
        mode: "min" or "max": what is better.
    """

    def __init__(self, metric: str, *, patience: int = 3, least: float = 0.0, mode: str = "min"):
        if mode not in ("min", "max"):
            raise ArgumentError("unknown mode", at="StopEarly", got=repr(mode), expected="min, max", fix="mode='max'")
        self.metric, self.sign = metric, 1 if mode == "min" else -1
        self.stopping = EarlyStopping(min_delta=least, patience=patience - 1)

    def record(self, run: Run, step: int, values: Values) -> None:
        if self.metric in values:
            self.stopping = self.stopping.update(self.sign * values[self.metric])
            if self.stopping.should_stop:
                best = self.sign * self.stopping.best_metric
                run.stop(f"{self.metric} no better than {best:.5g} in {self.stopping.patience_count} records")

    def state(self) -> Any:
        s = self.stopping
        return {"best": None if math.isinf(s.best_metric) else s.best_metric, "count": s.patience_count}

    def restore(self, state: Any) -> None:
        best = math.inf if state["best"] is None else state["best"]
        self.stopping = self.stopping.replace(best_metric=best, patience_count=state["count"])


class Progress(Hook):
    """A progress bar where there is a terminal, and a line every `seconds` where there is none."""

    once = True

    def __init__(self, *, seconds: float = 10.0, file: TextIO | None = None):
        self.seconds, self.file = seconds, file
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0.0
        self._latest: dict[str, float] = {}

    def start(self, run: Run) -> None:
        self.file = self.file or sys.stderr
        self._shown = time.monotonic()
        if self.file.isatty():
            try:
                rich = need("rich.progress", extra="display")
                console = need("rich.console", extra="display").Console(file=self.file)
            except ImportError:
                return  # lines do as well
            columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn(),
                       rich.TextColumn("{task.description}"))  # fmt: skip
            self._bar = rich.Progress(*columns, console=console, refresh_per_second=5)
            self._task = self._bar.add_task("", total=run.steps, completed=run.step)
            self._bar.start()

    def step(self, run: Run) -> None:
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._bar else self.seconds):
            self._shown = now
            self._show(run)

    def record(self, run: Run, step: int, values: Values) -> None:
        self._latest.update(values)

    def end(self, run: Run) -> None:
        self._show(run)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        print(f"{run.reason or 'failed'} after step {run.step}; {run.clock}", file=self.file)

    def _show(self, run: Run) -> None:
        text = ", ".join(f"{name} {value:.4g}" for name, value in self._latest.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=run.step, description=text)
        else:
            total = "" if run.steps is None else f" of {run.steps}"
            print(f"step {run.step}{total}, epoch {run.epoch}: {text}", file=self.file, flush=True)
