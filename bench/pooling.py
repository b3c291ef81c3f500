# SPDX-License-Identifier: Apache-2.0
"""What does pooling cost, forward and backward, beside XLA's `reduce_window` and the installed Flax?

Maximum and mean over images [64, 32, 32, 64] in float32, compiled; the windows of classifiers and of residual networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import flax.nnx
import jax
import jax.numpy as jnp
from jax import lax

import batiste.nn
from measure import Slices, machine, print_table

WINDOWS = [((2, 2), (2, 2)), ((3, 3), (2, 2)), ((3, 3), (1, 1)), ((8, 8), (8, 8))]


def plain(which: str, window: tuple[int, int], strides: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """The pooling in one operation of XLA."""
    init, reduce_fn, scale = (-jnp.inf, lax.max, 1) if which == "max_pool" else (0.0, lax.add, window[0] * window[1])
    return lambda x: lax.reduce_window(x, init, reduce_fn, (1, *window, 1), (1, *strides, 1), "VALID") / scale


def forward_and_back(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], object]:
    def run(x):
        y, pull = jax.vjp(function, x)
        return y, pull(y)[0]

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="time per row (default: 6)")
    args = parser.parse_args()

    x = jax.random.normal(jax.random.key(0), (64, 32, 32, 64))
    rows = []
    for which in ("max_pool", "avg_pool"):
        for window, strides in WINDOWS:
            contenders = {
                "batiste": partial(getattr(batiste.nn, which), window_shape=window, strides=strides),
                "reduce_window": plain(which, window, strides),
                "flax": partial(getattr(flax.nnx, which), window_shape=window, strides=strides),
            }
            calls = {name: partial(forward_and_back(function), x) for name, function in contenders.items()}
            slices = Slices(calls, args.seconds)
            figures = [f"{slices.median(name) * 1e3:.1f}" for name in contenders]
            ratio = slices.ratio("batiste", "flax")
            rows.append([f"{which} {window} by {strides}", *figures, f"{ratio:.2f}"])
    print(machine())
    title = "Forward and backward, CPU milliseconds per call"
    print_table(title, ["pooling", "batiste", "reduce_window", "flax", "batiste / flax"], rows)


if __name__ == "__main__":
    main()
