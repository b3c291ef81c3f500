# SPDX-License-Identifier: Apache-2.0
"""BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from tests.parity.case import Case, integers, normal

random = initializers.normal(1.0)
BOTH = dict(scale_init=random, bias_init=random)
X_BTC = (2 * normal(2, 5, 6) + 0.5,)
X_BF16 = (X_BTC[0].astype(jnp.bfloat16),)
X_COMPLEX = ((X_BTC[0] + 1j * X_BTC[0][:, ::-1]).astype(np.complex64),)
MASK = normal(2, 5, 6) > -0.7
masked = lambda layer, x: layer(x, mask=MASK)
twice = lambda layer, x: (layer(x), layer(2 * x))
slow = dict(use_fast_variance=False)
bf16 = jnp.bfloat16

CASES = [
    # ------------------------------------------------------------ BatchNorm
    Case("batchnorm", lambda nnx: nnx.BatchNorm(6, rngs=nnx.Rngs(0)), X_BTC),
    Case("batchnorm-random", lambda nnx: nnx.BatchNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("batchnorm-twice", lambda nnx: nnx.BatchNorm(6, momentum=0.5, **BOTH, rngs=nnx.Rngs(0)), X_BTC, call=twice),
    Case("batchnorm-plain", lambda nnx: nnx.BatchNorm(6, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), X_BTC),
    Case("batchnorm-two-passes", lambda nnx: nnx.BatchNorm(6, **slow, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("batchnorm-inner-dim", lambda nnx: nnx.BatchNorm(5, axis=1, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("batchnorm-mask", lambda nnx: nnx.BatchNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC, call=masked),
    Case("batchnorm-stored", lambda nnx: nnx.BatchNorm(6, use_running_average=True, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("batchnorm-stored-by-call", lambda nnx: nnx.BatchNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC,
         call=lambda layer, x: (layer(x), layer(x, use_running_average=True))),
    Case("batchnorm-bf16", lambda nnx: nnx.BatchNorm(6, dtype=bf16, **BOTH, rngs=nnx.Rngs(0)), X_BTC, tolerance=2e-2),
    Case("batchnorm-bf16-params", lambda nnx: nnx.BatchNorm(6, param_dtype=bf16, **BOTH, rngs=nnx.Rngs(0)), X_BF16,
         tolerance=3e-2),
    # ------------------------------------------------------------ LayerNorm
    Case("layernorm", lambda nnx: nnx.LayerNorm(6, rngs=nnx.Rngs(0)), X_BTC),
    Case("layernorm-random", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("layernorm-plain", lambda nnx: nnx.LayerNorm(6, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), X_BTC),
    Case("layernorm-scale", lambda nnx: nnx.LayerNorm(6, use_bias=False, scale_init=random, rngs=nnx.Rngs(1)), X_BTC),
    Case("layernorm-two-passes", lambda nnx: nnx.LayerNorm(6, **slow, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("layernorm-two-dims", lambda nnx: nnx.LayerNorm(
        30, reduction_axes=(1, 2), feature_axes=(1, 2), **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("layernorm-other-features", lambda nnx: nnx.LayerNorm(5, feature_axes=1, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("layernorm-one-row", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), (normal(6),)),
    Case("layernorm-constant", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), (np.ones((3, 6), np.float32),)),
    Case("layernorm-large", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), (X_BTC[0] * 1e4,)),
    Case("layernorm-integers", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), (integers(5, 6, below=9),)),
    Case("layernorm-mask", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC, call=masked),
    Case("layernorm-complex", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_COMPLEX),
    Case("layernorm-bf16", lambda nnx: nnx.LayerNorm(6, dtype=bf16, **BOTH, rngs=nnx.Rngs(0)), X_BTC, tolerance=2e-2),
    Case("layernorm-bf16-input", lambda nnx: nnx.LayerNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BF16, tolerance=2e-2),
    Case("layernorm-bf16-params", lambda nnx: nnx.LayerNorm(6, param_dtype=bf16, **BOTH, rngs=nnx.Rngs(0)), X_BF16,
         tolerance=2e-2),
    # ------------------------------------------------------------ RMSNorm
    Case("rmsnorm", lambda nnx: nnx.RMSNorm(6, scale_init=random, rngs=nnx.Rngs(0)), X_BTC),
    Case("rmsnorm-plain", lambda nnx: nnx.RMSNorm(6, use_scale=False, rngs=nnx.Rngs(0)), X_BTC),
    Case("rmsnorm-two-dims", lambda nnx: nnx.RMSNorm(
        30, reduction_axes=(1, 2), feature_axes=(1, 2), scale_init=random, rngs=nnx.Rngs(0)), X_BTC),
    Case("rmsnorm-mask", lambda nnx: nnx.RMSNorm(6, scale_init=random, rngs=nnx.Rngs(0)), X_BTC, call=masked),
    Case("rmsnorm-bf16", lambda nnx: nnx.RMSNorm(6, scale_init=random, rngs=nnx.Rngs(0)), X_BF16, tolerance=2e-2),
    # ------------------------------------------------------------ GroupNorm
    Case("groupnorm", lambda nnx: nnx.GroupNorm(6, 2, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("groupnorm-size", lambda nnx: nnx.GroupNorm(6, None, 2, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("groupnorm-plain", lambda nnx: nnx.GroupNorm(6, 3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), X_BTC),
    Case("groupnorm-dims", lambda nnx: nnx.GroupNorm(6, 2, reduction_axes=(1, 2), **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("groupnorm-matrix", lambda nnx: nnx.GroupNorm(6, 2, **BOTH, rngs=nnx.Rngs(0)), (normal(5, 6),)),
    Case("groupnorm-two-passes", lambda nnx: nnx.GroupNorm(6, 2, **slow, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("groupnorm-mask", lambda nnx: nnx.GroupNorm(6, 2, **BOTH, rngs=nnx.Rngs(0)), X_BTC, call=masked),
    Case("groupnorm-bf16", lambda nnx: nnx.GroupNorm(6, 2, **BOTH, rngs=nnx.Rngs(0)), X_BF16, tolerance=2e-2),
    # ------------------------------------------------------------ InstanceNorm
    Case("instancenorm", lambda nnx: nnx.InstanceNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("instancenorm-plain", lambda nnx: nnx.InstanceNorm(
        6, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), (normal(2, 3, 4, 6),)),
    Case("instancenorm-inner-dim", lambda nnx: nnx.InstanceNorm(5, feature_axes=1, **BOTH, rngs=nnx.Rngs(0)), X_BTC),
    Case("instancenorm-mask", lambda nnx: nnx.InstanceNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BTC, call=masked),
    Case("instancenorm-bf16", lambda nnx: nnx.InstanceNorm(6, **BOTH, rngs=nnx.Rngs(0)), X_BF16, tolerance=2e-2),
]  # fmt: skip
