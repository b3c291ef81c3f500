# SPDX-License-Identifier: Apache-2.0
"""The least that a loop needs to go on: one file, written beside and moved into its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.training.step import variables_of


class Store:
    """Keeps the newest state of a run with live objects."""

    def __init__(self, path: Path, every: int):
        self.path, self.every = path.with_suffix(".npz"), every

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def save(self, step: int, tree: Any, *, metrics: dict[str, float], healthy: bool) -> None:
        arrays = {f"v{n}": _bits(v.get_value()) for n, v in enumerate(self._variables(tree))}
        beside = self.path.with_suffix(".new.npz")
        beside.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, step=step, run=tree["run"], **arrays)  # type: ignore[arg-type]
        os.replace(beside, self.path)

    def restore_latest(self, into: Any) -> tuple[int, Any] | None:
        if not self.path.exists():
            return None
        with np.load(self.path) as found:
            for n, variable in enumerate(self._variables(into)):
                old, new = variable.get_value(), jnp.asarray(found[f"v{n}"])
                is_key = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
                variable.set_value(jax.random.wrap_key_data(new) if is_key else new)
            return int(found["step"]), {**into, "run": found["run"]}

    def wait(self) -> None:
        """Everything is written at once."""

    @staticmethod
    def _variables(tree: Any) -> Any:
        return variables_of((*tree["state"], tree["extras"]))


def _bits(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
