# SPDX-License-Identifier: Apache-2.0
"""A user's program, as anybody would write it: dropout, batch statistics, shuffled epochs, an evaluation, a checkpoint.

`python interrupted.py FOLDER` trains, or goes on, and prints a digest of all that it has in the end. `--kill-at 17`
ends it as a crash would, after the 17th step; `--slow` leaves time for signals; `--stuck-at 5` hangs in a hook.
`--functional` trains the same network as a pure function of a dict; `--sync` waits for each save; `--workers 2` reads
the data by a Loader with worker processes, to all devices that there are.
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
from typing import Any

import jax
import numpy as np
import optax

from batiste import linen, nnx
from batiste.checkpoint import Manager
from batiste.data import Loader, prefetch
from batiste.sharding import data_parallel
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


class Pure(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(16)(x))
        return linen.Dense(3)(linen.Dropout(0.3, deterministic=not train)(linen.relu(x)))


def examples(steps: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * BATCH, 6)).astype(np.float32)
    return x, x[:, :3].argmax(-1)


class Records:
    """The examples, one by one, for worker processes."""

    def __init__(self, steps: int):
        self.steps = steps
        self.x, self.y = examples(steps)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.x[i], int(self.y[i])


class Patient(Manager):
    """A Manager that waits for each save."""

    def save(self, step: int, tree: Any, **more: Any) -> bool:
        return super().save(step, tree, **{**more, "wait": True})


def functional() -> tuple[Any, Any]:
    """A step `(state, batch) -> (state, metrics)` and the state, in which all is that it needs."""
    net, tx = Pure(), optax.adam(1e-2)
    variables = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, np.zeros((1, 6), np.float32))
    state = {**variables, "opt": tx.init(variables["params"]), "key": jax.random.key(2)}

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        key, dropout = jax.random.split(state["key"])

        def loss(params: Any) -> Any:
            logits, written = net.apply({"params": params, "batch_stats": state["batch_stats"]}, batch[0],
                                        rngs={"dropout": dropout}, mutable=["batch_stats"])  # fmt: skip
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), written

        (value, written), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt = tx.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        seen = (batch[0][:, 0] * np.arange(1, BATCH + 1)).sum()
        return {**written, "params": params, "opt": opt, "key": key}, {"loss": value, "seen": seen}

    return step, state


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
    parser.add_argument("--functional", action="store_true")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--steps", type=int, default=STEPS_PER_EPOCH, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    x, y = examples(args.steps)

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.default_rng(epoch).permutation(len(x))
        for start in range(0, len(x), BATCH):
            chosen = order[start : start + BATCH]
            print("seen", epoch, *sorted(chosen), flush=True)
            yield x[chosen], y[chosen]

    data: Any = batches
    if args.workers is not None:
        place = data_parallel() if len(jax.devices()) > 1 else None
        data = prefetch(Loader(Records(args.steps), BATCH, workers=args.workers), place=place)
    hooks: list[Any] = [JsonLines(args.folder / "metrics.jsonl"), Faults(args)]
    if args.functional:
        step, state = functional()
    else:
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        ema = EMA(model, 0.9, only=nnx.Param)
        step, state = train_step(loss, clip=1.0, guard=Guard("rollback", "skip", every=5), ema=ema), (model, optimizer)
        held_out = [(x[:10], y[:10]), (x[10:15], y[10:15])]
        hooks.insert(1, Evaluation(held_out, {"accuracy": accuracy(), "loss": log_loss()}, every=8))
    run = fit(step, state, data, Until(epochs=args.epochs), hooks, every=5,
              checkpoints=(Patient if args.sync else Manager)(args.folder / "checkpoints", every=7))  # fmt: skip
    digest = hashlib.sha256()
    for value in jax.tree.leaves(
        run.state if args.functional else [nnx.as_pure(nnx.state(part)) for part in (*run.state, step.extras)]
    ):
        key = jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(value) if key else value).tobytes())
    print("digest", digest.hexdigest(), run.step, run.epoch, file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
