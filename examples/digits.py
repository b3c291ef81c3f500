# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on images, over live objects: define, train, evaluate, look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from batiste import nnx
from batiste.checkpoint import Manager
from batiste.serialization import from_bytes, to_bytes
from batiste.training import Hook, Run, Until, accuracy, confusion_matrix, evaluate, fit, log_loss, train_step
from batiste.training import Report as Evaluated
from digits_data import Dataset, batches, in_chunks, load
from digits_report import Report, options


class Net(nnx.Module):
    """logits[..., classes] = out(hidden(blocks(image[..., size, size, 1])))"""

    def __init__(self, size: int, classes: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(64 * (size // 4) ** 2, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(128, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), strides=(2, 2))  # size / 2
        x = nnx.max_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), strides=(2, 2))  # size / 4
        x = nnx.relu(self.hidden(x.reshape(*x.shape[:-3], -1)))
        return self.out(self.dropout(x))


def variables(model: Net) -> dict[str, Any]:
    """The parameters and statistics as nested dicts, which are those of the functional face."""
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return {name: nnx.to_pure_dict(nnx.state(model, kind)) for name, kind in kinds.items()}


def save(model: Net, path: Path) -> None:
    """Writes a checkpoint."""
    path.write_bytes(to_bytes(variables(model)))


def restore(model: Net, path: Path) -> None:
    """Puts the variables of a checkpoint, of whichever face, into the model."""
    for state in from_bytes(variables(model), path.read_bytes()).values():
        nnx.update(model, state)


def loss(model: Net, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy, and the share of images that were recognised."""
    images, labels = batch
    logits = model(images)
    hits = logits.argmax(-1) == labels
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {"accuracy": hits.mean()}


def held_out(model: Net, data: Dataset, resamples: int = 0) -> Evaluated:
    """Loss, accuracy (with an interval, if images are drawn anew so often), and the class found for each image."""
    scores = {"accuracy": accuracy(), "loss": log_loss(), "confusion": confusion_matrix(len(data.classes))}
    return evaluate(model, zip(in_chunks(data.test_x), in_chunks(data.test_y)), scores, resamples=resamples)


class Reporting(Hook):
    """Shows the run as it goes on."""

    def __init__(self, report: Report):
        self.report = report

    def step(self, run: Run) -> None:
        self.report.step()

    def epoch(self, run: Run) -> None:
        run.catch_up()  # the numbers of all steps are there
        with run.clock("evaluation"):
            found = held_out(run.model, self.report.data)
        learned = {name: run.latest()[name] for name in ("loss", "accuracy")}
        self.report.epoch(**learned, test_loss=found["loss"], predicted=found.rows["confusion"][1])

    def state(self) -> list[dict[str, float]]:
        return self.report.history

    def restore(self, state: list[dict[str, float]]) -> None:
        self.report.history = state


def main() -> int:
    args = options(__doc__ or "")
    data = load(args.data)
    report = Report(data, args)

    model = Net(data.size, len(data.classes), rngs=nnx.Rngs(args.seed))
    if args.load:
        restore(model, args.load)
    steps = report.epochs * report.per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=steps // 10, decay_steps=steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-3), wrt=nnx.Param)

    def shuffled(epoch: int) -> Any:
        return batches(data.train_x, data.train_y, args.batch, np.random.default_rng((args.seed, epoch)))

    with report.progress():
        run = fit(train_step(loss), (model, optimizer), shuffled, Until(epochs=report.epochs), [Reporting(report)],
                  every=report.per_epoch, checkpoints=Manager(args.run, every=100) if args.run else None)  # fmt: skip

    if args.save:
        save(model, args.save)
    parameters = sum(value.size for value in jax.tree.leaves(nnx.state(model, nnx.Param)))
    found = held_out(model, data, resamples=1000)
    skipped = run.function.guard.counts()["skipped"]
    notes = f"accuracy with 95 % confidence: {found.figures['accuracy']}", f"time: {run.clock}; {skipped} steps skipped"
    return report.finish(found.rows["confusion"][1], parameters, *notes)


if __name__ == "__main__":
    raise SystemExit(main())
