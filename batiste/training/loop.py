# SPDX-License-Identifier: Apache-2.0
"""fit: calls a training step until it is enough, keeps its numbers and its state, and goes on where it was stopped.

    run = fit(step, (model, optimizer), data, until=Until(epochs=10), checkpoints=Manager("run"),
              hooks=[Progress(), JsonLines("run/metrics.jsonl"), Evaluation(held_out, {"accuracy": accuracy()})])

Everything of which the next step depends is one state: parameters, optimizer, random streams, guard, averages, the
number of the step, the place in the data, sums of metrics that were not written yet, and what hooks keep.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils

from batiste.distributed import everywhere
from batiste.graph.errors import ArgumentError, BatisteError, CallError

from .clock import Clock
from .epochs import END, Epochs
from .guards import FINE, halted
from .hooks import Hook

__all__ = ["Checkpoints", "Interrupted", "OutOfMemoryError", "Run", "Until", "fit"]

AHEAD = 4  # steps that may be under way on the device


class Checkpoints(Protocol):
    """Where a run is saved and read again: `batiste.checkpoint.Manager`, or what has these parts of it."""

    @property
    def every(self) -> int: ...

    def save(self, step: int, tree: Any, *, metrics: dict[str, float], force: bool) -> Any: ...

    def restore_latest(self, into: Any) -> Any: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Until:
    """When a run has come to its end: after so many steps, epochs or seconds, whichever is first."""

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self):
        if self.steps is None and self.epochs is None and self.seconds is None:
            raise ArgumentError("a run needs an end", got=str(self), fix="pass steps=, epochs= or seconds=")

    def reached(self, run: Run) -> str | None:
        if self.steps is not None and run.step >= self.steps:
            return f"{self.steps} steps"
        if self.epochs is not None and run.epoch >= self.epochs:
            return f"{self.epochs} epochs"
        if self.seconds is not None and time.perf_counter() - run.clock.began >= self.seconds:
            return f"{self.seconds:g} s"
        return None


class Interrupted(SystemExit):
    """A signal ended the run after a whole step; the run was saved. The program's exit code is 128 + the signal.

    That is 130 for Ctrl-C (SIGINT) and 143 for SIGTERM.
    """

    def __init__(self, number: int, run: Run):
        self.signal, self.run = signal.Signals(number), run
        super().__init__(128 + number)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} after step {self.run.step}"


class OutOfMemoryError(BatisteError, MemoryError):
    """A step needed more memory than there is. The step before may have given its buffers away: the checkpoint has all.

    The model of the failed run is not to be used any more; a new run goes on from the newest checkpoint.
    """


class Run:
    """A training under way, and what came of it.

    Attributes:
        state: what the step works on: a tuple of live objects, or one pytree.
        step: how many batches were taken.
        history: all records, as dicts with `step`.
        reason: why it ended.
        clock: where the time went; `clock.goodput`.
    """

    def __init__(self, step: Callable[..., Any], state: Any, feed: Epochs, until: Until, hooks: Sequence[Any]):
        self.function, self.state, self.feed, self.until, self.hooks = step, state, feed, until, hooks
        self.checkpoints: Checkpoints | None = None
        self.clock, self.step, self.reason = Clock(), 0, ""
        self.limit: int | None = None
        self.history: list[dict[str, float]] = []
        self.window = Window()
        self.every = 10
        self._saved: int | None = None
        self._pending: deque[tuple[int, Any, Any]] = deque()

    # ------------------------------------------------------------ looking at it
    @property
    def model(self) -> Any:
        """The first live object; of a functional run, the state."""
        return self.state[0] if isinstance(self.state, tuple) else self.state

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self.feed.epoch

    @property
    def steps(self) -> int | None:
        """How many there will be, where that is known."""
        return self.until.steps

    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        return {name: value for row in self.history for name, value in row.items() if name != "step"}

    def stop(self, reason: str) -> None:
        """Ends the run after this step."""
        self.reason = self.reason or reason

    # ------------------------------------------------------------ steps
    def take(self, batch: Any) -> None:
        """One step, handed to the device."""
        with self.clock("step"):
            if isinstance(self.state, tuple):
                metrics = self.function(*self.state, batch)
            else:
                out = self.function(self.state, batch)
                if not isinstance(out, tuple) or len(out) != 2:
                    raise CallError("a functional step returns (state, metrics)", got=type(out).__name__,
                                    fix="or pass live objects as a tuple (model, optimizer)")  # fmt: skip
                self.state, metrics = out
            self.step += 1
            self._pending.append((self.step, metrics, batch))
            while len(self._pending) > AHEAD:
                jax.block_until_ready(self._pending[0][1])
                self._read()
        while self._pending and _is_there(self._pending[0][1]):
            self._read()
        self.call("step")

    def catch_up(self) -> None:
        """Waits for the numbers of all steps that were handed to the device."""
        with self.clock("step"):
            jax.block_until_ready([metrics for _, metrics, _ in self._pending])
        while self._pending:
            self._read()

    def _read(self) -> None:
        """Takes the numbers of the oldest step under way."""
        step, metrics, batch = self._pending.popleft()
        values = {k: float(v) for k, v in jax.device_get(metrics or {}).items()}
        if values.pop("halted", 0.0):
            raise halted(self.function.guard, step, batch)
        self.window.add(values)
        if step % self.every == 0:
            self.record(self.window.take(), step)

    def record(self, values: dict[str, float], step: int | None = None) -> None:
        """Tells all hooks some numbers."""
        at = self.step if step is None else step
        self.history.append({"step": at, **values})
        for hook in self._here():
            if hasattr(hook, "record"):
                hook.record(self, at, values)

    def _here(self) -> list[Any]:
        """The hooks that this process calls."""
        return [hook for hook in self.hooks if not (getattr(hook, "once", False) and jax.process_index())]

    def call(self, occasion: str) -> None:
        for hook in self._here():
            if (method := getattr(hook, occasion, None)) is not None:
                method(self)

    # ------------------------------------------------------------ one state
    def prepare(self) -> None:
        """Lets the step make what it carries, which is part of the state."""
        if isinstance(self.state, tuple) and hasattr(self.function, "prepare"):
            self.function.prepare(*self.state)  # type: ignore[attr-defined]

    def tree(self) -> dict[str, Any]:
        """All of which the next step depends."""
        self.catch_up()
        hooks = [hook.state() if hasattr(hook, "state") else None for hook in self.hooks]
        place = {"step": self.step, "feed": self.feed.position(), "window": self.window.state(), "hooks": hooks}
        tree = {"state": self.state, "run": json.dumps(place)}
        extras = getattr(self.function, "extras", None)
        return tree if extras is None else {**tree, "extras": extras}

    def go_to(self, tree: dict[str, Any]) -> None:
        """Takes what `tree` gave, read from a checkpoint; live objects have their values already."""
        if not isinstance(self.state, tuple):
            self.state = tree["state"]
        place = json.loads(tree["run"])
        self.step = self._saved = place["step"]
        self.feed.restore(place["feed"])
        self.window.restore(place["window"])
        for hook, kept in zip(self.hooks, place["hooks"]):
            if kept is not None:
                hook.restore(kept)

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        if self.checkpoints is not None and self._saved != self.step:
            tree = self.tree()
            with self.clock("checkpoint"):
                self.checkpoints.save(self.step, tree, metrics=self.latest(), force=True)
                self._saved = self.step

    def close(self) -> None:
        """Waits until what was saved is on the medium, and gives the folder free."""
        if self.checkpoints is not None:
            with self.clock("checkpoint"):
                self.checkpoints.close()


class Window:
    """Sums of metrics over some steps, of which the means are written."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.refused: int | None = None

    def add(self, values: dict[str, float]) -> None:
        """A step; one that was refused is counted, and its numbers are left out."""
        verdict = values.pop("verdict", None)
        if verdict is not None:
            self.refused = (self.refused or 0) + (verdict != FINE)
        if not verdict:
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means, and the number of refused steps if there are any; begins anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        if self.refused:
            means["refused"] = self.refused
        self.__init__()
        return means

    def state(self) -> Any:
        return [self.sums, self.counts, self.refused]

    def restore(self, state: Any) -> None:
        self.sums, self.counts, self.refused = state


def fit(
    step: Callable[..., Any],
    state: Any,
    data: Any,
    until: Until | int,
    hooks: Sequence[Hook] = (),
    *,
    checkpoints: Checkpoints | None = None,
    every: int = 10,
    fast_dev_run: bool = False,
    overfit_batches: int = 0,
) -> Run:
    """Takes steps until it is enough. Where `checkpoints` has some, the run goes on from the newest one.

    Programs of several processes call it in each, under one plan, with data of which each reads its own rows (a Loader
    does): the batches become one over all of them, and a signal to any stops all after the same step.

    Args:
        step: `step(*state, batch) -> metrics` of live objects, such as one made by `train_step`; or
            `step(state, batch) -> (state, metrics)` where the state is not a tuple. Metrics are a dict of scalars.
        state: `(model, optimizer)`, or the state of a functional step.
        data: batches: an iterable, read anew in every epoch; or a function of the epoch's number.
        until: when to end; a number means steps.
        hooks: what happens beside, in this order; see `Hook`.
        checkpoints: a `batiste.checkpoint.Manager`; the run is saved at multiples of its `every`, at the end, and when
            it is interrupted.
        every: records are means over so many steps. Numbers are read when they have arrived; no step waits for them.
        fast_dev_run: three steps, two batches of every evaluation and no checkpoint: does the program run at all?
        overfit_batches: only so many batches, again and again: can the model learn at all?

    Raises:
        Interrupted: SIGINT or SIGTERM came. It is a SystemExit: the run was saved, and the program ends with 130 or
            143 unless the exception is caught. A second signal ends it at once.
        NonFiniteError: the guard of the step has stopped the training.

    >>> from batiste import nnx
    >>> import optax, jax.numpy as jnp
    >>> from batiste.training.step import train_step
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> step = train_step(lambda model, batch: (model(batch) ** 2).mean())
    >>> run = fit(step, (model, optimizer), [jnp.ones((4, 2))] * 5, until=20)
    >>> run.step, run.epoch, run.reason, [row["step"] for row in run.history]
    (20, 3, '20 steps', [10, 20])
    """
    if fast_dev_run:
        until, checkpoints = 3, None
    if overfit_batches:
        data = list(Epochs(data).first(overfit_batches))
    until = Until(steps=until) if isinstance(until, int) else until
    run = Run(step, tuple(state) if isinstance(state, list) else state, Epochs(data), until, list(hooks))
    run.limit, run.every = (2 if fast_dev_run else None), every
    run.checkpoints = checkpoints
    with _ended(run), _signals() as received:
        if checkpoints is not None:
            with run.clock("checkpoint"):
                run.prepare()
                found = checkpoints.restore_latest(into=run.tree())
                if found is not None:
                    run.go_to(found.state)
                    run.prepare()
        run.call("start")
        while not (received or run.reason):
            run.reason = until.reached(run) or _advance(run)
            if _all_are_to_stop(run.step):
                received.append(signal.SIGTERM)
        if not received:
            run.catch_up()
            run.call("finish")
        run.save()
        run.close()
        if received:
            run.reason = f"stopped by {signal.Signals(received[0]).name}"
            raise Interrupted(received[0], run)
    return run


def _advance(run: Run) -> str:
    """One step, or the end of an epoch; the reason to stop, if there is one."""
    with run.clock("input"):
        batch = run.feed.draw()
        batch = batch if batch is END else everywhere(batch)
    if batch is END:
        run.call("epoch")
        return run.reason or ("end of the data" if run.feed.once else "")
    run.take(batch)
    if run.checkpoints is not None and run.step % run.checkpoints.every == 0:
        run.save()
    return run.reason


@contextmanager
def _ended(run: Run) -> Iterator[None]:
    """Ends all hooks and the saving, whatever happened."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"(\d+) bytes", str(error))
        raise OutOfMemoryError(
            "the memory does not suffice for a step", at=f"step {run.step}",
            got=f"{asked[1]} bytes asked for" if asked else None,
            fix="take a smaller batch, its parts one by one (train_step(parts=)), or remat; a new run goes on from the "
            "newest checkpoint",
        ) from error  # fmt: skip
    finally:
        try:
            run.call("end")
        finally:
            run.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; the second one does what it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may have handlers
        return
    if jax.process_count() > 1:
        with _passed_to_all():
            yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _passed_to_all() -> Iterator[None]:
    """A SIGINT as a SIGTERM, which JAX tells the other processes, and after which step all stop."""
    before = signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _all_are_to_stop(step: int) -> bool:
    """Whether this is the step after which all processes stop, since one of them got a signal."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def _is_there(metrics: Any) -> bool:
    """Whether the device has finished a step; all of its numbers come from one program."""
    first: Any = next(iter(jax.tree.leaves(metrics)), None)
    return not isinstance(first, jax.Array) or first.is_ready()  # type: ignore[attr-defined]
