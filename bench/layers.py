# SPDX-License-Identifier: Apache-2.0
"""What does each layer cost, forward and with its gradient, beside the same layer of the installed Flax?

The same seed, sizes and compiler; the two interleaved. Memory is the compiled programs' own account of temporaries.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp

import batiste.nnx
from measure import Slices, machine, print_table

Build = Callable[[Any, Any], Any]  # the library and its streams; gives the layer

SEQUENCE, IMAGE = (16, 128, 512), (16, 32, 32, 64)
LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "Linear": (lambda nnx, rngs: nnx.Linear(512, 1024, rngs=rngs), SEQUENCE),
    "LinearGeneral": (lambda nnx, rngs: nnx.LinearGeneral(512, (8, 64), rngs=rngs), SEQUENCE),
    "Einsum": (lambda nnx, rngs: nnx.Einsum("bti,ihd->bthd", (512, 8, 64), (8, 64), rngs=rngs), SEQUENCE),
    "Conv 1x1": (lambda nnx, rngs: nnx.Conv(64, 64, (1, 1), rngs=rngs), IMAGE),
    "Conv 3x3": (lambda nnx, rngs: nnx.Conv(64, 64, (3, 3), rngs=rngs), IMAGE),
    "Conv 3x3, stride 2": (lambda nnx, rngs: nnx.Conv(64, 64, (3, 3), strides=2, rngs=rngs), IMAGE),
    "Conv 3x3, by channel": (lambda nnx, rngs: nnx.Conv(64, 64, (3, 3), feature_group_count=64, rngs=rngs), IMAGE),
    "Conv 5, causal": (lambda nnx, rngs: nnx.Conv(512, 128, 5, padding="CAUSAL", rngs=rngs), SEQUENCE),
    "ConvTranspose 3x3": (lambda nnx, rngs: nnx.ConvTranspose(64, 32, (3, 3), strides=(2, 2), rngs=rngs), IMAGE),
    "BatchNorm": (lambda nnx, rngs: nnx.BatchNorm(64, rngs=rngs), IMAGE),
    "BatchNorm, bfloat16": (lambda nnx, rngs: nnx.BatchNorm(64, dtype=jnp.bfloat16, rngs=rngs), IMAGE),
    "GroupNorm": (lambda nnx, rngs: nnx.GroupNorm(64, 8, rngs=rngs), IMAGE),
    "InstanceNorm": (lambda nnx, rngs: nnx.InstanceNorm(64, rngs=rngs), IMAGE),
    "LayerNorm": (lambda nnx, rngs: nnx.LayerNorm(512, rngs=rngs), SEQUENCE),
    "RMSNorm": (lambda nnx, rngs: nnx.RMSNorm(512, rngs=rngs), SEQUENCE),
    "MultiHeadAttention": (lambda nnx, rngs: nnx.MultiHeadAttention(8, 512, decode=False, rngs=rngs), SEQUENCE),
    "MultiHeadAttention, dropout": (
        lambda nnx, rngs: nnx.MultiHeadAttention(
            8, 512, decode=False, dropout_rate=0.1, deterministic=False, rngs=rngs
        ),
        SEQUENCE,
    ),
    "Dropout": (lambda nnx, rngs: nnx.Dropout(0.1, rngs=rngs), SEQUENCE),
    "LSTMCell in RNN": (lambda nnx, rngs: nnx.RNN(nnx.LSTMCell(512, 128, rngs=rngs)), SEQUENCE),
    "GRUCell in RNN": (lambda nnx, rngs: nnx.RNN(nnx.GRUCell(512, 128, rngs=rngs)), SEQUENCE),
    "LoRALinear": (lambda nnx, rngs: nnx.LoRALinear(512, 512, lora_rank=8, rngs=rngs), SEQUENCE),
    "WeightNorm": (lambda nnx, rngs: nnx.WeightNorm(nnx.Linear(512, 512, rngs=rngs), rngs=rngs), SEQUENCE),
    "SpectralNorm": (lambda nnx, rngs: nnx.SpectralNorm(nnx.Linear(512, 512, rngs=rngs), rngs=rngs), SEQUENCE),
    "max_pool 3x3": (lambda nnx, rngs: nnx.Sequential(partial(nnx.max_pool, window_shape=(3, 3))), IMAGE),
    "avg_pool 2x2": (
        lambda nnx, rngs: nnx.Sequential(partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))),
        IMAGE,
    ),
}


def programs(nnx: Any, build: Build, shape: tuple[int, ...]) -> dict[str, tuple[Any, Callable[[], object]]]:
    """The compiled pass forward and the compiled gradient, each with its call."""
    graphdef, params, rest = nnx.split(build(nnx, nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), shape)

    def forward(params, x):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        return layer(x), nnx.state(layer, nnx.Not(nnx.Param))

    def gradient(params, x, direction):
        _, pull, after = jax.vjp(forward, params, x, has_aux=True)
        return pull(direction), after

    direction = jax.tree.map(
        lambda y: jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype), forward(params, x)[0]
    )
    found = {}
    for name, function, args in (("forward", forward, (params, x)), ("gradient", gradient, (params, x, direction))):
        compiled = jax.jit(function).lower(*args).compile()
        found[name] = compiled, partial(compiled, *args)
    return found


def compare(build: Build, shape: tuple[int, ...], seconds: float) -> dict[str, float]:
    """batiste's figures by Flax's."""
    ours, theirs = (programs(nnx, build, shape) for nnx in (batiste.nnx, flax.nnx))
    row = {}
    for name in ours:
        slices = Slices({"batiste": ours[name][1], "flax": theirs[name][1]}, seconds)
        row[f"{name} time"] = slices.ratio("batiste", "flax")
    kept, needed = (2**20 + side["gradient"][0].memory_analysis().temp_size_in_bytes for side in (ours, theirs))
    return {**row, "gradient memory": kept / needed}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="layers whose names hold one of these words (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per program (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    args = parser.parse_args()

    chosen = {n: layer for n, layer in LAYERS.items() if not args.names or any(word in n for word in args.names)}
    rows = {name: compare(build, shape, args.seconds) for name, (build, shape) in chosen.items()}
    print(machine())
    headings = ["forward time", "gradient time", "gradient memory"]
    print_table("batiste / flax; CPU time, and temporaries with 1 MiB more on each side", ["layer", *headings],
                [[name, *(f"{row[heading]:.2f}" for heading in headings)] for name, row in rows.items()])  # fmt: skip
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
