# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on images, over live objects: define, train, evaluate, look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.serialization import from_bytes, to_bytes
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


def loss_fn(model: Net, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the logits it was taken from."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


@nnx.jit
def train_step(
    model: Net, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, images: jax.Array, labels: jax.Array
) -> None:
    """One step of gradient descent; the model, the optimizer and the metrics change in place."""
    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, images, labels)
    optimizer.update(model, grads)
    metrics.update(loss=loss, logits=logits, labels=labels)


@nnx.jit
def predict(model: Net, images: jax.Array) -> jax.Array:
    """logits[n, classes]"""
    return model(images)


def evaluate(model: Net, data: Dataset) -> tuple[float, np.ndarray]:
    """The loss on the held-out images, and the class predicted for each."""
    model.eval()  # no dropout, and BatchNorm's running statistics
    logits = jnp.concatenate([predict(model, images) for images in in_chunks(data.test_x)])
    model.train()
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.test_y).mean()
    return float(loss), np.asarray(logits.argmax(-1))


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
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    rng = np.random.default_rng(args.seed)
    predicted = np.zeros_like(data.test_y)
    with report.progress():
        for _ in range(report.epochs):
            for images, labels in batches(data.train_x, data.train_y, args.batch, rng):
                train_step(model, optimizer, metrics, images, labels)
                if report.step():
                    report.show(**figures(metrics))
            test_loss, predicted = evaluate(model, data)
            report.epoch(**figures(metrics), test_loss=test_loss, predicted=predicted)
            metrics.reset()

    if args.save:
        save(model, args.save)
    parameters = sum(value.size for value in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return report.finish(predicted, parameters)


def figures(metrics: nnx.MultiMetric) -> dict[str, float]:
    """The metrics so far, as numbers."""
    return {name: float(value) for name, value in metrics.compute().items()}


if __name__ == "__main__":
    raise SystemExit(main())
