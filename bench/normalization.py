# SPDX-License-Identifier: Apache-2.0
"""What does LayerNorm cost in a deep residual network: multiplications, seconds to compile, and time per step?

The gradient of a stack of `x + gelu(norm(x) @ W1) @ W2`, beside the installed Flax, and beside autodiff of the formula
as textbooks write it, the mean first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import flax.nnx
import jax
import jax.numpy as jnp

import batiste.nnx
from measure import Slices, machine, print_table

WIDTH, ROWS = 128, 64


def textbook(x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


def norm_of(nnx) -> Callable[[jax.Array], jax.Array]:
    return nnx.LayerNorm(WIDTH, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


def step(norm: Callable[[jax.Array], jax.Array], weights, x) -> jax.Array:
    def loss(weights):
        y = x
        for up, down in weights:
            y = y + jax.nn.gelu(norm(y) @ up) @ down
        return jnp.mean(jnp.square(y))

    return jax.grad(loss)(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="time per row (default: 6)")
    parser.add_argument("--depths", type=int, nargs="*", default=[6, 12, 24])
    args = parser.parse_args()

    rows = []
    for depth in args.depths:
        keys = jax.random.split(jax.random.key(0), 2 * depth)
        draw = jax.jit(lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5)
        weights = [(draw(up), draw(down)) for up, down in zip(keys[::2], keys[1::2])]
        x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
        norms = {"batiste": norm_of(batiste.nnx), "flax": norm_of(flax.nnx), "textbook": textbook}
        calls, figures = {}, {}
        for name, norm in norms.items():
            lowered = jax.jit(partial(step, norm)).lower(weights, x)
            start = time.process_time()
            program = lowered.compile()
            figures[name] = [(program.as_text() or "").count(" multiply("), time.process_time() - start]
            calls[name] = partial(program, weights, x)
        slices = Slices(calls, args.seconds)
        for name, (count, seconds) in figures.items():
            rows.append([str(depth), name, str(count), f"{seconds:.2f}", f"{slices.median(name) * 1e3:.2f}"])
    print(machine())
    print_table(
        "Gradient of a residual network", ["layers", "norm", "multiplications", "compile s", "step CPU ms"], rows
    )


if __name__ == "__main__":
    main()
