# SPDX-License-Identifier: Apache-2.0
"""What was saved on some devices comes back, bit for bit, on any others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste import checkpoint

LONG = os.environ.get("BATISTE_FAULTS") == "long"
COUNTS = (1, 2, 4, 8)
VALUES = {
    "kernel": np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32),
    "bias": np.random.default_rng(1).standard_normal(8).astype(np.float32),
    "step": np.int32(7),
}


def rows(count: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("d",)), PartitionSpec("d"))


def columns(count: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[-count:]), ("d",)), PartitionSpec(None, "d"))


def both(count: int) -> NamedSharding:
    devices = np.array(jax.devices()[:count]).reshape(-1, 2 if count > 1 else 1)
    return NamedSharding(Mesh(devices, ("a", "b")), PartitionSpec("a", "b"))


MESHES: tuple[Callable[[int], NamedSharding], ...] = (rows, columns, both)


def spread(values: dict[str, Any], place: NamedSharding) -> dict[str, Any]:
    """The kernel as `place` says, all else on every device of it."""
    everywhere = NamedSharding(place.mesh, PartitionSpec())
    return {name: jax.device_put(x, place if np.ndim(x) == 2 else everywhere) for name, x in values.items()}


@pytest.mark.parametrize("onto", MESHES)
@pytest.mark.parametrize("saved_on", COUNTS if LONG else (1, 8))
def test_a_checkpoint_comes_back_on_any_mesh(saved_on: int, onto: Any, tmp_path: Path) -> None:
    zeros = {name: np.zeros_like(x) for name, x in VALUES.items()}
    for mesh in MESHES if LONG else (columns,):
        checkpoint.save(tmp_path / "x.ckpt", spread(VALUES, mesh(saved_on)))
        for count in COUNTS:
            target = spread(zeros, onto(count))
            loaded = checkpoint.load(tmp_path / "x.ckpt", into=target)
            for name, x in VALUES.items():
                assert loaded[name].sharding == target[name].sharding
                assert np.asarray(loaded[name]).tobytes() == x.tobytes()
