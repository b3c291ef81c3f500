# SPDX-License-Identifier: Apache-2.0
"""evaluate: figures of a model over held-out data, how sure they are, by slice; `compare` for two models.

report = evaluate(model, batches, {"accuracy": accuracy(), "f1": f1(classes=10)})
report.figures["accuracy"]                        # 0.981 [0.966, 0.993]
verdict = report.check({"accuracy": 0.97})        # verdict.exit_code is 1 where a threshold is missed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.distributed import everywhere
from batiste.graph import Module
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.split import clone
from batiste.transforms.compile import jit

from .scores import Rows, Score

__all__ = ["Change", "Comparison", "Figure", "Report", "Verdict", "compare", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A value, and the interval in which it lies with the confidence of the report."""

    value: Any
    low: float = float("nan")
    high: float = float("nan")
    count: int = 0

    def __str__(self) -> str:
        if not isinstance(self.value, float):
            return str(self.value)
        return f"{self.value:.4g}" + ("" if np.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether stated thresholds are met. `exit_code` is 0 if all are, else 1."""

    missed: dict[str, tuple[float, float]]
    met: dict[str, tuple[float, float]]

    @property
    def exit_code(self) -> int:
        return int(bool(self.missed))

    def __bool__(self) -> bool:
        return not self.missed

    def __str__(self) -> str:
        return "\n".join(
            f"{word} {name} {value:.5g}, required {wanted:.5g}"
            for word, figures in (("met:   ", self.met), ("MISSED:", self.missed))
            for name, (value, wanted) in figures.items()
        )


class Report:
    """The figures of an evaluation, with what they were made from.

    Attributes:
        figures: a `Figure` by name.
        slices: figures by slice and name.
        rows: what was measured for each example, by name; two reports are merged by `merge`.
    """

    def __init__(self, scores: Mapping[str, Score], rows: Mapping[str, Rows], groups: Mapping[str, np.ndarray],
                 *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0):  # fmt: skip
        self.scores, self.rows, self.groups = dict(scores), dict(rows), dict(groups)
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.count = len(next(iter(self.rows.values()))[0]) if self.rows else 0
        everything = np.ones(self.count)
        self.figures = {name: self._figure(name, everything) for name in scores}
        self.slices = {
            f"{group}={value}": {name: self._figure(name, (member == value).astype(float)) for name in scores}
            for group, member in self.groups.items()
            for value in np.unique(member).tolist()
        }

    def _figure(self, name: str, weights: np.ndarray) -> Figure:
        chosen = np.flatnonzero(weights)
        rows, score = tuple(r[chosen] for r in self.rows[name]), self.scores[name]
        value = score.figure(rows, np.ones(len(chosen)))
        if not self.resamples or not isinstance(value, float) or not len(chosen):
            return Figure(value, count=len(chosen))
        rng = np.random.default_rng(self.seed)
        samples = [score.figure(rows, w) for w in _resampled(rng, len(chosen), self.resamples)]
        low, high = np.nanquantile(samples, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return Figure(value, float(low), float(high), len(chosen))

    def __getitem__(self, name: str) -> Any:
        """The value of a figure."""
        return self.figures[name].value

    def merge(self, other: Report) -> Report:
        """The report of the examples of both."""
        rows = {name: tuple(map(_joined, zip(mine, other.rows[name]))) for name, mine in self.rows.items()}
        groups = {name: np.concatenate([mine, other.groups[name]]) for name, mine in self.groups.items()}
        return Report(self.scores, rows, groups, confidence=self.confidence, resamples=self.resamples, seed=self.seed)

    def check(self, thresholds: Mapping[str, float]) -> Verdict:
        """Compares figures with thresholds: at least, or at most for scores of which less is better.

        Raises:
            ArgumentError: a threshold names no figure.
        """
        missed, met = {}, {}
        for name, wanted in thresholds.items():
            if name not in self.figures or not isinstance(self[name], float):
                numbers = [name for name, f in self.figures.items() if isinstance(f.value, float)]
                raise ArgumentError("a threshold for something that was not measured", got=name,
                                    expected=", ".join(numbers), fix="add it to the metrics")  # fmt: skip
            value, sign = self[name], 1 if self.scores[name].larger_is_better else -1
            (met if sign * value >= sign * wanted else missed)[name] = (value, wanted)
        return Verdict(missed, met)

    def __str__(self) -> str:
        rows = [("all", self.figures), *self.slices.items()]
        lines = [f"{self.count} examples, intervals of {100 * self.confidence:.0f} %"]
        for place, figures in rows:
            numbers = [f"{name} {f}" for name, f in figures.items() if isinstance(f.value, float)]
            lines.append(f"  {place} ({next(iter(figures.values())).count}): {', '.join(numbers)}")
        return "\n".join(lines)


def evaluate(
    model: Any,
    data: Iterable[Any],
    metrics: Mapping[str, Score],
    *,
    predict: Callable[[Any, Any], Any] | None = None,
    labels: Callable[[Any], Any] | None = None,
    slices: Mapping[str, Callable[[Any], Any]] | None = None,
    weight: Callable[[Any], Any] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """Figures of a model over all examples of `data`, each counted once.

    A module is evaluated as a view in evaluation mode that shares its Variables; it is not changed. A last batch that
    is smaller is filled up for the sake of one compiled program, and what was filled in is not counted. Of several
    processes each reads its own rows, as many as the others (`Loader(last="pad")`), and all have the whole report.

    Args:
        data: batches: pairs (inputs, labels), or whatever `predict` and `labels` take.
        metrics: scores by name; see `batiste.training.scores`.
        predict: `outputs = predict(model, batch)`; the model's call of `batch[0]` unless given.
        labels: the labels of a batch; `batch[1]` unless given.
        slices: functions from a batch to an array[n] of groups, by name: figures are also given for each group.
        weight: from a batch to an array[n], 0 for rows that were filled in and are not counted; `batch["weight"]`
            unless given, where a batch is a dict that has it.
        confidence, resamples, seed: of the intervals, by bootstrap; `resamples=0` for none.

    Raises:
        ArgumentError: there are no batches.
        ShapeError: an array of a batch has another number of examples than the first.

    >>> from batiste import nnx
    >>> from batiste.training.scores import accuracy
    >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    >>> x = np.ones((5, 2), np.float32)
    >>> report = evaluate(model, [(x[:3], np.zeros(3, int)), (x[3:], np.ones(2, int))], {"accuracy": accuracy()})
    >>> report.count, report["accuracy"] in (0.4, 0.6)
    (5, True)
    """
    measure = _measuring(metrics, predict or _call_of_first, labels or _second)
    view = _evaluation_mode(model)
    found: dict[str, list[Rows]] = {name: [] for name in metrics}
    groups: dict[str, list[np.ndarray]] = {name: [] for name in slices or {}}
    size = 0
    for batch in data:
        n = examples_of(batch)
        size = max(size, n)
        batch = batch if n == size else filled(batch, size - n)
        rows = measure(view, everywhere(batch))
        weighted = weight or (_own_weight if _has_weight(batch) else None)
        weights = _of_all(weighted(batch) if weighted else np.ones(size, np.int8), batch)
        counted = np.flatnonzero(np.where(_of_all(np.arange(size) < n, batch), weights, 0))
        for name, each in rows.items():
            found[name].append(tuple(_on_host(r)[counted] for r in each))
        for name, group in (slices or {}).items():
            groups[name].append(_of_all(group(batch), batch)[counted])
    if not size:
        raise ArgumentError("nothing to evaluate on", got="no batches", fix="pass data with at least one batch; an "
                            "iterator can be read only once")  # fmt: skip
    together = {name: tuple(_joined(parts) for parts in zip(*rows)) for name, rows in found.items()}
    return Report(metrics, together, {name: np.concatenate(g) for name, g in groups.items()},
                  confidence=confidence, resamples=resamples, seed=seed)  # fmt: skip


_programs: dict[Any, Any] = {}


def _measuring(metrics: Mapping[str, Score], predict: Callable[..., Any], labels: Callable[..., Any]) -> Any:
    """`(model, batch) -> rows by name`; one program for the same metrics, however often they are measured."""
    key = (tuple(metrics.items()), predict, labels)
    if key not in _programs:
        compiled = {name: score for name, score in metrics.items() if not score.on_host}
        outside = {name: score for name, score in metrics.items() if score.on_host}

        def inside(model: Any, batch: Any) -> Any:
            outputs, wanted = predict(model, batch), labels(batch)
            return {name: score.measure(outputs, wanted) for name, score in compiled.items()}

        program = jit(inside)

        def measure(model: Any, batch: Any) -> dict[str, Rows]:
            rows = program(model, batch) if compiled else {}
            if outside:
                outputs, wanted = predict(model, batch), labels(batch)
                rows |= {name: score.measure(outputs, wanted) for name, score in outside.items()}
            return rows

        while len(_programs) >= 32:
            _programs.pop(next(iter(_programs)))
        _programs[key] = measure
    return _programs[key]


def _call_of_first(model: Any, batch: Any) -> Any:
    return model(batch[0])


def _second(batch: Any) -> Any:
    return batch[1]


def _has_weight(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "weight" in batch


def _own_weight(batch: Any) -> Any:
    return batch["weight"]


def _evaluation_mode(model: Any) -> Any:
    if not isinstance(model, Module):
        return model
    view = clone(model, variables=False)
    view.eval()
    return view


def examples_of(batch: Any) -> int:
    """The number of examples of a batch, on which all its arrays agree.

    Raises:
        ShapeError: they do not.
    """
    sizes = {len(x) if hasattr(x, "__len__") else 0 for x in jax.tree.leaves(batch, is_leaf=_is_list_of_text)}
    if len(sizes) != 1 or 0 in sizes:
        raise ShapeError("the arrays of a batch do not have the same number of examples", got=sorted(sizes),
                         expected="one number above zero", fix="put the examples first in every array")  # fmt: skip
    return sizes.pop()


def filled(batch: Any, more: int) -> Any:
    """The batch with the last example of each array again, `more` times; lists are left as they are."""

    def fill(x: Any) -> Any:
        xp: Any = np if isinstance(x, np.ndarray) else jnp
        return xp.concatenate([x, xp.repeat(x[-1:], more, axis=0)]) if isinstance(x, (np.ndarray, jax.Array)) else x

    return jax.tree.map(fill, batch)


def _is_list_of_text(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(t, str) for t in x)


def _on_host(x: Any) -> np.ndarray:
    """All of an array, also where its parts live on other hosts."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())  # type: ignore[attr-defined]
        x = jax.jit(lambda x: x, out_shardings=whole)(x)
    return np.asarray(x)


def _of_all(rows: Any, batch: Any) -> np.ndarray:
    """What all processes have for the rows of their batches, of what this one has for its own."""
    whole = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(batch))
    return _on_host(rows if whole else everywhere(np.asarray(rows)))


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(parts))


def _resampled(rng: np.random.Generator, n: int, times: int) -> Iterable[np.ndarray]:
    """How often each of n examples is in each sample of n with replacement."""
    for _ in range(times):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(float)


# ---------------------------------------------------------------- two models
@dataclasses.dataclass(frozen=True)
class Change:
    """How a figure differs between two reports over the same examples; `low` and `high` bound the difference."""

    before: float
    after: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        return f"{self.before:.4g} -> {self.after:.4g} ({self.low:+.3g} to {self.high:+.3g}): {self.verdict}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What got better and what got worse.

    Attributes:
        changes: a `Change` by name, `slice: name` for slices.
        better, worse: by name, the numbers of the examples that changed most, the largest change first.
    """

    changes: dict[str, Change]
    better: dict[str, list[int]]
    worse: dict[str, list[int]]

    @property
    def exit_code(self) -> int:
        """1 if a figure got worse beyond doubt, else 0."""
        return int(any(change.verdict == "worse" for change in self.changes.values()))

    def __str__(self) -> str:
        lines = [f"{name}: {change}" for name, change in self.changes.items()]
        for word, examples in (("better", self.better), ("worse", self.worse)):
            lines += [f"{word} in {name}: examples {', '.join(map(str, e))}" for name, e in examples.items() if e]
        return "\n".join(lines)


def compare(before: Report, after: Report, *, examples: int = 5) -> Comparison:
    """Two reports over the same examples: a figure is better or worse where the interval of the difference, by a
    bootstrap of pairs, does not hold zero.

    Raises:
        ArgumentError: the reports are of different examples or metrics.
    """
    if before.count != after.count or list(before.scores) != list(after.scores):
        raise ArgumentError("two reports that cannot be compared", got=f"{after.count} examples, {list(after.scores)}",
                            expected=f"{before.count} examples, {list(before.scores)}",
                            fix="evaluate both models on the same data, with the same metrics")  # fmt: skip
    everywhere = {"": np.ones(before.count, bool)} | {
        f"{group}={value}: ": member == value
        for group, member in before.groups.items()
        for value in np.unique(member).tolist()
    }
    changes, better, worse = {}, {}, {}
    for name, score in before.scores.items():
        if not isinstance(before.figures[name].value, float):
            continue
        for place, member in everywhere.items():
            changes[place + name] = _change(score, before, after, name, member)
        if score.each is not None:
            difference = np.asarray(score.each(after.rows[name]), float) - score.each(before.rows[name])
            order = np.argsort(-difference, kind="stable")
            better[name] = [int(i) for i in order[:examples] if difference[i] > 0]
            worse[name] = [int(i) for i in order[::-1][:examples] if difference[i] < 0]
    return Comparison(changes, better, worse)


def _change(score: Score, before: Report, after: Report, name: str, member: np.ndarray) -> Change:
    chosen = np.flatnonzero(member)
    old, new = (tuple(r[chosen] for r in report.rows[name]) for report in (before, after))
    n, times = len(chosen), before.resamples or 1000
    was, now = (score.figure(rows, np.ones(n)) for rows in (old, new))
    rng = np.random.default_rng(before.seed)
    differences = [score.figure(new, w) - score.figure(old, w) for w in _resampled(rng, n, times)]
    low, high = np.nanquantile(differences, [(1 - before.confidence) / 2, (1 + before.confidence) / 2])
    sign = 1 if score.larger_is_better else -1
    up, down = low > 0, high < 0
    verdict = "no clear change" if not (up or down) else "better" if up == (sign > 0) else "worse"
    return Change(was, now, float(low), float(high), verdict)
