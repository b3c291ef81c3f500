# SPDX-License-Identifier: Apache-2.0
"""REINFORCE balances a pole on a cart: the environment is a function, an episode a scan, the loss one line.

Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning";
the cart and its constants are those of Barto, Sutton & Anderson 1983, "Neuronlike adaptive elements".
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from batiste import nnx
from batiste.training import Progress, fit, train_step

LENGTH, EPISODES = 200, 32  # steps of an episode, episodes of a batch


def push(s: jax.Array, action: jax.Array) -> jax.Array:
    """The next (place, speed, angle, angular speed)[4] of cart and pole, after a push to the left (0) or right (1)."""
    _, v, angle, w = s
    pull = (20.0 * action - 10.0 + 0.05 * w**2 * jnp.sin(angle)) / 1.1
    turn = (9.8 * jnp.sin(angle) - jnp.cos(angle) * pull) / (0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1))
    return s + 0.02 * jnp.stack([v, pull - 0.05 * turn * jnp.cos(angle) / 1.1, w, turn])


@nnx.jit
def play(policy: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """states[episode, step, 4], actions[episode, step] and whether the pole still stood[episode, step]"""
    first, keys = 0.05 * jax.random.normal(key, (EPISODES, 4)), jax.random.split(key, LENGTH)

    def one(now: Any, key: jax.Array) -> Any:
        s, stands = now
        action = jax.random.categorical(key, policy(s))
        after = jax.vmap(push)(s, action.astype(jnp.float32))
        stands = stands & (jnp.abs(after[:, 0]) < 2.4) & (jnp.abs(after[:, 2]) < 0.21)
        return (jnp.where(stands[:, None], after, s), stands), (s, action, stands)

    _, found = jax.lax.scan(one, (first, jnp.ones(EPISODES, bool)), keys)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)


def loss(policy: Any, batch: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-Σ log π(action | state) · (return from here - mean return)"""
    states, actions, stands = batch
    alive = stands.astype(jnp.float32)
    to_go = jnp.cumsum(alive[:, ::-1], 1)[:, ::-1]
    usual = (to_go * alive).sum(0, keepdims=True) / jnp.maximum(alive.sum(0, keepdims=True), 1.0)
    advantage = alive * (to_go - usual)
    log_p = jax.nn.log_softmax(policy(states))
    chosen = jnp.take_along_axis(log_p, actions[..., None], -1)[..., 0]
    return -(chosen * advantage).sum() / alive.sum() / 20, {"steps": alive.sum(1).mean()}


def train(batches: int, seed: int = 0) -> list[float]:
    """How many steps the pole stood, on average, as the training went on."""
    rngs = nnx.Rngs(seed)
    policy = nnx.Sequential(nnx.Linear(4, 32, rngs=rngs), jnp.tanh, nnx.Linear(32, 2, rngs=rngs))
    optimizer = nnx.Optimizer(policy, optax.adam(1e-2), wrt=nnx.Param)
    learn = train_step(loss, clip=1.0)

    def step(policy: Any, optimizer: Any, key: jax.Array) -> dict[str, jax.Array]:
        return learn(policy, optimizer, play(policy, key))

    keys = [jax.random.key(seed + n) for n in range(batches)]
    run = fit(step, (policy, optimizer), keys, batches, [Progress()], every=10)
    return [row["steps"] for row in run.history]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=150)
    args = parser.parse_args()
    steps = train(args.batches)
    print(f"the pole stood {steps[0]:.0f} of {LENGTH} steps in the beginning, {steps[-1]:.0f} in the end")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
