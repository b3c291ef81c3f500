# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of linear layers, convolutions and pooling: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from batiste import nnx


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)  # wrong on purpose: 32 features come in

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(100, 8, rngs=rngs)
        self.blocks = nnx.List([Mlp(rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Vision(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **options):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs, **options)

    def __call__(self, x):
        return self.stem(x)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


IDS, IMAGES = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 28, 28, 3))

CASES: list[tuple[str, Callable[[], object]]] = [
    ("linear-wrong-last-dim-deep-in-a-model", lambda: Model(rngs())(IDS)),
    ("linear-wrong-last-dim-alone", lambda: nnx.Linear(8, 4, rngs=rngs())(jnp.ones((5, 3)))),
    ("linear-scalar", lambda: nnx.Linear(8, 4, rngs=rngs())(jnp.ones(()))),
    ("linear-negative-size", lambda: nnx.Linear(8, -4, rngs=rngs())),
    ("linear-size-of-a-float", lambda: nnx.Linear(8 / 2, 4, rngs=rngs())),
    ("linear-rngs-none", lambda: nnx.Linear(8, 4, rngs=None)),
    ("linear-rngs-a-seed", lambda: nnx.Linear(8, 4, rngs=0)),
    ("linear-rngs-without-params", lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(dropout=0))),
    ("linear-integer-dtype", lambda: nnx.Linear(8, 4, dtype=jnp.int32, rngs=rngs())(jnp.ones((5, 8)))),
    ("general-axis-and-in-features", lambda: nnx.LinearGeneral((8, 4), 4, axis=-1, rngs=rngs())),
    ("general-batch-dims-not-leading", lambda: nnx.LinearGeneral(8, 4, batch_axis={1: 2}, rngs=rngs())),
    ("general-wrong-dims", lambda: nnx.LinearGeneral((8, 4), 4, axis=(-2, -1), rngs=rngs())(jnp.ones((5, 4, 8)))),
    ("einsum-implicit", lambda: nnx.Einsum("bi,io", (8, 4), rngs=rngs())),
    ("einsum-one-operand", lambda: nnx.Einsum("bi->bo", (8, 4), rngs=rngs())),
    ("einsum-no-equation", lambda: nnx.Einsum(None, (8, 4), rngs=rngs())),
    ("einsum-two-sizes", lambda: nnx.Einsum("bi,io->bo", (8, 4), rngs=rngs())(jnp.ones((5, 3)))),
    ("einsum-wrong-rank", lambda: nnx.Einsum("bi,io->bo", (8, 4), rngs=rngs())(jnp.ones(8))),
    ("einsum-bias", lambda: nnx.Einsum("bi,io->bo", (8, 4), (3,), rngs=rngs())(jnp.ones((5, 8)))),
    ("embed-floats", lambda: Model(rngs())(jnp.ones((2, 5)))),
    ("embed-attend", lambda: nnx.Embed(100, 8, rngs=rngs()).attend(jnp.ones((2, 5)))),
    ("conv-wrong-features", lambda: Vision(rngs())(jnp.ones((2, 28, 28, 1)))),
    ("conv-too-few-dims", lambda: Vision(rngs())(jnp.ones((28, 3)))),
    ("conv-mask", lambda: Vision(rngs(), mask=jnp.ones((3, 3)))(IMAGES)),
    ("conv-unknown-padding", lambda: Vision(rngs(), padding="FULL")),
    ("conv-padding-of-another-rank", lambda: Vision(rngs(), padding=[(1, 1)])),
    ("conv-causal-images", lambda: Vision(rngs(), padding="CAUSAL")),
    ("conv-groups", lambda: Vision(rngs(), feature_group_count=2)),
    ("conv-strides", lambda: Vision(rngs(), strides=(1, 2, 2))),
    ("conv-dilated-input-with-named-padding", lambda: Vision(rngs(), input_dilation=2)),
    ("conv-transpose-padding", lambda: nnx.ConvTranspose(3, 4, (3, 3), padding="CAUSAL", rngs=rngs())),
    ("pool-window-a-number", lambda: nnx.max_pool(IMAGES, 2)),
    ("pool-strides", lambda: nnx.avg_pool(IMAGES, (2, 2), strides=(2,))),
    ("pool-padding", lambda: nnx.max_pool(IMAGES, (2, 2), padding="CIRCULAR")),
    ("pool-too-few-dims", lambda: nnx.max_pool(jnp.ones((28, 28)), (2, 2))),
]
