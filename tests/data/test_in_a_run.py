# SPDX-License-Identifier: Apache-2.0
"""Loaders in `fit`: a run that was stopped goes on with the very next batch, prefetched or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.checkpoint import Manager
from batiste.data import Loader, prefetch
from batiste.training import Hook, fit, train_step


class Epochs(Hook):
    def __init__(self):
        self.ends: list[int] = []

    def epoch(self, run: Any) -> None:
        self.ends.append(run.step)

    def state(self) -> Any:
        return self.ends

    def restore(self, state: Any) -> None:
        self.ends = state


def batches(kind: str) -> Any:
    rng = np.random.default_rng(0)
    loader = Loader(rng.normal(size=(22, 2)).astype(np.float32), 4)
    if kind == "feed":
        return loader.feed(epochs=None)
    return prefetch(loader, 3) if kind == "prefetched" else loader


@pytest.mark.parametrize("kind", ["loader", "prefetched", "feed"])
def test_a_stopped_run_goes_on_with_the_next_batch(kind: str, tmp_path: Path) -> None:
    def trained(until: int, store: Manager | None) -> tuple[np.ndarray, list[int]]:
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        step = train_step(lambda model, x: ((model(x) - x) ** 2).mean())
        epochs = Epochs()
        fit(step, (model, optimizer), batches(kind), until, [epochs], checkpoints=store)
        return np.asarray(model.kernel[...]), epochs.ends

    whole = trained(16, None)
    for until in (3, 6, 10, 16):  # in an epoch of six batches, at its end, in the next one
        with Manager(tmp_path / "run", every=100) as checkpoints:
            parts = trained(until, checkpoints)
    np.testing.assert_array_equal(whole[0], parts[0])
    assert whole[1] == parts[1] == ([] if kind == "feed" else [6, 12])
