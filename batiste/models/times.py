# SPDX-License-Identifier: Apache-2.0
"""What models of diffusion know of the time: waves of many lengths, and a network of two layers over them.

Dims, in the suffixes of names:  B batch   W waves   D features
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from batiste import nn
from batiste.graph import Module, Rngs

LONGEST = 10_000


def waves(t_B: Array, features: int, *, sine_first: bool = False, shift: int = 0) -> Array:
    """[cos(t ω), sin(t ω)][B, features],  ω[i] = 10000^(-i / (features / 2 - shift)), in float32

    Args:
        t_B: from 0 to 1000, not only whole numbers.
        shift: 1 makes the longest wave 10000 exactly.

    >>> waves(jnp.array([0.0, 500.0]), 4).shape
    (2, 4)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """
    half = features // 2
    omega_W = jnp.exp(-jnp.log(LONGEST) * jnp.arange(half, dtype=jnp.float32) / max(half - shift, 1))
    angles_BW = t_B.astype(jnp.float32)[:, None] * omega_W[None]
    parts = (jnp.sin(angles_BW), jnp.cos(angles_BW)) if sine_first else (jnp.cos(angles_BW), jnp.sin(angles_BW))
    return jnp.concatenate(parts, axis=-1)


class Times(Module):
    """down(silu(up(waves(t))))[B, D]

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B.
    """

    def __init__(self, count: int, features: int, *, sine_first: bool = False, shift: int = 0, rngs: Rngs):
        self.count, self.sine_first, self.shift = count, sine_first, shift
        self.up = nn.Linear(count, features, rngs=rngs)
        self.down = nn.Linear(features, features, rngs=rngs)

    def __call__(self, t_B: Array) -> Array:
        waves_BW = waves(t_B, self.count, sine_first=self.sine_first, shift=self.shift)
        return self.down(nn.silu(self.up(waves_BW.astype(self.up.kernel.dtype))))
