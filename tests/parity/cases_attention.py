# SPDX-License-Identifier: Apache-2.0
"""MultiHeadAttention, in all its ways, and Dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from tests.parity.case import Case, normal

random = initializers.normal(1.0)
X = (normal(2, 5, 8),)
X_LONG = (normal(1, 300, 8),)
QUERY_AND_KEY = (normal(2, 5, 8), normal(2, 7, 8))
MASK = normal(2, 1, 5, 7) > -0.5
SEEN = np.array([True, False, True, True, True])
bf16 = jnp.bfloat16
causal = lambda layer, *inputs: layer(*inputs, is_causal=True)


def attention(*args, **options):
    options = {"decode": False, "bias_init": random, **options}
    return lambda nnx: nnx.MultiHeadAttention(*args, **options, rngs=nnx.Rngs(0))


def decoded(layer, x, **options):
    layer.init_cache(x.shape)
    return [layer(x[:, i : i + 1], **options) for i in range(x.shape[1])]


CASES = [
    # ------------------------------------------------------------ MultiHeadAttention
    Case("attention", attention(2, 8), X),
    Case("attention-defaults", lambda nnx: nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(3)), X),
    Case("attention-sizes", attention(4, 8, 12, 3, 2, 8), QUERY_AND_KEY),
    Case("attention-no-bias", attention(2, 8, use_bias=False, out_kernel_init=random), X),
    Case("attention-normalized", attention(2, 8, normalize_qk=True), X),
    Case("attention-cross", attention(2, 8), (*QUERY_AND_KEY, 2 * QUERY_AND_KEY[1])),
    Case("attention-no-batch", attention(2, 8), (X[0][0],)),
    Case("attention-two-batch-dims", attention(2, 8), (normal(3, 2, 5, 8),)),
    Case("attention-mask", attention(2, 8), QUERY_AND_KEY, call=lambda layer, q, k: layer(q, k, mask=MASK)),
    Case("attention-float-mask", attention(2, 8), QUERY_AND_KEY,
         call=lambda layer, q, k: layer(q, k, mask=MASK.astype(np.float32))),
    Case("attention-all-masked", attention(2, 8), QUERY_AND_KEY, call=lambda layer, q, k: layer(q, k, mask=0 * MASK)),
    Case("attention-causal", attention(2, 8), X, call=causal),
    Case("attention-causal-mask", attention(2, 8), QUERY_AND_KEY,
         call=lambda layer, q, k: layer(q, k, mask=MASK, is_causal=True)),
    Case("attention-causal-long", attention(2, 8, use_bias=False), X_LONG, call=causal, tolerance=3e-5),
    Case("attention-causal-long-shared-heads", attention(4, 8, num_kv_heads=2, use_bias=False), X_LONG, call=causal,
         tolerance=3e-5),
    Case("attention-causal-fewer-keys", attention(2, 8, use_bias=False), X_LONG,
         call=lambda layer, x: layer(x, x[:, :140], is_causal=True), tolerance=3e-5),
    Case("attention-causal-more-keys", attention(2, 8, use_bias=False), X_LONG,
         call=lambda layer, x: layer(x[:, :260], x, is_causal=True), tolerance=3e-5),
    Case("attention-dropout", attention(2, 8, dropout_rate=0.3, deterministic=False), X),
    Case("attention-dropout-each", attention(2, 8, dropout_rate=0.3, deterministic=False, broadcast_dropout=False), X),
    Case("attention-dropout-shared-heads", attention(
        4, 8, num_kv_heads=2, dropout_rate=0.3, deterministic=False, broadcast_dropout=False), X, call=causal),
    Case("attention-dropout-long", attention(2, 8, use_bias=False, dropout_rate=0.3, deterministic=False), X_LONG,
         call=causal, tolerance=3e-5),
    Case("attention-dropout-by-call", attention(2, 8, dropout_rate=0.3), X,
         call=lambda layer, x: layer(x, deterministic=False, rngs=layer.rngs)),
    Case("attention-no-dropout", attention(2, 8, dropout_rate=0.3, deterministic=True), X),
    Case("attention-decode", attention(2, 8, decode=True), X, call=decoded),
    Case("attention-decode-shared-heads", attention(4, 8, num_kv_heads=1, decode=True), X, call=decoded),
    Case("attention-decode-mask", attention(2, 8, decode=True), X,
         call=lambda layer, x: decoded(layer, x, mask=SEEN[None, None, None])),
    Case("attention-bf16", attention(2, 8, dtype=bf16, bias_init=initializers.zeros), X, tolerance=5e-2),
    Case("attention-bf16-input", attention(2, 8), (X[0].astype(bf16),), tolerance=3e-2),
    # ------------------------------------------------------------ Dropout
    Case("dropout", lambda nnx: nnx.Dropout(0.25, rngs=nnx.Rngs(0)), X),
    Case("dropout-twice", lambda nnx: nnx.Dropout(0.25, rngs=nnx.Rngs(0, dropout=3)), X,
         call=lambda layer, x: layer(layer(x))),
    Case("dropout-shared", lambda nnx: nnx.Dropout(0.5, broadcast_dims=(0, -1), rngs=nnx.Rngs(dropout=1)), X),
    Case("dropout-off", lambda nnx: nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0)), X),
    Case("dropout-none", lambda nnx: nnx.Dropout(0.0, rngs=nnx.Rngs(0)), X),
    Case("dropout-all", lambda nnx: nnx.Dropout(1.0, rngs=nnx.Rngs(0)), X),
    Case("dropout-other-stream", lambda nnx: nnx.Dropout(0.5, rng_collection="noise", rngs=nnx.Rngs(0, noise=3)), X),
    Case("dropout-from-stream", lambda nnx: nnx.Dropout(0.5, rngs=nnx.Rngs(0).dropout), X),
    Case("dropout-key", lambda nnx: nnx.Dropout(0.5), X, call=lambda layer, x: layer(x, rngs=jax.random.key(3))),
    Case("dropout-bf16", lambda nnx: nnx.Dropout(0.3, rngs=nnx.Rngs(0)), (X[0].astype(bf16),)),
]  # fmt: skip
