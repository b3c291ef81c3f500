# SPDX-License-Identifier: Apache-2.0
"""What does a sealed save cost beside Orbax's own, and how long does a save in the background hold up the loop?

Both write the same arrays to the same disk in turns; batiste returns when the bytes are on the medium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as orbax

from batiste import checkpoint
from measure import machine, print_table

PARTS = 8


def seconds(f: Callable[..., object], *args: Any, **kwargs: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(f(*args, **kwargs))
    return time.perf_counter() - began


def measure(mib: int, rounds: int, folder: Path) -> list[float]:
    """Seconds: batiste, batiste in the background until it returns, Orbax, loading with batiste, with Orbax."""
    keys = jax.random.split(jax.random.key(0), PARTS)
    tree = {f"w{i}": jax.random.normal(key, (mib * 2**18 // PARTS // 512, 512)) for i, key in enumerate(keys)}
    jax.block_until_ready(tree)
    found: list[list[float]] = []
    for n in range(rounds):
        ours, background, theirs = (folder / f"{name}{n}" for name in ("ours", "background", "orbax"))
        saved = seconds(checkpoint.save, ours, tree)
        began = time.perf_counter()
        saving = checkpoint.save_async(background, tree)
        returned = time.perf_counter() - began
        saving.wait()
        orbaxed = seconds(orbax.save, str(theirs), tree)
        into = jax.tree.map(jnp.zeros_like, tree)
        loaded = seconds(checkpoint.load, ours, into=into)
        restored = seconds(orbax.load, str(theirs), into)
        found.append([saved, returned, orbaxed, loaded, restored])
        for path in (ours, background):
            path.unlink()
        shutil.rmtree(theirs)
    return [statistics.median(column) for column in zip(*found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[48, 512], help="sizes of the state")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(machine())
    rows = []
    for mib in args.mib:
        with tempfile.TemporaryDirectory() as folder:
            saved, returned, orbaxed, loaded, restored = measure(mib, args.rounds, Path(folder))
        rows.append([f"{mib} MiB", f"{saved:.2f}", f"{saved / orbaxed:.2f}", f"{returned * 1e3:.1f}",
                     f"{returned / saved:.3f}", f"{loaded:.2f}", f"{loaded / restored:.2f}"])  # fmt: skip
    print_table(
        "sealed checkpoints", ["state", "save s", "x Orbax", "background ms", "x save", "load s", "x Orbax"], rows
    )


if __name__ == "__main__":
    main()
