# SPDX-License-Identifier: Apache-2.0
"""A program for the tests: trains a small network on the devices of all processes; goes on from the last save.

    python train_mlp.py FOLDER [--steps 6] [--save-every 2] [--die-at 5] [--die 1]

Prints `step N loss X` for each step. With `--die-at N` the process `--die` kills itself before step N.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from batiste import distributed, nn, nnx, sharding
from batiste.graph import Module, Param, Rngs
from batiste.training.optimizer import Optimizer
from batiste.transforms.autodiff import value_and_grad
from batiste.transforms.compile import jit

ROWS, FEATURES = 16, 32


class Mlp(Module):
    def __init__(self, rngs: Rngs):
        self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES, rngs=rngs), nn.Linear(4 * FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nn.gelu(self.up(x)))


def train_step(model: Mlp, optimizer: Optimizer, x: Any) -> Any:
    loss, grads = value_and_grad(lambda model, x: jnp.mean((model(x) - jnp.flip(x, -1)) ** 2))(model, x)
    optimizer.update(model, grads)
    return loss


def rows_of(step: int, rows: slice) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((ROWS, FEATURES), np.float32)[rows]


def save(folder: Path, step: int, objects: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / f"step-{step}", nnx.to_pure_dict(nnx.state(objects)))


def restore_latest(folder: Path, objects: Any) -> int:
    """Fills the objects, whose arrays are in their places already, from the last whole checkpoint; gives its step."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    if not steps:
        return 0
    kept = nnx.state(objects)
    arrays = nnx.to_pure_dict(kept)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(kept, checkpointer.restore(folder / f"step-{max(steps)}", like))
    nnx.update(objects, kept)
    return max(steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--die", type=int, default=1)
    args = parser.parse_args()
    world = distributed.initialize()
    print(f"{world}; {jax.local_device_count()} of {jax.device_count()} devices", flush=True)
    with sharding.use(sharding.ready_plan(data=2, fsdp=-1)):
        model = Mlp(Rngs(0))
        optimizer = Optimizer(model, optax.adam(1e-2), wrt=Param)
        objects = {"model": model, "optimizer": optimizer}
        step = jit(train_step)
        begun = restore_latest(args.folder, objects)
        rows = distributed.process_slice(ROWS)
        for n in range(begun + 1, args.steps + 1):
            if n == args.die_at and world.process == args.die:
                os.kill(os.getpid(), signal.SIGKILL)
            loss = step(model, optimizer, distributed.global_batch(rows_of(n, rows)))
            print(f"step {n} loss {float(loss):.7f}", flush=True)
            if n % args.save_every == 0:
                save(args.folder, n, objects)
        distributed.barrier("end", timeout=60)


if __name__ == "__main__":
    main()
