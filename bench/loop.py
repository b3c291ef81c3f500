# SPDX-License-Identifier: Apache-2.0
"""What does `fit` with all hooks cost over a bare loop of the same steps, and what do guards cost in a step?

A dense network whose step takes about 20 ms. The loops alternate in one process, and the ratio is that of the rounds
that were disturbed least; beside it stands the time that the loop needs by itself, measured with steps that do nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.training import Evaluation, Guard, JsonLines, Progress, StopEarly, fit, mean_of, train_step
from measure import machine, print_table


def loss(model: Any, batch: Any) -> Any:
    error = model(batch[0]) - batch[1]
    return jnp.square(error).mean(), {"mae": jnp.abs(error).mean()}


def network(width: int) -> tuple[Any, Any]:
    rngs = nnx.Rngs(0)
    layers = [layer for _ in range(4) for layer in (nnx.Linear(width, width, rngs=rngs), nnx.relu)]
    model = nnx.Sequential(*layers)
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def hooks(folder: Path) -> list[Any]:
    held_out = Evaluation([], {"mse": mean_of(lambda y, wanted: jnp.square(y - wanted))}, every=10**9, sanity=0)
    held_out.finish = lambda run: None  # an evaluation is work of its own, not a cost of the loop
    quiet = (folder / "progress.txt").open("w")
    return [Progress(seconds=0.2, file=quiet), JsonLines(folder / "metrics.jsonl"), held_out,
            StopEarly("loss", patience=10**9)]  # fmt: skip


def bare(step: Callable[..., Any], state: tuple[Any, Any], batches: list[Any]) -> None:
    metrics = None
    for batch in batches:
        metrics = step(*state, batch)
    jax.block_until_ready(metrics)


def seconds(f: Callable[[], object]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds):
        for name in names:
            found[name].append(seconds(calls[name]))
        names.reverse()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50, help="per round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = jax.device_put(tuple(rng.normal(size=(args.batch, args.width)).astype(np.float32) for _ in range(2)))
    batches = [batch] * args.steps
    folder = Path(tempfile.mkdtemp())

    step, state = train_step(loss, guard=Guard("skip", "skip")), network(args.width)
    plain, other = train_step(loss, guard=None), network(args.width)
    returning, third = train_step(loss, guard=Guard("rollback", "rollback")), network(args.width)
    times = alternate(
        {
            "bare loop": lambda: bare(step, state, batches),
            "fit, all hooks": lambda: fit(step, state, batches, args.steps, hooks(folder)),
            "bare loop, no guard": lambda: bare(plain, other, batches),
            "bare loop, rollback": lambda: bare(returning, third, batches),
        },
        args.rounds,
    )

    done = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1), "mae": jnp.float32(1), "verdict": jnp.int32(0)}
    nothing: Callable[..., Any] = lambda *_: done
    many = [batch] * 2000
    idle = alternate(
        {
            "bare": lambda: bare(nothing, state, many),
            "fit": lambda: fit(nothing, state, many, len(many), hooks(folder)),
        },
        args.rounds,
    )
    per_step = {name: min(t) / args.steps for name, t in times.items()}
    loop = (statistics.median(idle["fit"]) - statistics.median(idle["bare"])) / len(many)
    found = {
        "step_ms": 1e3 * per_step["bare loop"],
        "fit_ratio": per_step["fit, all hooks"] / per_step["bare loop"],
        "guard_ratio": per_step["bare loop"] / per_step["bare loop, no guard"],
        "rollback_ratio": per_step["bare loop, rollback"] / per_step["bare loop, no guard"],
        "loop_us": 1e6 * loop,
        "loop_share_of_20_ms": loop / 0.02,
    }
    if args.json:
        print(json.dumps(found))
        return
    print(machine())
    rows = [(name, f"{1e3 * t:.2f}", f"{t / per_step['bare loop']:.3f}") for name, t in per_step.items()]
    print_table("A step, in milliseconds", ("what", "ms", "by bare loop"), rows)
    print(f"\nThe loop by itself: {1e6 * loop:.0f} us a step, {100 * found['loop_share_of_20_ms']:.2f} % of 20 ms")


if __name__ == "__main__":
    main()
