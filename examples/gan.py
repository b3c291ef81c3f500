# SPDX-License-Identifier: Apache-2.0
"""A generative adversarial network learns a ring of eight blobs: two models, two optimizers, two steps, one loop."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.training import EMA, Progress, fit, train_step

NOISE = 8


def mlp(sizes: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Sequential:
    layers: list[Any] = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nnx.Linear(inner, outer, rngs=rngs), jnp.tanh]
    return nnx.Sequential(*layers[:-1])


def real_points(rng: np.random.Generator, n: int) -> np.ndarray:
    """points[n, 2] near one of eight places on the circle of radius two"""
    angle = rng.integers(0, 8, n) * np.pi / 4
    return (2 * np.stack([np.cos(angle), np.sin(angle)], -1) + 0.1 * rng.normal(size=(n, 2))).astype(np.float32)


def critic_loss(critic: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """How badly real points (label one) and made ones (label zero) are told apart."""
    real, fake = batch
    return (jax.nn.softplus(-critic(real)) + jax.nn.softplus(critic(fake))).mean()


def generator_loss(generator: Any, batch: tuple[Any, jax.Array]) -> jax.Array:
    """How badly the critic is fooled. The critic comes with the batch, so it has no gradient and does not change."""
    critic, noise = batch
    return jax.nn.softplus(-critic(generator(noise))).mean()


def train(steps: int, batch: int = 256, seed: int = 0) -> tuple[Any, dict[str, float]]:
    """The averaged generator, and the losses of the last steps."""
    rngs = nnx.Rngs(seed)
    generator, critic = mlp((NOISE, 64, 64, 2), rngs), mlp((2, 64, 64, 1), rngs)
    g_optimizer, c_optimizer = (nnx.Optimizer(m, optax.adam(1e-3, b1=0.5), wrt=nnx.Param) for m in (generator, critic))
    ema = EMA(generator, 0.99, only=nnx.Param)
    g_step, c_step = train_step(generator_loss, ema=ema), train_step(critic_loss)
    imagine = nnx.jit(lambda generator, noise: generator(noise))

    def step(generator: Any, g_optimizer: Any, critic: Any, c_optimizer: Any, batch: Any) -> dict[str, jax.Array]:
        real, noise = batch
        critic_now = c_step(critic, c_optimizer, (real, imagine(generator, noise)))
        generator_now = g_step(generator, g_optimizer, (critic, noise))
        return {"critic": critic_now["loss"], "generator": generator_now["loss"]}

    def batches(epoch: int) -> Any:
        rng = np.random.default_rng((seed, epoch))
        yield real_points(rng, batch), rng.normal(size=(batch, NOISE)).astype(np.float32)

    run = fit(step, (generator, g_optimizer, critic, c_optimizer), batches, steps, [Progress()], every=100)
    return ema.apply_to(generator), run.latest()


def blobs_hit(points: np.ndarray) -> int:
    """How many of the eight blobs have at least three of a hundred points within half a unit."""
    angle = np.arange(8) * np.pi / 4
    centres = 2 * np.stack([np.cos(angle), np.sin(angle)], -1)
    near = np.linalg.norm(points[:, None] - centres, axis=-1) < 0.5
    return int((near.mean(0) > 0.03).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    generator, losses = train(args.steps)
    made = generator(jnp.asarray(np.random.default_rng(1).normal(size=(2000, NOISE)), jnp.float32))
    print(f"{blobs_hit(np.asarray(made))} of 8 blobs, " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
