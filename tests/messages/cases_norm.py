# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of normalising layers, layers around layers, and LoRA: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from batiste import nnx


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **options):
        self.linear = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs, **options)  # wrong on purpose: 16 features come in

    def __call__(self, x):
        return self.norm(self.linear(x))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, norm):
        self.stages = nnx.List([norm])
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.stages[0](x))


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def inside(norm, x):
    return Net(rngs(), norm)(x)


def linear() -> nnx.Linear:
    return nnx.Linear(8, 4, rngs=rngs())


X = jnp.ones((2, 5, 8))

CASES: list[tuple[str, Callable[[], object]]] = [
    ("layernorm-wrong-features", lambda: Block(rngs())(X)),
    ("layernorm-no-such-feature-axis", lambda: Block(rngs(), feature_axes=3)(X)),
    ("layernorm-no-such-reduction-axis", lambda: inside(nnx.LayerNorm(8, reduction_axes=(1, 4), rngs=rngs()), X)),
    ("layernorm-rngs-none", lambda: nnx.LayerNorm(8, rngs=None)),
    ("layernorm-size-of-a-tuple", lambda: nnx.LayerNorm((5, 8), feature_axes=(-2, -1), rngs=rngs())),
    ("rmsnorm-wrong-features", lambda: inside(nnx.RMSNorm(4, rngs=rngs()), X)),
    ("batchnorm-wrong-features", lambda: inside(nnx.BatchNorm(5, rngs=rngs()), X)),
    ("batchnorm-undecided", lambda: inside(nnx.BatchNorm(8, use_running_average=None, rngs=rngs()), X)),
    ("batchnorm-no-such-axis", lambda: inside(nnx.BatchNorm(8, axis=4, rngs=rngs()), X)),
    ("groupnorm-groups-do-not-divide", lambda: nnx.GroupNorm(8, rngs=rngs())),
    ("groupnorm-size-does-not-divide", lambda: nnx.GroupNorm(8, None, 3, rngs=rngs())),
    ("groupnorm-both", lambda: nnx.GroupNorm(8, 2, 4, rngs=rngs())),
    ("groupnorm-neither", lambda: nnx.GroupNorm(8, None, rngs=rngs())),
    ("groupnorm-wrong-features", lambda: inside(nnx.GroupNorm(4, 2, rngs=rngs()), X)),
    ("groupnorm-without-channels", lambda: inside(nnx.GroupNorm(8, 2, reduction_axes=(1,), rngs=rngs()), X)),
    ("instancenorm-batch-as-channels", lambda: inside(nnx.InstanceNorm(8, feature_axes=(0, -1), rngs=rngs()), X)),
    ("instancenorm-wrong-features", lambda: inside(nnx.InstanceNorm(5, rngs=rngs()), X)),
    ("spectralnorm-no-matrix", lambda: nnx.SpectralNorm(
        nnx.Conv(8, 4, (3,), rngs=rngs()), error_on_non_matrix=True, rngs=rngs())),
    ("weightnorm-no-such-axis", lambda: nnx.WeightNorm(linear(), feature_axes=2, rngs=rngs())),
    ("weightnorm-filter-takes-the-bias", lambda: nnx.WeightNorm(
        linear(), feature_axes=(0, 1), variable_filter=nnx.Param, rngs=rngs())),
    ("lora-wrong-last-dim", lambda: nnx.LoRA(4, 2, 3, rngs=rngs())(X)),
    ("lora-around-no-layer", lambda: nnx.LoRA(8, 2, 4, base_module=nnx.List([linear()]), rngs=rngs())(X)),
    ("lora-rank-of-a-float", lambda: nnx.LoRA(8, 0.5, 4, rngs=rngs())),
]  # fmt: skip
