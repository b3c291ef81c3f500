# SPDX-License-Identifier: Apache-2.0
"""Loaders in `fit`: a run that was stopped goes on with the very next batch, prefetched or not, with workers or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.data import Loader, prefetch
from batiste.training import Hook, fit, train_step
from tests.faults.store import Store


class Epochs(Hook):
    def __init__(self):
        self.ends: list[int] = []

    def epoch(self, run: Any) -> None:
        self.ends.append(run.step)

    def state(self) -> Any:
        return self.ends

    def restore(self, state: Any) -> None:
        self.ends = state


def batches(kind: str, workers: int = 0) -> Any:
    rng = np.random.default_rng(0)
    loader = Loader(rng.normal(size=(22, 2)).astype(np.float32), 4, workers=workers)
    if kind == "feed":
        return loader.feed(epochs=None)
    return prefetch(loader, 3) if kind == "prefetched" else loader


@pytest.mark.parametrize("kind", ["loader", "prefetched", "feed"])
@pytest.mark.parametrize("stops", [(3,), (6,), (5, 12)])
def test_a_stopped_run_goes_on_with_the_next_batch(kind: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    def trained(until: int, store: Store | None) -> tuple[np.ndarray, list[int]]:
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        step = train_step(lambda model, x: ((model(x) - x) ** 2).mean())
        epochs = Epochs()
        fit(step, (model, optimizer), batches(kind), until, [epochs], checkpoints=store)
        return np.asarray(model.kernel[...]), epochs.ends

    whole = trained(16, None)
    for until in (*stops, 16):
        parts = trained(until, Store(tmp_path / "run", every=100))
    np.testing.assert_array_equal(whole[0], parts[0])
    assert whole[1] == parts[1] == ([] if kind == "feed" else [6, 12])
