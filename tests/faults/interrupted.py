# SPDX-License-Identifier: Apache-2.0
"""A user's program, as anybody would write it: dropout, batch statistics, shuffled epochs, an evaluation, a checkpoint.

`python interrupted.py FOLDER` trains, or goes on, and prints a digest of all that it has in the end. `--kill-at 17`
ends it as a crash would, after the 17th step; `--slow` leaves time for signals; `--stuck-at 5` hangs in a hook.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax

from batiste import nnx
from batiste.checkpoint import Manager
from batiste.training import EMA, Evaluation, Guard, Hook, JsonLines, Until, accuracy, fit, log_loss, train_step

STEPS_PER_EPOCH, EPOCHS, BATCH = 12, 3, 8


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def examples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS_PER_EPOCH * BATCH, 6)).astype(np.float32)
    return x, x[:, :3].argmax(-1)


def loss(model: Net, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = model(batch[0])
    hits = (logits.argmax(-1) == batch[1]).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {"accuracy": hits}


class Faults(Hook):
    """Writes down which examples were seen, and does what the command line asks for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def step(self, run) -> None:
        print(f"step {run.step}", flush=True)
        time.sleep(0.05 if self.args.slow else 0)
        while run.step == self.args.stuck_at:
            time.sleep(0.1)
        if run.step == self.args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--stuck-at", type=int)
    parser.add_argument("--slow", action="store_true")
    args = parser.parse_args()
    x, y = examples()

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.default_rng(epoch).permutation(len(x))
        for start in range(0, len(x), BATCH):
            chosen = order[start : start + BATCH]
            print("seen", epoch, *sorted(chosen), flush=True)
            yield x[chosen], y[chosen]

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    ema = EMA(model, 0.9, only=nnx.Param)
    step = train_step(loss, clip=1.0, guard=Guard("rollback", "skip", every=5), ema=ema)
    held_out = [(x[:10], y[:10]), (x[10:15], y[10:15])]
    hooks = [
        JsonLines(args.folder / "metrics.jsonl"),
        Evaluation(held_out, {"accuracy": accuracy(), "loss": log_loss()}, every=8),
        Faults(args),
    ]
    run = fit(step, (model, optimizer), batches, Until(epochs=EPOCHS), hooks, every=5,
              checkpoints=Manager(args.folder / "checkpoints", every=7))  # fmt: skip
    digest = hashlib.sha256()
    for value in jax.tree.leaves([nnx.as_pure(nnx.state(part)) for part in (model, optimizer, step.extras)]):
        key = jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(value) if key else value).tobytes())
    print("digest", digest.hexdigest(), run.step, run.epoch, file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
