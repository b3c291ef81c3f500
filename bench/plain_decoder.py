# SPDX-License-Identifier: Apache-2.0
"""The decoder of `batiste.models` as plain JAX: pure functions over a dict of arrays, those of the blocks stacked.

What `scale.py` compares with. Attention is the same pure function, so that the figures speak of all else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from batiste.models import DecoderConfig
from batiste.nn import dot_product_attention

Params = dict[str, Any]
BLOCK = ("attn_norm", "query", "key", "value", "out", "mlp_norm", "gate", "up", "down")


def initial(config: DecoderConfig, key: jax.Array) -> Params:
    D, H, K, C, F, L = (config.features, config.heads, config.kv_heads, config.depth, config.hidden, config.layers)
    shapes = {"query": (D, H, C), "key": (D, K, C), "value": (D, K, C), "out": (H, C, D), "gate": (D, F),
              "up": (D, F), "down": (F, D)}  # fmt: skip
    keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
    params: Params = {name: jax.random.normal(keys[name], (L, *shape)) * 0.02 for name, shape in shapes.items()}
    params |= {"attn_norm": jnp.ones((L, D)), "mlp_norm": jnp.ones((L, D)), "norm": jnp.ones(D)}
    return params | {"embed": jax.random.normal(key, (config.vocab, D)) * D**-0.5}


def rms_norm(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon) * scale[None, None, :]
    return y.astype(x.dtype)


def rotate(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def block(config: DecoderConfig, batch: Any, cos, sin, x, p):
    x = x if batch is None else jax.lax.with_sharding_constraint(x, batch)
    y = rms_norm(x, p["attn_norm"], config.epsilon)
    q = rotate(jnp.einsum("btd,dhc->bthc", y, p["query"]), cos, sin)
    k = rotate(jnp.einsum("btd,dhc->bthc", y, p["key"]), cos, sin)
    v = jnp.einsum("btd,dhc->bthc", y, p["value"])
    x = x + jnp.einsum("bthc,hcd->btd", dot_product_attention(q, k, v, is_causal=True), p["out"])
    y = rms_norm(x, p["mlp_norm"], config.epsilon)
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None


def loss(config: DecoderConfig, params: Params, tokens, dtype, run: str, remat: str | None, chunks: int, batch: Any):
    params = {name: x if "norm" in name else x.astype(dtype) for name, x in params.items()}
    x = params["embed"][tokens[:, :-1]]
    frequencies = config.rope_theta ** (-jnp.arange(0, config.depth, 2, dtype=jnp.float32) / config.depth)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    layer = partial(block, config, batch, cos, sin)
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_saveable}
    if remat is not None:
        layer = jax.checkpoint(layer, prevent_cse=run == "unroll", policy=policies[remat])
    blocks = {name: params[name] for name in BLOCK}
    if run == "scan":
        x, _ = jax.lax.scan(layer, x, blocks)
    else:
        for i in range(config.layers):
            x, _ = layer(x, {name: value[i] for name, value in blocks.items()})
    x = rms_norm(x, params["norm"], config.epsilon)
    head = params["embed"].T
    if batch is not None:  # gathered once: the tokens stay where they are, the parameters come to them
        tensor = "tensor" if "tensor" in batch.mesh.axis_names else None
        head = jax.lax.with_sharding_constraint(head, NamedSharding(batch.mesh, P(None, tensor)))
    return cross_entropy(x, head, tokens[:, 1:], chunks)


def cross_entropy(x, head, labels, chunks: int):
    """The mean over tokens, the logits of a part of them at a time."""

    @partial(jax.checkpoint, prevent_cse=False)
    def of_part(x, labels):
        logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
        correct = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return (jax.nn.logsumexp(logits, -1) - correct).sum()

    parts = x.reshape(-1, chunks, x.shape[-1]).swapaxes(0, 1), labels.reshape(-1, chunks).T
    total, _ = jax.lax.scan(lambda total, part: (total + of_part(*part), None), jnp.float32(0), parts)
    return total / labels.size


def step(config: DecoderConfig, tx: optax.GradientTransformation, dtype, run, remat, chunks, batch, params, state,
         tokens):  # fmt: skip
    value, gradients = jax.value_and_grad(partial(loss, config))(params, tokens, dtype, run, remat, chunks, batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def shardings(mesh: jax.sharding.Mesh, plan: str, params: Params) -> Params:
    """Where each parameter lives, as one would write it down by hand."""
    columns = {"query": P(None, None, "tensor"), "key": P(None, None, "tensor"), "value": P(None, None, "tensor"),
               "out": P(None, "tensor"), "gate": P(None, None, "tensor"), "up": P(None, None, "tensor"),
               "down": P(None, "tensor"), "embed": P("tensor")}  # fmt: skip

    def spec(name: str, x: jax.Array) -> P:
        if plan == "tensor":
            return columns.get(name, P())
        if plan == "fsdp" and x.size >= 4096:
            dim = max((d for d in range(x.ndim) if x.shape[d] % mesh.size == 0), key=lambda d: x.shape[d])
            return P(*[None] * dim, "fsdp")
        return P()

    return {name: NamedSharding(mesh, spec(name, x)) for name, x in params.items()}
