# SPDX-License-Identifier: Apache-2.0
"""Training for long: spikes among thousands of steps, memory that does not grow or runs out, models that go."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import checkpoint, nnx
from batiste.training import Guard, fit, train_step

LONG = os.environ.get("BATISTE_FAULTS") == "long"
ROOT = Path(__file__).parents[2]
ADAM = optax.adam(1e-3)


def loss(model: Any, batch: Any) -> Any:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def net(seed: int = 0, width: int = 8) -> tuple[Any, Any]:
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(nnx.Linear(4, width, rngs=rngs), nnx.tanh, nnx.Linear(width, 1, rngs=rngs))
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def kib() -> int:
    """What of this process lies in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_spikes_among_thousands_of_steps_are_found_and_little_else(policy: Any) -> None:
    """20 batches with ten times the usual scale in 10,000 steps: all are found, with one false alarm at most."""
    count, number = (10_000, 20) if LONG else (2_000, 4)
    rng = np.random.default_rng(2)
    spikes = set(rng.choice(np.arange(300, count), number, replace=False).tolist())

    def run() -> tuple[set[int], bytes]:
        noise = np.random.default_rng(3)
        model, optimizer = net()
        guard = Guard("skip", policy, every=50)
        step, verdicts = train_step(loss, guard=guard), []
        for n in range(count):
            x = noise.normal(size=(32, 4)).astype(np.float32)
            y = np.tanh(x[:, :1]) + 0.3 * noise.normal(size=(32, 1)).astype(np.float32)
            verdicts.append(step(model, optimizer, (x, y * (10 if n in spikes else 1)))["verdict"])
        state = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
        return {n for n, v in enumerate(jax.device_get(verdicts)) if v}, b"".join(
            np.asarray(x).tobytes() for x in state
        )

    found, bits = run()
    assert spikes <= found
    assert len(found - spikes) <= 1
    assert run() == (found, bits), "what a guard does is the same in every run"


def test_a_long_run_leaves_nothing_behind() -> None:
    """100,000 steps: memory, files, threads and arrays stay what they were; one program."""
    first, then = (10_000, 90_000) if LONG else (500, 2_000)
    traces = []

    def traced(model: Any, batch: Any) -> Any:
        traces.append(1)
        return loss(model, batch)

    model, optimizer = net()
    step = train_step(traced)
    batch = (jnp.ones((8, 4)), jnp.ones((8, 1)))

    def steps(count: int) -> tuple[int, int, int, int]:
        for _ in range(count):
            metrics = step(model, optimizer, batch)
        del metrics
        jax.block_until_ready(nnx.state(model))
        gc.collect()
        return kib(), len(os.listdir("/proc/self/fd")), threading.active_count(), len(jax.live_arrays())

    before, traced_before = steps(first), len(traces)
    after = steps(then)
    assert after[0] - before[0] <= 8 << 10, "KiB"
    assert after[1:] == before[1:]
    assert len(traces) == traced_before


def test_models_that_are_dropped_are_gone() -> None:
    count = 150 if LONG else 12
    batch = (jnp.ones((8, 4)), jnp.ones((8, 1)))
    step = train_step(loss)

    def build() -> weakref.ref:
        model, optimizer = net()
        step(model, optimizer, batch)
        return weakref.ref(model)

    for _ in range(5):
        build()
    gc.collect()
    before, arrays = kib(), len(jax.live_arrays())
    for _ in range(count):
        assert build()() is None, "a model is gone when nothing refers to it, before the collector runs"
    gc.collect()
    assert len(jax.live_arrays()) <= arrays
    assert kib() - before <= 40 * count + 2048, "KiB"


OUT_OF_MEMORY = """
import resource, sys
import jax.numpy as jnp, optax
from batiste import checkpoint, nnx
from batiste.training import fit, train_step

def loss(model, batch):
    y = model(batch[0]).sum(1)
    return jnp.sort(jnp.outer(y, batch[1]).reshape(-1))[::7].sum()

def run(batches):
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    manager = checkpoint.Manager(sys.argv[1], every=2)
    return fit(train_step(loss), (model, optimizer), batches, len(batches), checkpoints=manager)

small, large = (jnp.ones((4, 4)), jnp.ones(2)), (jnp.ones((4096, 4)), jnp.ones(60000))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
try:
    run([small, small, small, large, small])
except MemoryError as error:
    print(error)
print(checkpoint.Manager(sys.argv[1]).restore_latest().step, run([small] * 4).step)
"""


def test_memory_that_runs_out_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)], capture_output=True, text=True,
                           env=env, timeout=120)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"got \d+ bytes.*\n  Fix: .*parts=", ended.stdout), ended.stdout
    assert ended.stdout.endswith("2 4\n")


def test_a_step_that_fails_ends_the_run_and_the_saved_steps_stay(tmp_path: Path) -> None:
    model, optimizer = net()
    plain, count = train_step(loss), iter(range(100))

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        if next(count) == 7:
            raise MemoryError("out of memory while trying to allocate 1099511627776 bytes")
        return plain(model, optimizer, batch)

    data = [(jnp.ones((8, 4)), jnp.ones((8, 1)))] * 20
    manager = checkpoint.Manager(tmp_path, every=3)
    with pytest.raises(MemoryError, match="1099511627776 bytes"):
        fit(step, (model, optimizer), data, until=20, checkpoints=manager)
    assert checkpoint.Manager(tmp_path).steps() == [3, 6]
    checkpoint.verify(manager.path(6))
