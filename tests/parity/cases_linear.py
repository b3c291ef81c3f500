# SPDX-License-Identifier: Apache-2.0
"""Linear, LinearGeneral, Einsum, Embed, PReLU."""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import initializers

from tests.parity.case import Case, integers, normal

bias_init = initializers.normal()
X = (normal(5, 3),)
X_BF16 = (normal(5, 3, dtype=jnp.bfloat16),)
X_BTD = (normal(2, 5, 8),)

CASES = [
    # ------------------------------------------------------------ Linear
    Case("linear", lambda nnx: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), X),
    Case("linear-random-bias", lambda nnx: nnx.Linear(3, 4, bias_init=bias_init, rngs=nnx.Rngs(1)), X),
    Case("linear-no-bias", lambda nnx: nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(params=2)), X),
    Case("linear-one-row", lambda nnx: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), (normal(3),)),
    Case("linear-batch-dims", lambda nnx: nnx.Linear(8, 4, rngs=nnx.Rngs(0)), X_BTD),
    Case("linear-integers", lambda nnx: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), (integers(5, 3, below=9),)),
    Case("linear-highest", lambda nnx: nnx.Linear(3, 4, precision="highest", rngs=nnx.Rngs(0)), X),
    Case("linear-bf16", lambda nnx: nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), X, tolerance=2e-2),
    Case("linear-bf16-input", lambda nnx: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), X_BF16, tolerance=2e-2),
    Case("linear-bf16-params", lambda nnx: nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), X_BF16,
         tolerance=2e-2),
    Case("linear-bf16-to-float32", lambda nnx: nnx.Linear(
        3, 4, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)), X, tolerance=2e-2),
    # ------------------------------------------------------------ LinearGeneral
    Case("general", lambda nnx: nnx.LinearGeneral(3, 4, rngs=nnx.Rngs(0)), X),
    Case("general-two-in-two-out", lambda nnx: nnx.LinearGeneral(
        (5, 8), (4, 2), axis=(-2, -1), rngs=nnx.Rngs(0)), X_BTD),
    Case("general-inner-dim", lambda nnx: nnx.LinearGeneral(
        5, 4, axis=1, bias_init=bias_init, rngs=nnx.Rngs(0)), X_BTD),
    Case("general-dims-backwards", lambda nnx: nnx.LinearGeneral((5, 8), 4, axis=(2, 1), rngs=nnx.Rngs(0)), X_BTD),
    Case("general-batch", lambda nnx: nnx.LinearGeneral(
        8, (4, 3), batch_axis={0: 2}, bias_init=bias_init, rngs=nnx.Rngs(0)), X_BTD),
    Case("general-two-batch-dims", lambda nnx: nnx.LinearGeneral(
        8, 4, batch_axis={0: 2, 1: 5}, bias_init=bias_init, rngs=nnx.Rngs(0)), X_BTD),
    Case("general-batch-no-bias", lambda nnx: nnx.LinearGeneral(
        (5, 8), 4, axis=(1, 2), batch_axis={0: 2}, use_bias=False, rngs=nnx.Rngs(0)), X_BTD),
    Case("general-bf16", lambda nnx: nnx.LinearGeneral(3, (2, 2), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), X,
         tolerance=2e-2),
    # ------------------------------------------------------------ Einsum
    Case("einsum", lambda nnx: nnx.Einsum("btd,dhk->bthk", (8, 2, 3), (2, 3), rngs=nnx.Rngs(0)), X_BTD),
    Case("einsum-no-bias", lambda nnx: nnx.Einsum("btd,dhk->bthk", (8, 2, 3), rngs=nnx.Rngs(0)), X_BTD),
    Case("einsum-ellipsis", lambda nnx: nnx.Einsum(
        "...d, dhk -> ...hk", (8, 2, 3), (2, 3), bias_init=bias_init, rngs=nnx.Rngs(0)), X_BTD),
    Case("einsum-kernel-dim-first", lambda nnx: nnx.Einsum(
        "bd,df->fb", (3, 4), (4,), bias_init=bias_init, rngs=nnx.Rngs(0)), X),
    Case("einsum-batch", lambda nnx: nnx.Einsum(
        "btd,bdf->btf", (2, 8, 3), (2, 3), bias_init=bias_init, rngs=nnx.Rngs(0)), X_BTD),
    Case("einsum-equation-in-the-call", lambda nnx: nnx.Einsum("bd,df->bf", (3, 4), (4,), rngs=nnx.Rngs(0)), X,
         call=lambda layer, x: layer(x, "bd,df->fb")),
    Case("einsum-bf16", lambda nnx: nnx.Einsum("bd,df->bf", (3, 4), (4,), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), X,
         tolerance=2e-2),
    # ------------------------------------------------------------ Embed
    Case("embed", lambda nnx: nnx.Embed(7, 4, rngs=nnx.Rngs(0)), (integers(5, below=7),)),
    Case("embed-batch", lambda nnx: nnx.Embed(7, 4, rngs=nnx.Rngs(0)), (integers(5, 3, below=7),)),
    Case("embed-one-row", lambda nnx: nnx.Embed(1, 4, rngs=nnx.Rngs(0)), (integers(5, below=3),)),
    Case("embed-negative", lambda nnx: nnx.Embed(7, 4, rngs=nnx.Rngs(0)), (integers(5, below=7) - 7,)),
    Case("embed-outside", lambda nnx: nnx.Embed(7, 4, rngs=nnx.Rngs(0)), (integers(5, below=7) + 4,)),
    Case("embed-attend", lambda nnx: nnx.Embed(7, 3, rngs=nnx.Rngs(0)), X, call=lambda layer, x: layer.attend(x)),
    Case("embed-bf16", lambda nnx: nnx.Embed(7, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), (integers(5, below=7),)),
    Case("embed-bf16-attend", lambda nnx: nnx.Embed(7, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), X,
         call=lambda layer, x: layer.attend(x), tolerance=2e-2),
    # ------------------------------------------------------------ PReLU
    Case("prelu", lambda nnx: nnx.PReLU(), X),
    Case("prelu-slope", lambda nnx: nnx.PReLU(0.3), X),
    Case("prelu-bf16", lambda nnx: nnx.PReLU(0.3, dtype=jnp.bfloat16), X, tolerance=2e-2),
    Case("prelu-bf16-input", lambda nnx: nnx.PReLU(0.3), X_BF16, tolerance=2e-2),
]  # fmt: skip
