# SPDX-License-Identifier: Apache-2.0
"""What does attention cost, forward and backward, beside the installed Flax?

Queries, keys and values [batch, length, heads, depth] in float32, compiled: the time, and the memory that it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp

import batiste.nn
from measure import Slices, machine, print_table

ROWS: list[tuple[tuple[int, ...], str]] = [
    ((16, 64, 4, 32), "none"),
    ((8, 256, 8, 32), "none"),
    ((8, 256, 8, 32), "mask"),
    ((8, 256, 8, 32), "causal"),
    ((8, 256, 8, 32), "causal, dropout"),
    ((2, 1024, 8, 64), "causal"),
    ((2, 2048, 4, 64), "none"),
]


def options(kind: str, length: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {"is_causal": "causal" in kind}
    if "dropout" in kind:
        chosen |= {"dropout_rng": jax.random.key(1), "dropout_rate": 0.1}
    if kind == "mask":
        chosen["mask"] = jnp.tri(length)[None, None]
    return chosen


def forward_and_back(attend: Callable[..., jax.Array], x: list[jax.Array]) -> jax.stages.Compiled:
    def run(q, k, v):
        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(y)

    return jax.jit(run).lower(*x).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="time per row (default: 6)")
    args = parser.parse_args()

    rows = []
    for shape, kind in ROWS:
        x = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]
        programs = {
            name: forward_and_back(partial(nn.dot_product_attention, **options(kind, shape[1])), x)
            for name, nn in (("batiste", batiste.nn), ("flax", flax.nnx))
        }
        slices = Slices({name: partial(program, *x) for name, program in programs.items()}, args.seconds)
        found = [p.memory_analysis() for p in programs.values()]
        memory = [f"{m.temp_size_in_bytes / 2**20:.0f}" if m else "?" for m in found]
        times = [f"{slices.median(name) * 1e3:.1f}" for name in programs]
        rows.append([f"{shape}", kind, *times, f"{slices.ratio('batiste', 'flax'):.2f}", *memory])
    print(machine())
    header = ["shape", "mask", "batiste", "flax", "batiste / flax", "batiste MiB", "flax MiB"]
    print_table("Forward and backward, CPU milliseconds per call, and temporary memory", header, rows)


if __name__ == "__main__":
    main()
