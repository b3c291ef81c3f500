# SPDX-License-Identifier: Apache-2.0
"""SpectralNorm, WeightNorm (without its scale, which is an array there and a Param here), LoRA, LoRALinear."""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import initializers

from tests.parity.case import Case, normal

random = initializers.normal(1.0)
X = (normal(5, 3),)
X_BTC = (normal(2, 6, 3),)
bf16 = jnp.bfloat16


def linear(nnx):
    return nnx.Linear(3, 4, bias_init=random, rngs=nnx.Rngs(9))


def conv(nnx):
    return nnx.Conv(3, 4, (2,), rngs=nnx.Rngs(9))


CASES = [
    # ------------------------------------------------------------ SpectralNorm
    Case("spectralnorm", lambda nnx: nnx.SpectralNorm(linear(nnx), rngs=nnx.Rngs(0)), X),
    Case("spectralnorm-twice", lambda nnx: nnx.SpectralNorm(linear(nnx), rngs=nnx.Rngs(0)), X,
         call=lambda layer, x: (layer(x), layer(x))),
    Case("spectralnorm-steps", lambda nnx: nnx.SpectralNorm(linear(nnx), n_steps=3, rngs=nnx.Rngs(0)), X),
    Case("spectralnorm-kept", lambda nnx: nnx.SpectralNorm(linear(nnx), update_stats=False, rngs=nnx.Rngs(0)), X),
    Case("spectralnorm-kept-by-call", lambda nnx: nnx.SpectralNorm(linear(nnx), rngs=nnx.Rngs(0)), X,
         call=lambda layer, x: layer(x, update_stats=False)),
    Case("spectralnorm-conv", lambda nnx: nnx.SpectralNorm(conv(nnx), rngs=nnx.Rngs(0)), X_BTC),
    Case("spectralnorm-bf16", lambda nnx: nnx.SpectralNorm(linear(nnx), dtype=bf16, rngs=nnx.Rngs(0)), X,
         tolerance=2e-2),
    # ------------------------------------------------------------ WeightNorm
    Case("weightnorm", lambda nnx: nnx.WeightNorm(linear(nnx), use_scale=False, rngs=nnx.Rngs(0)), X),
    Case("weightnorm-whole", lambda nnx: nnx.WeightNorm(
        linear(nnx), use_scale=False, feature_axes=None, variable_filter=nnx.Param, rngs=nnx.Rngs(0)), X),
    Case("weightnorm-conv", lambda nnx: nnx.WeightNorm(
        conv(nnx), use_scale=False, feature_axes=(0, -1), rngs=nnx.Rngs(0)), X_BTC),
    # ------------------------------------------------------------ LoRA
    Case("lora", lambda nnx: nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0)), X),
    Case("lora-random", lambda nnx: nnx.LoRA(3, 2, 4, b_initializer=random, rngs=nnx.Rngs(0)), X_BTC),
    Case("lora-around", lambda nnx: nnx.LoRA(
        3, 2, 4, base_module=linear(nnx), b_initializer=random, rngs=nnx.Rngs(0)), X),
    Case("lora-bf16", lambda nnx: nnx.LoRA(
        3, 2, 4, base_module=linear(nnx), b_initializer=random, dtype=bf16, rngs=nnx.Rngs(0)), X, tolerance=3e-2),
    Case("lora-linear", lambda nnx: nnx.LoRALinear(
        3, 4, lora_rank=2, bias_init=random, b_initializer=random, rngs=nnx.Rngs(0)), X),
    Case("lora-linear-bf16", lambda nnx: nnx.LoRALinear(
        3, 4, lora_rank=2, use_bias=False, dtype=bf16, lora_dtype=bf16, lora_param_dtype=bf16, b_initializer=random,
        rngs=nnx.Rngs(0)), X, tolerance=3e-2),
]  # fmt: skip
