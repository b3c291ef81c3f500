# SPDX-License-Identifier: Apache-2.0
"""A program for the tests: trains a small network on the devices of all processes; goes on from the last checkpoint.

    python train_mlp.py FOLDER [--steps 6] [--save-every 2] [--die-at 5] [--stop-at 3]

Nothing in it knows how many processes there are. Prints `step N loss X` for each step, and in the end the figures of an
evaluation. With `--die-at N` the process `--die` kills itself before step N; with `--stop-at N` it gets a SIGTERM then.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from batiste import distributed, nn, nnx, sharding
from batiste.checkpoint import Manager
from batiste.data import Loader, prefetch
from batiste.graph import Module, Rngs
from batiste.training import Evaluation, JsonLines, fit, mean_of, train_step
from batiste.training.hooks import Hook

ROWS, FEATURES = 16, 32


class Mlp(Module):
    def __init__(self, rngs: Rngs):
        self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES, rngs=rngs), nn.Linear(4 * FEATURES, FEATURES, rngs=rngs)
        self.dropout = nn.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.dropout(nn.gelu(self.up(x))))


def loss(model: Any, batch: Any) -> Any:
    return jnp.mean((model(batch["x"]) - jnp.flip(batch["x"], -1)) ** 2)


def data(rows: int, **options: Any) -> Loader:
    x = np.random.default_rng(0).standard_normal((rows, FEATURES), np.float32)
    return Loader({"x": x}, ROWS, last="pad", **options)


class Fault(Hook):
    def __init__(self, process: int, die_at: int, stop_at: int):
        self.mine = distributed.world().process == process
        self.faults = {die_at: signal.SIGKILL, stop_at: signal.SIGTERM}

    def record(self, run: Any, step: int, values: Any) -> None:
        if "loss" in values:
            print(f"step {step} loss {values['loss']:.7f}", flush=True)

    def step(self, run: Any) -> None:
        if number := self.faults.get(run.step + 1):
            run.catch_up()
            distributed.barrier("all have printed what was done")
            if self.mine:
                os.kill(os.getpid(), number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=0)
    parser.add_argument("--die", type=int, default=1)
    args = parser.parse_args()
    print(distributed.initialize(), flush=True)
    with sharding.use(sharding.fsdp()):
        model = Mlp(Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        error = mean_of(lambda y, x: jnp.square(y - jnp.flip(x, -1)).mean(-1))
        held_out = Evaluation(data(40, shuffle=False), {"mse": error}, every=99, sanity=0,
                              predict=lambda model, batch: model(batch["x"]),
                              labels=lambda batch: batch["x"])  # fmt: skip
        run = fit(train_step(loss), (model, optimizer), prefetch(data(64)), args.steps, every=1,
                  hooks=[JsonLines(args.folder / "metrics.jsonl"), held_out,
                         Fault(args.die, args.die_at, args.stop_at)],
                  checkpoints=Manager(args.folder, every=args.save_every, keep=2))  # fmt: skip
        print(f"evaluation {run.latest()['eval/mse']:.7f}", flush=True)


if __name__ == "__main__":
    main()
