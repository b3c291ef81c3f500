# SPDX-License-Identifier: Apache-2.0
"""evaluate and compare: every score against its definition, exact last batches, merging, slices, intervals."""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from batiste import nnx
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.training import (
    Score,
    accuracy,
    auroc,
    bleu,
    calibration_error,
    compare,
    confusion_matrix,
    evaluate,
    f1,
    log_loss,
    mean_of,
    perplexity,
    rouge,
    top_k,
)

N, CLASSES = 53, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, CLASSES)).astype(np.float32)
LABELS = np.where(RNG.random(N) < 0.5, LOGITS.argmax(-1), RNG.integers(0, CLASSES, N))
PREDICTED = LOGITS.argmax(-1)
P = np.asarray(jax.nn.softmax(LOGITS))


def in_batches(size: int, *arrays: np.ndarray) -> list[Any]:
    return [tuple(a[n : n + size] for a in arrays) for n in range(0, len(arrays[0]), size)]


def identity(model: Any, batch: Any) -> Any:
    return batch[0]


def report(metrics: dict[str, Score], data: Any = None, **options: Any) -> Any:
    data = in_batches(16, LOGITS, LABELS) if data is None else data
    return evaluate(None, data, metrics, predict=identity, **{"resamples": 0, **options})


def ece(bins: int) -> float:
    confidence, hits = P.max(-1), PREDICTED == LABELS
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(
        (place == b).mean() * abs(hits[place == b].mean() - confidence[place == b].mean()) for b in np.unique(place)
    )


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        (accuracy(), sklearn_metrics.accuracy_score(LABELS, PREDICTED)),
        (top_k(2), sklearn_metrics.top_k_accuracy_score(LABELS, LOGITS, k=2)),
        (f1(CLASSES), sklearn_metrics.f1_score(LABELS, PREDICTED, average="macro")),
        (f1(CLASSES, "micro"), sklearn_metrics.f1_score(LABELS, PREDICTED, average="micro")),
        (log_loss(), sklearn_metrics.log_loss(LABELS, P)),
        (perplexity(), np.exp(sklearn_metrics.log_loss(LABELS, P))),
        (calibration_error(10), ece(10)),
    ],
    ids=["accuracy", "top 2", "macro f1", "micro f1", "log loss", "perplexity", "calibration"],
)
@pytest.mark.parametrize("size", [16, 100])
def test_scores_of_batches_are_the_scores_of_the_whole(score: Score, wanted: float, size: int) -> None:
    found = report({"it": score}, in_batches(size, LOGITS, LABELS))
    assert found["it"] == pytest.approx(wanted, rel=1e-5)
    assert found.count == N


def test_scores_of_yes_and_no() -> None:
    scores, labels = np.round(LOGITS[:, 0], 1), (LABELS == 0).astype(int)
    found = report({"auroc": auroc()}, in_batches(20, scores, labels))
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), rel=1e-6)
    two = np.stack([-scores, scores], -1)
    found = report({"auroc": auroc(), "f1": f1(2, "binary")}, in_batches(20, two, labels))
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), rel=1e-6)
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, two.argmax(-1)))


def test_the_confusion_matrix() -> None:
    found = report({"confusion": confusion_matrix(CLASSES)})
    np.testing.assert_array_equal(found["confusion"], sklearn_metrics.confusion_matrix(LABELS, PREDICTED))


def test_perplexity_counts_places_and_not_sequences() -> None:
    logits = RNG.normal(size=(5, 7, 3)).astype(np.float32)
    labels = RNG.integers(0, 3, (5, 7))
    labels[np.arange(7) > RNG.integers(1, 6, (5, 1))] = -1
    log_p = np.asarray(jax.nn.log_softmax(logits))
    kept = labels >= 0
    wanted = np.exp(-np.take_along_axis(log_p, np.where(kept, labels, 0)[..., None], -1)[..., 0][kept].mean())
    assert report({"p": perplexity()}, in_batches(2, logits, labels))["p"] == pytest.approx(wanted, rel=1e-5)


def test_text_is_scored_on_the_host() -> None:
    exact = Score(lambda texts, wanted: (np.array([t == w for t, w in zip(texts, wanted)]),),
                  lambda rows, weights: float(weights @ rows[0] / weights.sum()), on_host=True)  # fmt: skip
    found = report({"exact": exact}, [(["a", "b"], ["a", "c"]), (["d"], ["d"])])
    assert (found["exact"], found.count) == (pytest.approx(2 / 3), 3)


def test_bleu_and_rouge_are_those_of_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sacrebleu(types.ModuleType):
        def corpus_bleu(self, texts: list[str], references: list[list[str]]) -> Any:
            return types.SimpleNamespace(score=100 * np.mean([t == r for t, r in zip(texts, references[0])]))

    class Scorer(types.ModuleType):
        class RougeScorer:
            def __init__(self, kinds: list[str]):
                self.kinds = kinds

            def score(self, reference: str, text: str) -> Any:
                return {kind: types.SimpleNamespace(fmeasure=float(reference == text)) for kind in self.kinds}

    data = [(["a b", "c"], ["a b", "d"]), (["e"], ["e"])]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"batiste\[text\]"):
        report({"bleu": bleu()}, data)
    monkeypatch.setitem(sys.modules, "sacrebleu", Sacrebleu("sacrebleu"))
    monkeypatch.setitem(sys.modules, "rouge_score", types.ModuleType("rouge_score"))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", Scorer("rouge_scorer"))
    found = report({"bleu": bleu(), "rouge": rouge()}, data, resamples=20)
    assert found["bleu"] == pytest.approx(100 * 2 / 3)
    assert found["rouge"] == pytest.approx(2 / 3)
    assert found.figures["bleu"].low < found["bleu"]


def test_slices_and_merged_reports_are_those_of_their_examples() -> None:
    group = (np.arange(N) % 3).astype(int)
    options: dict[str, Any] = {"slices": {"third": lambda batch: batch[2]}}
    whole = report({"accuracy": accuracy()}, in_batches(16, LOGITS, LABELS, group), **options)
    assert list(whole.slices) == ["third=0", "third=1", "third=2"]
    for k in range(3):
        wanted = (PREDICTED == LABELS)[group == k].mean()
        assert whole.slices[f"third={k}"]["accuracy"].value == pytest.approx(wanted)
        assert whole.slices[f"third={k}"]["accuracy"].count == (group == k).sum()
    parts = [report({"accuracy": accuracy()}, in_batches(16, *half), **options)
             for half in ((LOGITS[:20], LABELS[:20], group[:20]), (LOGITS[20:], LABELS[20:], group[20:]))]  # fmt: skip
    merged = parts[0].merge(parts[1])
    assert merged.figures == whole.figures
    assert merged.slices == whole.slices


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(1), 0
    for seed in range(100):
        hits = rng.random((60, 1)) < 0.7
        found = report({"mean": mean_of(lambda x, _: x[:, 0])}, [(hits.astype(np.float32), hits)], resamples=200,
                       confidence=0.9, seed=seed)  # fmt: skip
        held += found.figures["mean"].low <= 0.7 <= found.figures["mean"].high
    assert 82 <= held <= 97


def test_batches_may_live_on_several_devices() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = [jax.device_put((LOGITS[:48], LABELS[:48]), here)]
    found = report({"accuracy": accuracy(), "calibration": calibration_error()}, spread)
    alone = report({"accuracy": accuracy(), "calibration": calibration_error()}, [(LOGITS[:48], LABELS[:48])])
    assert found["accuracy"] == alone["accuracy"]
    assert found["calibration"] == pytest.approx(alone["calibration"])


class Net(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(CLASSES, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norm(x))


def test_a_model_is_evaluated_in_evaluation_mode_and_left_alone() -> None:
    model = Net()
    before = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.BatchStat)))
    found = evaluate(model, in_batches(16, LOGITS, LABELS), {"accuracy": accuracy()}, resamples=0)
    assert found["accuracy"] == pytest.approx((PREDICTED == LABELS).mean())
    assert not model.dropout.deterministic
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.BatchStat)))))


def test_a_threshold_that_is_missed_is_a_verdict_with_exit_code_1() -> None:
    found = report({"accuracy": accuracy(), "loss": log_loss()})
    good = found.check({"accuracy": found["accuracy"] - 0.01, "loss": found["loss"] + 0.01})
    bad = found.check({"accuracy": found["accuracy"] - 0.01, "loss": found["loss"] - 0.01})
    assert good and good.exit_code == 0
    assert not bad and bad.exit_code == 1
    assert list(bad.missed) == ["loss"]
    assert "MISSED: loss" in str(bad)
    with pytest.raises(ArgumentError, match="expected accuracy, loss"):
        found.check({"f1": 0.5})


def test_compare_says_what_got_better_and_what_got_worse() -> None:
    better = LOGITS + 3 * np.eye(CLASSES, dtype=np.float32)[LABELS]
    worse = better.copy()
    worse[7] -= 20 * np.eye(CLASSES, dtype=np.float32)[LABELS[7]]
    group = (np.arange(N) == 7).astype(int)
    scores = {"accuracy": accuracy(), "loss": log_loss()}
    options: dict[str, Any] = {"slices": {"odd": lambda batch: batch[2]}, "resamples": 200}
    old, new = (report(scores, in_batches(16, x, LABELS, group), **options) for x in (LOGITS, worse))
    found = compare(old, new)
    assert found.changes["accuracy"].verdict == "better"
    assert found.changes["odd=1: loss"].verdict == "worse"
    assert found.worse["loss"][0] == 7
    assert set(found.better["accuracy"]) <= set(np.flatnonzero(PREDICTED != LABELS))
    assert found.exit_code == 1
    assert "worse in loss: examples 7" in str(found)
    same = compare(old, old)
    assert same.exit_code == 0
    assert {change.verdict for change in same.changes.values()} == {"no clear change"}
    with pytest.raises(ArgumentError, match="cannot be compared"):
        compare(old, report(scores, [(LOGITS[:5], LABELS[:5])]))


def test_wrong_batches_are_refused() -> None:
    with pytest.raises(ShapeError, match="same number of examples"):
        report({"accuracy": accuracy()}, [(LOGITS, LABELS[:3])])
    with pytest.raises(ShapeError, match="do not fit the logits"):
        report({"accuracy": accuracy()}, [(LOGITS, LOGITS)])
    with pytest.raises(ArgumentError, match="nothing to evaluate on"):
        report({"accuracy": accuracy()}, [])


def test_rows_without_weight_are_not_counted() -> None:
    rows = {
        "x": np.eye(2, dtype=np.float32)[[0, 1, 1, 1]],
        "y": np.array([0, 1, 0, 0]),
        "weight": np.array([1, 1, 1, 0]),
    }
    settings = dict(predict=lambda model, batch: batch["x"], labels=lambda batch: batch["y"])
    report = evaluate(None, [rows], {"accuracy": accuracy()}, **settings)
    assert (report.count, report["accuracy"]) == (3, pytest.approx(2 / 3))
    unweighted = evaluate(None, [rows], {"accuracy": accuracy()}, weight=lambda batch: np.ones(4), **settings)
    assert (unweighted.count, unweighted["accuracy"]) == (4, 0.5)
