# SPDX-License-Identifier: Apache-2.0
"""Does memory stay flat over many jitted steps, and is a model that is dropped freed although it was in a plan?"""

from __future__ import annotations

import argparse
import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from batiste import nnx
from measure import machine, print_table

ADAM = optax.adam(1e-3)  # one object: another would be another static setting, and so another program


class Net(nnx.Module):
    """A model whose arrays are large enough to be seen in the figures when they stay behind."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


@nnx.jit
def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def resident() -> float:
    """MiB of memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def build(width: int) -> tuple[Net, Any, jax.Array]:
    model = Net(width, nnx.Rngs(0))
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param), jnp.ones((4, width))


def census() -> dict[str, float]:
    """What the process holds: memory, arrays and objects, after a collection."""
    gc.collect()
    return {"MiB": resident(), "arrays": len(jax.live_arrays()), "objects": len(gc.get_objects())}


def many_steps(steps: int, marks: int, width: int) -> list[dict[str, float]]:
    """The census at `marks` moments, evenly over `steps` steps that now and then switch between train and eval."""
    model, optimizer, x = build(width)
    rows = []
    for step in range(1, steps + 1):
        train_step(model, optimizer, x)
        if step % 500 == 0:  # a structural change and back
            model.eval()
            train_step(model, optimizer, x)
            model.train()
        if step % (steps // marks) == 0:
            rows.append({"steps": step, **census()})
    return rows


def dropped_models(models: int, width: int) -> list[dict[str, float]]:
    """The census after each of several models was built, trained a little, and dropped; none may be alive then."""
    rows = []
    for number in range(1, models + 1):
        model, optimizer, x = build(width)
        for _ in range(3):
            train_step(model, optimizer, x)
        alive = [weakref.ref(model), weakref.ref(optimizer)]
        del model, optimizer, x
        rows.append({"model": number, **census(), "alive": sum(r() is not None for r in alive)})
    return rows


def show(title: str, rows: list[dict[str, float]]) -> None:
    figures = [[f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" for v in row.values()] for row in rows]
    print_table(title, list(rows[0]), figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="one JSON line with everything at the end")
    args = parser.parse_args()
    print(machine())

    steps = many_steps(args.steps, 10, args.width)
    show("a model, trained for long", steps)
    print(f"  from step {steps[0]['steps']:,} on: {steps[-1]['MiB'] - steps[0]['MiB']:+.1f} MiB")
    models = dropped_models(args.models, args.width)
    show("models built, trained for three steps, dropped", models)
    if args.json:
        print(json.dumps({"machine": machine(), "steps": steps, "models": models}))


if __name__ == "__main__":
    main()
