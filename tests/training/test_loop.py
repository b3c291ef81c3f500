# SPDX-License-Identifier: Apache-2.0
"""fit: when it ends, what it writes, what hooks are told, how it goes on."""

from __future__ import annotations

import gc
import io
import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.checkpoint import Manager
from batiste.graph.errors import ArgumentError, CallError
from batiste.training import (
    Curves,
    Epochs,
    Evaluation,
    Guard,
    Hook,
    JsonLines,
    NonFiniteError,
    Progress,
    StopEarly,
    TensorBoard,
    Until,
    fit,
    mean_of,
    read_lines,
    train_step,
)

TX = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
DATA = [(x, x.sum(-1, keepdims=True)) for x in X]
ERROR = mean_of(lambda y, wanted: jnp.square(y - wanted), larger_is_better=False)


def loss(model: Any, batch: Any) -> Any:
    return jnp.square(model(batch[0]) - batch[1]).mean()


STEP = train_step(loss, guard=None)


def pair() -> tuple[Any, Any]:
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


class Told(Hook):
    def __init__(self):
        self.said: list[str] = []

    def start(self, run: Any) -> None:
        self.said.append("start")

    def step(self, run: Any) -> None:
        self.said.append(str(run.step))

    def epoch(self, run: Any) -> None:
        self.said.append(f"epoch {run.epoch}")

    def finish(self, run: Any) -> None:
        self.said.append("finish")

    def end(self, run: Any) -> None:
        self.said.append("end")


def test_hooks_are_told_what_happens_in_order() -> None:
    told = Told()
    run = fit(STEP, pair(), DATA[:2], Until(epochs=2), [told])
    assert told.said == ["start", "1", "2", "epoch 1", "3", "4", "epoch 2", "finish", "end"]
    assert (run.step, run.epoch, run.reason) == (4, 2, "2 epochs")


@pytest.mark.parametrize(
    ("data", "until", "steps", "reason"),
    [
        (DATA, 4, 4, "4 steps"),
        (DATA, Until(steps=100, epochs=1), 6, "1 epochs"),
        (iter(DATA), 100, 6, "end of the data"),
        (lambda epoch: DATA[: epoch + 1], Until(epochs=3), 6, "3 epochs"),
        (DATA, Until(seconds=0), 0, "0 s"),
    ],
    ids=["steps", "epochs", "iterator", "function", "seconds"],
)
def test_a_run_ends_when_it_is_enough(data: Any, until: Any, steps: int, reason: str) -> None:
    run = fit(STEP, pair(), data, until)
    assert (run.step, run.reason) == (steps, reason)


def test_the_loop_does_what_a_bare_loop_does() -> None:
    (one, a), (two, b) = pair(), pair()
    run = fit(STEP, (one, a), DATA, 12, every=4)
    losses = [float(STEP(two, b, batch)["loss"]) for batch in DATA * 2]
    np.testing.assert_array_equal(one.kernel[...], two.kernel[...])
    assert [row["loss"] for row in run.history] == [np.mean(losses[n : n + 4]) for n in (0, 4, 8)]
    assert [row["step"] for row in run.history] == [4, 8, 12]


def test_a_functional_step_passes_its_state_on() -> None:
    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda w: jnp.square(batch[0] @ w - batch[1]).mean())(state["w"])
        return {"w": state["w"] - 0.1 * grads}, {"loss": value}

    run = fit(step, {"w": jnp.zeros((3, 1))}, DATA, 60)
    assert run.history[-1]["loss"] < 0.01 * run.history[0]["loss"]
    np.testing.assert_allclose(run.state["w"], 1.0, atol=0.1)
    with pytest.raises(CallError, match=r"\(state, metrics\)"):
        fit(lambda state, batch: state, {"w": 0}, DATA, 1)


def test_numbers_go_to_lines_scalars_and_a_picture(tmp_path: Path) -> None:
    class Writer:
        def __init__(self):
            self.scalars: list[Any] = []

        def scalar(self, tag: str, value: Any, step: int) -> None:
            self.scalars.append((tag, value, step))

        def flush(self) -> None:
            self.scalars.append("flushed")

    writer, evaluation = Writer(), Evaluation(DATA[:2], {"loss": ERROR})
    lines, picture = tmp_path / "run" / "metrics.jsonl", tmp_path / "curves.png"
    run = fit(STEP, pair(), DATA, Until(epochs=2), [JsonLines(lines), TensorBoard(writer), Curves(picture), evaluation],
              every=3)  # fmt: skip
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert rows == run.history == read_lines(lines)
    assert [(row["step"], *sorted(row.keys() - {"step"})) for row in rows] == [
        (3, "grad_norm", "loss"),
        (6, "grad_norm", "loss"),
        (6, "eval/loss"),
        (9, "grad_norm", "loss"),
        (12, "grad_norm", "loss"),
        (12, "eval/loss"),
    ]
    assert writer.scalars[-1] == "flushed"
    assert ("eval/loss", rows[-1]["eval/loss"], 12) in writer.scalars
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    fit(STEP, pair(), DATA, 10, [JsonLines(lines)], every=5, checkpoints=Manager(tmp_path / "state", every=100))
    with lines.open("a") as file:
        file.write('{"step": 15, "loss": 1.0}\n{"step": 20, "lo')
    run = fit(STEP, pair(), DATA, 15, [JsonLines(lines)], every=5, checkpoints=Manager(tmp_path / "state", every=100))
    assert [row["step"] for row in read_lines(lines)] == [5, 10, 15]
    assert run.history == read_lines(lines)


def test_progress_is_lines_without_a_terminal_and_a_bar_with_one() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plain, terminal = io.StringIO(), Terminal()
    fit(STEP, pair(), DATA, 10, [Progress(seconds=0, file=plain)])
    said = plain.getvalue().splitlines()
    assert said[0].startswith("step 1 of 10, epoch 0")
    assert said[-1].startswith("10 steps after step 10;")
    assert "loss" in said[-2]
    fit(STEP, pair(), DATA, 10, [Progress(file=terminal)])
    assert "10/10" in terminal.getvalue()


def test_a_run_stops_early_and_keeps_that_over_a_checkpoint(tmp_path: Path) -> None:
    def still(model: Any, batch: Any) -> Any:
        return 0 * loss(model, batch) + 1.0

    step = train_step(still, guard=None)
    run = fit(step, pair(), DATA, 100, [StopEarly("loss", patience=3)], every=2)
    assert (run.step // 2, run.reason) == (pytest.approx(4, abs=2), "loss no better than 1 in 3 records")

    def part(steps: int) -> Any:
        hooks = [StopEarly("loss", patience=3)]
        return fit(step, pair(), DATA, steps, hooks, every=2, checkpoints=Manager(tmp_path / "state", every=100))

    part(6)
    assert part(100).step < 20
    with pytest.raises(ArgumentError, match="min, max"):
        StopEarly("loss", mode="least")


def test_an_evaluation_first_shows_mistakes_at_once_and_is_not_recorded() -> None:
    told = Told()
    with pytest.raises(ZeroDivisionError):
        fit(STEP, pair(), DATA, 9, [told, Evaluation(DATA, {"loss": ERROR}, predict=lambda model, batch: 1 / 0)])
    assert told.said == ["start", "end"]
    run = fit(STEP, pair(), DATA, 5, [Evaluation(DATA, {"loss": ERROR}, every=3)])
    assert [row["step"] for row in run.history] == [3, 5]


def test_development_runs_are_short() -> None:
    told = Told()
    run = fit(STEP, pair(), DATA, Until(epochs=50), [told, Evaluation(DATA, {"loss": ERROR})], fast_dev_run=True)
    assert run.step == 3
    run = fit(STEP, pair(), DATA, 100, overfit_batches=1)
    assert run.epoch == 99
    assert run.history[-1]["loss"] < 0.1 * run.history[0]["loss"]


def test_where_the_time_goes_adds_up() -> None:
    run = fit(STEP, pair(), DATA, 12)
    seconds = run.clock.seconds()
    assert list(seconds) == ["step", "input", "compile", "checkpoint", "evaluation", "other"]
    assert 0 < run.clock.goodput < 1
    assert "step" in str(run.clock)


@pytest.mark.parametrize("at", [3, 12])
def test_a_guard_that_raises_stops_the_run_with_its_batch(at: int) -> None:
    bad = [(x * np.nan if n == at - 1 else x, y) for n, (x, y) in enumerate(DATA * 2)]
    told = Told()
    with pytest.raises(NonFiniteError, match=f"at step {at}: got 1 skipped") as caught:
        fit(train_step(loss, guard=Guard("raise")), pair(), bad, 24, [told])
    assert caught.value.step == at
    assert np.isnan(caught.value.batch[0]).all()
    assert told.said[-1] == "end"


def test_refused_steps_are_counted_and_do_not_spoil_the_means() -> None:
    bad = [(x * np.nan if n == 2 else x, y) for n, (x, y) in enumerate(DATA)]
    run = fit(train_step(loss, guard=Guard("skip")), pair(), bad, 6, every=6)
    assert run.history[0]["refused"] == 1
    assert np.isfinite(run.history[0]["loss"])


def test_a_run_may_be_outside_of_the_main_thread() -> None:
    runs: list[Any] = []
    thread = threading.Thread(target=lambda: runs.append(fit(STEP, pair(), DATA, 2)))
    thread.start()
    thread.join()
    assert runs[0].step == 2


def test_a_feed_goes_on_where_it_was() -> None:
    class Loader:
        """One with a position of its own."""

        def __init__(self):
            self.at = 0

        def __iter__(self):
            while self.at < 3:
                self.at += 1
                yield self.at
            self.at = 0

        def state(self) -> int:
            return self.at

        def restore(self, state: int) -> None:
            self.at = state

    for make in (lambda: [1, 2, 3], lambda: lambda epoch: [1, 2, 3], Loader):
        feed = Epochs(make())
        drawn = [feed.draw() for _ in range(6)]
        place = json.loads(json.dumps(feed.position()))
        again = Epochs(make())
        again.restore(place)
        assert [again.draw() for _ in range(3)] == [feed.draw() for _ in range(3)]
        assert drawn[3] is drawn[-1] or drawn.count(1) == 2


def test_wrong_data_and_wrong_ends_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no batches"):
        fit(STEP, pair(), [], 3)
    with pytest.raises(ArgumentError, match="something to iterate over"):
        fit(STEP, pair(), 5, 3)
    with pytest.raises(ArgumentError, match="needs an end"):
        Until()
    with pytest.raises(ArgumentError, match="ends before the place"):
        Epochs([1, 2]).restore({"epoch": 0, "batch": 5})
    with pytest.raises(ArgumentError, match="needs a kind"):
        Curves("curves")


def test_a_long_run_keeps_nothing(tmp_path: Path) -> None:

    counts = []

    class Count(Hook):
        def step(self, run: Any) -> None:
            if run.step in (300, 1500):
                gc.collect()
                counts.append((len(jax.live_arrays()), threading.active_count()))

    step = train_step(loss)
    fit(step, pair(), DATA, 1500, [Count(), JsonLines(tmp_path / "m.jsonl")], every=100)
    assert counts[1][0] <= counts[0][0] + 8, "arrays of steps under way, and no more"
    assert counts[1][1] == counts[0][1]
    assert next(iter(step.compiled.programs.values()))._cache_size() == 1
