# SPDX-License-Identifier: Apache-2.0
"""The network of digits.py in the functional face: settings here, variables there, and the very same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import batiste.linen as nn
from batiste.serialization import from_bytes, to_bytes
from batiste.training.train_state import TrainState
from digits_data import Dataset, batches, in_chunks, load
from digits_report import Report, options

Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}


class Net(nn.Module):
    """logits[..., classes] = out(hidden(blocks(image[..., size, size, 1])))"""

    classes: int

    def setup(self) -> None:
        self.conv1, self.norm1 = nn.Conv(32, kernel_size=(3, 3)), nn.BatchNorm(momentum=0.9)
        self.conv2, self.norm2 = nn.Conv(64, kernel_size=(3, 3)), nn.BatchNorm(momentum=0.9)
        self.hidden = nn.Dense(128)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Dense(self.classes)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        known = not train  # BatchNorm's statistics are then not of the batch but the running ones
        x = nn.max_pool(nn.relu(self.norm1(self.conv1(x), use_running_average=known)), (2, 2), strides=(2, 2))
        x = nn.max_pool(nn.relu(self.norm2(self.conv2(x), use_running_average=known)), (2, 2), strides=(2, 2))
        x = nn.relu(self.hidden(x.reshape(*x.shape[:-3], -1)))
        return self.out(self.dropout(x, deterministic=not train))


class Training(TrainState):
    """Everything that changes from step to step."""

    batch_stats: Any

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}


def first(data: Dataset, seed: int) -> Variables:
    """The variables of a new network."""
    return Net(len(data.classes)).init(jax.random.key(seed), data.test_x[:1])


def save(variables: Variables, path: Path) -> None:
    """Writes a checkpoint."""
    path.write_bytes(to_bytes(variables))


def restore(variables: Variables, path: Path) -> Variables:
    """The variables in a checkpoint, of whichever face, in the structure of those given."""
    return from_bytes(variables, path.read_bytes())


@jax.jit
def train_step(now: Training, key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[Training, jax.Array]:
    """One step of gradient descent, and (loss, accuracy) before it."""

    def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
        logits, changed = now.apply_fn(
            {"params": params, "batch_stats": now.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, now.step)},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, changed)

    (loss, (logits, changed)), grads = jax.value_and_grad(loss_of, has_aux=True)(now.params)
    figures = jnp.stack([loss, (logits.argmax(-1) == labels).mean()])
    return now.apply_gradients(grads=grads, **changed), figures


@jax.jit
def predict(now: Training, images: jax.Array) -> jax.Array:
    """logits[n, classes]"""
    return now.apply_fn(now.variables, images)


def main() -> int:
    args = options(__doc__ or "")
    data = load(args.data)
    report = Report(data, args)

    variables = first(data, args.seed)
    if args.load:
        variables = restore(variables, args.load)
    steps = report.epochs * report.per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=steps // 10, decay_steps=steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)
    now = Training.create(apply_fn=Net(len(data.classes)).apply, tx=optimizer, **variables)

    key = jax.random.key(args.seed)
    predicted = np.zeros_like(data.test_y)
    with report.progress():
        for epoch in range(report.epochs):
            rng = np.random.default_rng((args.seed, epoch))
            figures = []
            for images, labels in batches(data.train_x, data.train_y, args.batch, rng):
                now, latest = train_step(now, key, images, labels)
                figures.append(latest)
                if report.step():
                    report.show(*np.mean(figures, axis=0))
            logits = jnp.concatenate([predict(now, images) for images in in_chunks(data.test_x)])
            test_loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, data.test_y).mean())
            predicted = np.asarray(logits.argmax(-1))
            mean, share = np.mean(figures, axis=0)
            report.epoch(mean, share, test_loss, predicted)

    if args.save:
        save(now.variables, args.save)
    return report.finish(predicted, sum(value.size for value in jax.tree.leaves(now.params)))


if __name__ == "__main__":
    raise SystemExit(main())
