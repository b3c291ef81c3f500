# SPDX-License-Identifier: Apache-2.0
"""Scores: what `evaluate` measures. A score is two functions:

    measure(outputs, labels) -> rows     on the device, for each example by itself: a tuple of arrays[n, ...]
    figure(rows, weights[n]) -> value    on the host, of all examples, each weighted

Rows of several batches, devices or hosts are merged by putting them together; a slice of the data is a weight of 0 and
1, a bootstrap sample a weight of 0, 1, 2, …. So every score has confidence intervals and slices, and none is averaged
over batches of unequal size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph.errors import ShapeError
from batiste.graph.optional import need

__all__ = ["Score", "accuracy", "auroc", "bleu", "calibration_error", "confusion_matrix", "f1", "log_loss",
           "mean_of", "perplexity", "rouge", "top_k"]  # fmt: skip

Rows = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure about a model's outputs.

    Args:
        measure: of each example by itself; traced, unless `on_host`.
        figure: the figure, from the rows of all examples; a number, or an array such as a confusion matrix.
        each: rows -> a number per example, larger is better; what `compare` shows examples by.
        larger_is_better: False for errors.
        on_host: `measure` gets what Python objects there are (text), and is not compiled.
    """

    measure: Callable[[Any, Any], Rows]
    figure: Callable[[Rows, np.ndarray], Any]
    each: Callable[[Rows], np.ndarray] | None = None
    larger_is_better: bool = True
    on_host: bool = False


def mean_of(measure: Callable[[Any, Any], Any], larger_is_better: bool = True) -> Score:
    """Σ w · x / Σ w of a number x for each example: `mean_of(lambda outputs, labels: (outputs - labels) ** 2)`"""

    def figure(rows: Rows, weights: np.ndarray) -> float:
        return _ratio(weights @ rows[0], weights.sum())

    def rows(outputs: Any, labels: Any) -> Rows:
        x = jnp.asarray(measure(outputs, labels), jnp.float32)
        return (x.reshape(x.shape[0], -1).mean(-1),)

    return Score(rows, figure, lambda rows: rows[0] if larger_is_better else -rows[0], larger_is_better)


@functools.cache
def accuracy() -> Score:
    """The share of examples with argmax(logits[n, classes]) == labels[n]; of sequences, of their places."""
    return mean_of(lambda logits, labels: _checked(logits, labels).argmax(-1) == labels)


@functools.cache
def top_k(k: int) -> Score:
    """The share of examples whose label is among the k classes with the largest logits[n, classes]."""

    def hit(logits: Any, labels: Any) -> jax.Array:
        best = jax.lax.top_k(_checked(logits, labels), k)[1]
        return (best == labels[..., None]).any(-1)

    return mean_of(hit)


@functools.cache
def log_loss() -> Score:
    """The mean of -log softmax(logits[n, classes])[label]"""
    return mean_of(_surprise, larger_is_better=False)


@functools.cache
def perplexity(ignore: int | None = -1) -> Score:
    """exp(Σ -log p(label) / number of labels) over all places of logits[n, ..., vocabulary] and labels[n, ...]

    Args:
        ignore: places with this label do not count.
    """

    def rows(logits: Any, labels: Any) -> Rows:
        counted = jnp.ones(jnp.shape(labels), bool) if ignore is None else labels != ignore
        lost = jnp.where(counted, _surprise(logits, jnp.where(counted, labels, 0)), 0.0)
        n = lost.shape[0]
        return lost.reshape(n, -1).sum(-1), counted.reshape(n, -1).sum(-1)

    def figure(rows: Rows, weights: np.ndarray) -> float:
        return float(np.exp(_ratio(weights @ rows[0], weights @ rows[1])))

    return Score(rows, figure, lambda rows: -rows[0] / np.maximum(rows[1], 1), larger_is_better=False)


@functools.cache
def confusion_matrix(classes: int) -> Score:
    """count[label, predicted], of logits[n, classes]"""

    def figure(rows: Rows, weights: np.ndarray) -> np.ndarray:
        return _confusion(rows, weights, classes)

    return Score(_labels_and_predictions, figure, _correct)


@functools.cache
def f1(classes: int, average: str = "macro") -> Score:
    """2 tp / (2 tp + fp + fn), of logits[n, classes]

    Args:
        average: "macro": the mean over the classes that occur; "micro": of all decisions; "binary": of class 1.
    """

    def figure(rows: Rows, weights: np.ndarray) -> float:
        count = _confusion(rows, weights, classes)
        hits, sums = np.diag(count), count.sum(0) + count.sum(1)
        if average == "micro":
            return _ratio(2 * hits.sum(), sums.sum())
        each = 2 * hits / np.maximum(sums, 1e-12)
        return float(each[1]) if average == "binary" else _ratio(each[sums > 0].sum(), (sums > 0).sum())

    return Score(_labels_and_predictions, figure, _correct)


@functools.cache
def auroc() -> Score:
    """The chance that a positive example has a larger score than a negative one, equal scores counting half

    Outputs are scores[n] or logits[n, 2]; labels[n] are 0 and 1.
    """

    def rows(outputs: Any, labels: Any) -> Rows:
        return (outputs[..., 1] - outputs[..., 0] if jnp.ndim(outputs) == 2 else outputs), labels

    def figure(rows: Rows, weights: np.ndarray) -> float:
        values, place = np.unique(rows[0], return_inverse=True)
        sums = [np.bincount(place, weights * (rows[1] == k), minlength=len(values)) for k in (0, 1)]
        below = np.cumsum(sums[0]) - sums[0]
        return _ratio(sums[1] @ (below + sums[0] / 2), sums[0].sum() * sums[1].sum())

    return Score(rows, figure)


@functools.cache
def calibration_error(bins: int = 15) -> Score:
    """Σ (bin's share) · |accuracy - mean confidence|, over bins of the confidence max softmax(logits[n, classes])

    Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 3.
    """

    def rows(logits: Any, labels: Any) -> Rows:
        confidence = jax.nn.softmax(_checked(logits, labels).astype(jnp.float32)).max(-1)
        return confidence, (logits.argmax(-1) == labels).astype(jnp.float32)

    def figure(rows: Rows, weights: np.ndarray) -> float:
        confidence, correct = (np.asarray(r, np.float64) for r in rows)
        place = np.clip((confidence * bins).astype(int), 0, bins - 1)
        gap = np.bincount(place, weights * (correct - confidence), minlength=bins)
        return _ratio(np.abs(gap).sum(), weights.sum())

    return Score(rows, figure, lambda rows: -np.abs(rows[1] - rows[0]), larger_is_better=False)


# ---------------------------------------------------------------- text, through libraries
@functools.cache
def bleu() -> Score:
    """Corpus BLEU of texts, by sacrebleu: outputs are a list of texts, labels one of references."""

    def figure(rows: Rows, weights: np.ndarray) -> float:
        texts, references = (np.repeat(r, weights.astype(int)).tolist() for r in rows)
        return float(need("sacrebleu", extra="text").corpus_bleu(texts, [references]).score) if texts else np.nan

    return Score(_texts, figure, on_host=True)


@functools.cache
def rouge(kind: str = "rougeL") -> Score:
    """The mean ROUGE F-measure of texts, by rouge-score: outputs are a list of texts, labels one of references."""

    def rows(texts: Sequence[str], references: Sequence[str]) -> Rows:
        scorer = need("rouge_score.rouge_scorer", extra="text").RougeScorer([kind])
        return (np.array([scorer.score(r, t)[kind].fmeasure for t, r in zip(texts, references)]),)

    return Score(rows, lambda rows, weights: _ratio(weights @ rows[0], weights.sum()), lambda rows: rows[0],
                 on_host=True)  # fmt: skip


# ---------------------------------------------------------------- shared by several
def _texts(texts: Sequence[str], references: Sequence[str]) -> Rows:
    return np.array(texts, object), np.array(references, object)


def _ratio(a: Any, b: Any) -> float:
    return float(a / b) if b else float("nan")


def _surprise(logits: Any, labels: Any) -> jax.Array:
    log_p = jax.nn.log_softmax(_checked(logits, labels).astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]


def _checked(logits: Any, labels: Any) -> jax.Array:
    if jnp.shape(logits)[:-1] != jnp.shape(labels):
        raise ShapeError("labels do not fit the logits", got=f"logits {jnp.shape(logits)}, labels {jnp.shape(labels)}",
                         expected="logits (n, classes), labels (n,)",
                         fix="pass class numbers; say where they are with evaluate(labels=...)")  # fmt: skip
    return jnp.asarray(logits)


def _labels_and_predictions(logits: Any, labels: Any) -> Rows:
    return labels, _checked(logits, labels).argmax(-1)


def _correct(rows: Rows) -> np.ndarray:
    return (rows[0] == rows[1]).astype(np.float32)


def _confusion(rows: Rows, weights: np.ndarray, classes: int) -> np.ndarray:
    place = rows[0].astype(int) * classes + rows[1]
    return np.bincount(place, weights, minlength=classes**2).reshape(classes, classes)
