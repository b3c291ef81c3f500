# SPDX-License-Identifier: Apache-2.0
"""A decoder: the language model of Llama, GPT-2, Gemma, Mixtral and PaLM, as one writes it for one device.

x = embed(tokens);  x = block(x) for each block;  logits = norm(x) · head

Dims, in the suffixes of names:  B batch   T positions   S remembered positions   D features   H heads of queries
    K heads of keys and values   C depth of a head   F features of the MLP   V vocabulary   L layers

Where it runs, in what precision, and what is kept for the backward pass is said from outside: `RULES` and a plan of
`batiste.sharding`, a policy of `batiste.precision`, and `model.set_attributes(Stack, run="unroll", remat="dots")`.

Source: Touvron et al. 2023, "Llama 2", section 2.2; Chowdhery et al. 2022, "PaLM", section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from batiste import nn
from batiste.graph import Module, Param, Rngs, data, make, merge, split
from batiste.graph.errors import ShapeError
from batiste.nn.losses import TokenLoss, chunked_cross_entropy, soft_capped
from batiste.nn.moe import chosen
from batiste.nn.stack import Apart, Stack

from .configs import DecoderConfig, Stretch

RULES = (
    ("embed/embedding", ("vocab", None)),
    ("places/embedding", (None, None)),
    ("head/kernel", (None, "vocab")),
    ("attn/query/{kernel,bias}", (..., "heads", None)),
    ("attn/{key,value}/{kernel,bias}", (..., "kv_heads", None)),
    ("attn/out/kernel", (..., "heads", None, None)),
    ("mlp/{up,gate}/{kernel,bias}", (..., "mlp")),
    ("mlp/down/kernel", (..., "mlp", None)),
    ("mlp/experts/{up,gate}", (..., "expert", None, "mlp")),
    ("mlp/experts/down", (..., "expert", "mlp", None)),
    ("mlp/router/kernel", (...,)),
    ("{attn/out,mlp/down,norm,attn_norm,mlp_norm}/bias", (...,)),
    ("scale", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`.

With fewer heads of keys than devices, keep them whole: `names={"kv_heads": None}`.
"""


class Cache(NamedTuple):
    """What attention remembers: keys and values of all layers, and how many positions are filled: one number, or [B].

    What lies past the filled positions is not seen, and is written over: to forget the last tokens, or the padding
    behind a row's own, lower `filled`. Where all layers have a window, position t lies in place t % S, so that
    S = window + P places do for any length, where P tokens are read at a time at most.

    Of a decoder whose layers stand apart, keys and values are tuples with an array for each layer.
    """

    k_LBSKC: Array | tuple[Array, ...]
    v_LBSKC: Array | tuple[Array, ...]
    filled: Array

    def of_rows(self, rows_R: Array) -> Cache:
        """The cache of these rows, each of which is filled on its own."""
        k, v = jax.tree.map(lambda x: jnp.take(x, rows_R, axis=x.ndim - 4), (self.k_LBSKC, self.v_LBSKC))
        return Cache(k, v, self.filled[rows_R])


class Decoder(Module):
    """logits[B, T, V] of the next token, given tokens[B, T]

    >>> from batiste.models import DECODERS
    >>> model = Decoder(DECODERS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 5), int)).shape
    (2, 5, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: Rngs):
        self.config = config
        self.embed = (ScaledEmbed if config.embed_scale else nn.Embed)(config.vocab, config.features, rngs=rngs)
        self.places = data(nn.Embed(config.context, config.features, rngs=rngs) if config.learned_positions else None)
        self.blocks: Stack | Apart = Stack(
            lambda rngs: Block(config, rngs=rngs), config.layers, rngs=rngs, has_aux=True
        )
        self.norm = norm_of(config, config.features, rngs)
        head = None if config.tied else nn.Linear(config.features, config.vocab, use_bias=False, rngs=rngs)
        self.head = data(head)

    def __call__(self, tokens_BT: Array) -> Array:
        x_BTD, _ = self.hidden(tokens_BT)
        return self.logits(x_BTD)

    @overload
    def hidden(self, tokens_BT: Array, cache: None = None) -> tuple[Array, None]: ...

    @overload
    def hidden(self, tokens_BT: Array, cache: Cache) -> tuple[Array, Cache]: ...

    def hidden(self, tokens_BT: Array, cache: Cache | None = None) -> tuple[Array, Cache | None]:
        """x[B, T, D] before the head; with a cache, of the positions that follow those it holds, and the new cache."""
        x_BTD, kept = self._run(tokens_BT, cache)
        if cache is None:
            return x_BTD, None
        k_LBSKC, v_LBSKC = zip(*kept) if isinstance(self.blocks, Apart) else kept
        return x_BTD, Cache(k_LBSKC, v_LBSKC, cache.filled + tokens_BT.shape[1])

    def _run(self, tokens_BT: Array, cache: Cache | None) -> tuple[Array, Any]:
        """x[B, T, D] before the head, and what layers give beside it: keys and values, or `Shares` without a cache"""
        if tokens_BT.ndim != 2:
            raise ShapeError("a decoder reads rows of tokens", at=self, got=tokens_BT.shape, expected="(batch, length)",
                             fix="add a dim of size 1: tokens[None]")  # fmt: skip
        length, start = tokens_BT.shape[1], 0 if cache is None else cache.filled
        positions_T = jnp.add.outer(jnp.asarray(start), jnp.arange(length))  # [B, T], where rows have their own
        c, is_apart = self.config, isinstance(self.blocks, Apart)
        each = () if cache is None else (cache.k_LBSKC, cache.v_LBSKC)
        if c.full_every:
            each = (*each, jnp.array(c.full_layers))
        x_BTD, kept = self.blocks(self.embedded(tokens_BT, positions_T), self.turns(positions_T), positions_T,
                                  each=(tuple(zip(*each)) if is_apart else each) or None)  # fmt: skip
        return self.norm(x_BTD), kept

    def embedded(self, tokens_BT: Array, positions_T: Array) -> Array:
        x_BTD = self.embed(tokens_BT)
        if self.places is not None:  # padding may lie behind the last
            places_BT = jnp.minimum(positions_T, self.config.context - 1).reshape(-1, tokens_BT.shape[1])
            x_BTD = x_BTD + self.places(places_BT)
        return x_BTD

    def turns(self, positions_T: Array) -> tuple[tuple[Array, Array], ...]:
        """RoPE's angles; a second pair for the layers with a window, if theirs differ; none of learned positions."""
        c = self.config
        if c.learned_positions:
            return ()
        whole = rope_angles(positions_T, c.depth, c.rope_theta, c.rope_stretch)
        return (whole,) if c.local_theta is None else (whole, rope_angles(positions_T, c.depth, c.local_theta))

    def logits(self, x_BTD: Array) -> Array:
        """float32, whatever the dtype of x"""
        logits_BTV = jnp.dot(x_BTD, self.head_DV().astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        return soft_capped(logits_BTV, self.config.logit_cap)

    def head_DV(self) -> Array:
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def loss(self, tokens_BT: Array, weights_BT: Array | None = None, *, chunks: int = 8,
             z_loss: float | None = None) -> TokenLoss:  # fmt: skip
        """Σ w (log Z - logit of the next token + z_loss (log Z)²), with the logits of a part of the tokens at a time.

        Args:
            weights_BT: of each token as one to predict, such as 0 for padding; that of the first is not looked at.
            chunks: see `batiste.nn.losses.chunked_cross_entropy`.
            z_loss: that of the configuration, if left out.

        Routers of experts add Σ w (balance_loss E Σ_e f_e p_e + router_z_loss mean (log Z)²), by the configuration:
        f_e is how often expert e is chosen per position, over all layers and positions, p_e its mean probability.

        Source: Fedus et al. 2021, "Switch Transformers", eq. 4; Zoph et al. 2022, "ST-MoE", eq. 5.
        """
        c = self.config
        x_BTD, kept = self._run(tokens_BT[:, :-1], None)
        weights = None if weights_BT is None else weights_BT[:, 1:]
        sums = chunked_cross_entropy(x_BTD, self.head_DV(), tokens_BT[:, 1:], weights, chunks=chunks,
                                     z_loss=c.z_loss if z_loss is None else z_loss, cap=c.logit_cap)  # fmt: skip
        if not (c.balance_loss or c.router_z_loss):
            return sums
        shares = jax.tree.map(lambda *x: jnp.stack(x), *kept) if isinstance(self.blocks, Apart) else kept
        added = c.balance_loss * shares.balance() + c.router_z_loss * shares.z.mean()
        return sums._replace(loss=sums.loss + sums.weight * added)

    def cache(self, batch: int, length: int, *, per_row: bool = False) -> Cache:
        """An empty cache for `length` positions, in the dtype in which the model computes.

        Args:
            per_row: rows are filled each on its own.
        """
        c = self.config
        shape_BSKC = (batch, length, c.kv_heads, c.depth)

        def empty() -> Array | tuple[Array, ...]:
            if isinstance(self.blocks, Apart):
                return tuple(jnp.zeros(shape_BSKC, self.embed.dtype) for _ in range(c.layers))
            return jnp.zeros((c.layers, *shape_BSKC), self.embed.dtype)

        return Cache(empty(), empty(), jnp.zeros((batch,) if per_row else (), jnp.int32))

    def apart(self) -> Decoder:
        """The same decoder, whose layers stand apart: for generating, where no step then copies them out of a stack.

        Its layers are copies: drop the other, or have it loaded so (`load_decoder(path, apart=True)`).
        """
        model = merge(*split(self))
        model.blocks = model.blocks.apart()
        return model


class Block(Module):
    """y = x + attn(norm(x));  y + mlp(norm(y)), one after the other;  x + attn(norm(x)) + mlp(norm(x)), in parallel

    With norms behind as well, attn and mlp are norm(attn(…)) and norm(mlp(…)).
    """

    def __init__(self, config: DecoderConfig, *, rngs: Rngs):
        self.parallel = config.parallel
        self.attn_norm = norm_of(config, config.features, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.attn_post = data(norm_of(config, config.features, rngs) if config.post_norms else None)
        self.mlp_norm = data(None if config.parallel else norm_of(config, config.features, rngs))
        self.mlp = (SparseMlp if config.experts else Mlp)(config, rngs=rngs)
        self.mlp_post = data(norm_of(config, config.features, rngs) if config.post_norms else None)

    def __call__(self, x_BTD, turns, positions_T, each=()):
        normed_BTD = self.attn_norm(x_BTD)
        y_BTD, kept = self.attn(normed_BTD, turns, positions_T, each)
        y_BTD = y_BTD if self.attn_post is None else self.attn_post(y_BTD)
        if self.mlp_norm is not None:
            x_BTD = x_BTD + y_BTD
            normed_BTD, y_BTD = self.mlp_norm(x_BTD), 0
        z_BTD = self.mlp(normed_BTD)
        if not kept and isinstance(self.mlp, SparseMlp):
            kept = self.mlp.shares(normed_BTD)
        return x_BTD + y_BTD + (z_BTD if self.mlp_post is None else self.mlp_post(z_BTD)), kept


class Attention(Module):
    """out(attend(rope(query(x)), rope(key(x)), value(x))), of the positions up to each, or the last `window` of them

    Source: Su et al. 2021, "RoFormer", eq. 34; Ainslie et al. 2023, "GQA", section 2.2; Henry et al. 2020, "Query-Key
        Normalization", with RMSNorm as in Qwen3; Jiang et al. 2023, "Mistral 7B", section 2 (window); Gemma Team 2024,
        "Gemma 2", section 2 (windows of some layers, caps).
    """

    def __init__(self, config: DecoderConfig, *, rngs: Rngs):
        D, H, K, C = config.features, config.heads, config.kv_heads, config.depth
        self.window, self.is_mixed, self.cap = config.window, bool(config.full_every), config.attn_cap
        self.scale = math.sqrt(C / (config.query_scale or C))
        self.query = nn.LinearGeneral(D, (H, C), use_bias=config.qkv_bias, rngs=rngs)
        self.key = nn.LinearGeneral(D, (K, C), use_bias=config.qkv_bias, rngs=rngs)
        self.value = nn.LinearGeneral(D, (K, C), use_bias=config.qkv_bias, rngs=rngs)
        self.out = nn.LinearGeneral((H, C), D, axis=(-2, -1), use_bias=config.bias, rngs=rngs)
        self.query_norm = data(norm_of(config, C, rngs) if config.qk_norm else None)
        self.key_norm = data(norm_of(config, C, rngs) if config.qk_norm else None)

    def __call__(self, x_BTD, turns, positions_T, each=()):
        """Args:
        each: keys and values of the cache, if there is one; then, where layers differ, whether this one sees all.
        """
        *cached, sees_all = each if self.is_mixed else (*each, False)
        q_BTHC, k_BTKC, v_BTKC = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None:
            q_BTHC, k_BTKC = self.query_norm(q_BTHC), self.key_norm(k_BTKC)
        if turns:
            angles = [jnp.where(sees_all, *pair) for pair in zip(*turns)] if len(turns) == 2 else turns[0]
            q_BTHC, k_BTKC = rotated(q_BTHC, *angles), rotated(k_BTKC, *angles)
        if self.scale != 1:
            q_BTHC = q_BTHC * jnp.asarray(self.scale, q_BTHC.dtype)
        window = jnp.where(sees_all, positions_T.max() + 1, self.window or 0) if self.is_mixed else self.window
        if not cached:
            is_plain = window is None and self.cap is None
            mask = None if is_plain else seen(positions_T, positions_T, window)
            return self.out(self.attended(q_BTHC, k_BTKC, v_BTKC, mask)), None
        is_ring, places = self.window is not None and not self.is_mixed, cached[0].shape[1]
        k_BSKC, v_BSKC = (kept(old, new.astype(old.dtype), positions_T, is_ring)
                          for old, new in zip(cached, (k_BTKC, v_BTKC)))  # fmt: skip
        positions_S = jnp.broadcast_to(jnp.arange(places), (*positions_T.shape[:-1], places))
        if is_ring:  # the last position so far that lies in each place
            positions_S = positions_T[..., -1:] - (positions_T[..., -1:] - positions_S) % places
        mask = seen(positions_T, positions_S, window)
        return self.out(self.attended(q_BTHC, k_BSKC, v_BSKC, mask)), (k_BSKC, v_BSKC)

    def attended(self, q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, mask: Array | None) -> Array:
        if self.cap is None or mask is None:
            return nn.dot_product_attention(q_BTHC, k_BSKC, v_BSKC, mask=mask, is_causal=mask is None)
        return capped_attention(q_BTHC, k_BSKC, v_BSKC, mask, self.cap)


class Mlp(Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x)))

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(self, config: DecoderConfig, *, rngs: Rngs):
        D, F, bias = config.features, config.hidden, config.bias
        self.activation = activation_of(config)
        self.up = nn.Linear(D, F, use_bias=bias, rngs=rngs)
        self.gate = data(nn.Linear(D, F, use_bias=bias, rngs=rngs) if config.gated else None)
        self.down = nn.Linear(F, D, use_bias=bias, rngs=rngs)

    def __call__(self, x_BTD):
        up_BTF = self.up(x_BTD)
        return self.down(self.activation(up_BTF) if self.gate is None else self.activation(self.gate(x_BTD)) * up_BTF)


class Shares(NamedTuple):
    """What routers of layers do: choices and probability of each expert, means over positions; the mean of (log Z)²."""

    chosen_LE: Array
    probable_LE: Array
    z: Array

    def balance(self) -> Array:
        """E Σ_e f_e p_e of all layers together; `top_k`, where all experts get the same"""
        return self.chosen_LE.shape[-1] * jnp.sum(self.chosen_LE.mean(0) * self.probable_LE.mean(0))


class SparseMlp(nn.MixtureOfExperts):
    """Σ p[e] mlp[e](x) over the `top_k` experts e that a router prefers, whose p sum to 1

    Without a capacity each position is a group of its own: all experts read it, and none is passed by.

    Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1.
    """

    def __init__(self, config: DecoderConfig, *, rngs: Rngs):
        super().__init__(config.experts, config.features, config.hidden, top_k=config.top_k, gated=True,
                         capacity_factor=config.capacity or config.experts / config.top_k,
                         activation=activation_of(config), rngs=rngs)  # fmt: skip
        self.is_alone = config.capacity is None

    def __call__(self, x_BTD):
        return super().__call__(x_BTD[..., None, :])[..., 0, :] if self.is_alone else super().__call__(x_BTD)

    def shares(self, x_BTD) -> Shares:
        """Of this layer; where no one looks at them, nothing is computed."""
        logits_BTE = self.router(x_BTD)
        p_BTE = jax.nn.softmax(logits_BTE)
        chosen_E = chosen(p_BTE, self.top_k).sum(1).astype(p_BTE.dtype).mean((0, 1))
        return Shares(chosen_E, p_BTE.mean((0, 1)), jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)).mean())


class ScaledEmbed(nn.Embed):
    """embedding[token] √features: large beside the norms' 1, as the head has the same numbers"""

    def __call__(self, inputs):
        x = super().__call__(inputs)
        return x * jnp.asarray(math.sqrt(self.features), x.dtype)


class ShiftedRMSNorm(Module):
    """y = x / √(E[x²] + ε) * (1 + scale), in float32: decay then draws the factors to 1

    Source: Gemma's published weights, whose scales are so.
    """

    def __init__(self, features: int, *, epsilon: float, rngs: Rngs):
        self.scale = make(Param, nn.initializers.zeros, (features,), jnp.float32, rngs.params)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        factor = jnp.expand_dims(1 + self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        return (wide * inverse * factor).astype(x.dtype)


def norm_of(config: DecoderConfig, features: int, rngs: Rngs) -> Any:
    kinds = {"rms": nn.RMSNorm, "rms+1": ShiftedRMSNorm, "layer": nn.LayerNorm}
    return kinds[config.norm](features, epsilon=config.epsilon, rngs=rngs)


def activation_of(config: DecoderConfig) -> Callable[[Array], Array]:
    return {"silu": nn.silu, "gelu": nn.gelu}[config.activation or ("silu" if config.gated else "gelu")]


def capped_attention(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, mask: Array, cap: float) -> Array:
    """softmax_S(cap tanh(q · k / (√C cap)), where mask) · v

    Source: Gemma Team 2024, "Gemma 2", section 2.
    """
    B, T, H, C = q_BTHC.shape
    q_BTKGC = (q_BTHC / math.sqrt(C)).reshape(B, T, k_BSKC.shape[2], -1, C)
    logits_BKGTS = jnp.einsum("btkgc,bskc->bkgts", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
    mask = mask[None, None, None] if mask.ndim == 2 else mask[:, :, None]
    weights_BKGTS = jax.nn.softmax(soft_capped(logits_BKGTS, cap), where=mask).astype(v_BSKC.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights_BKGTS, v_BSKC).reshape(B, T, H, C)


def rope_angles(positions_T: Array, depth: int, theta: float, stretch: Stretch | None = None) -> tuple[Array, Array]:
    """cos and sin of t · theta^(-2i / depth), i = 0 … depth / 2 - 1, as [T, depth / 2] in float32; [B, T, …] of rows

    >>> cos, sin = rope_angles(jnp.array([0, 1]), 4, 100.0)
    >>> [[round(float(x), 2) for x in row] for row in sin]
    [[0.0, 0.0], [0.84, 0.1]]
    """
    frequencies_C = theta ** (-jnp.arange(0, depth, 2, dtype=jnp.float32) / depth)
    if stretch is not None:
        frequencies_C = stretched(frequencies_C, stretch)
    angles_TC = jnp.multiply.outer(positions_T.astype(jnp.float32), frequencies_C)
    return jnp.cos(angles_TC), jnp.sin(angles_TC)


def stretched(frequencies_C: Array, stretch: Stretch) -> Array:
    """f (1 - s) / factor + f s, where s rises from 0 to 1 with the turns that fit into the context of training

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2, with Llama 3.1's published code.
    """
    turns_C = stretch.context * frequencies_C / (2 * math.pi)
    smooth_C = jnp.clip((turns_C - stretch.low) / (stretch.high - stretch.low), 0, 1)
    return frequencies_C * ((1 - smooth_C) / stretch.factor + smooth_C)


def rotated(x_BTHC: Array, cos_TC: Array, sin_TC: Array) -> Array:
    """The pairs (x[i], x[i + C / 2]) turned by their angles, in float32

    Source: Su et al. 2021, eq. 34, with the halves as pairs, as in Hugging Face's checkpoints.
    """
    cos, sin = (x.reshape(-1, x.shape[-2], 1, x.shape[-1]) for x in (cos_TC, sin_TC))
    a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)


def seen(positions_T: Array, positions_S: Array, window: int | Array | None) -> Array:
    """[T, S]: whether 0 ≤ s ≤ t, and t - s < window; [B, 1, T, S], where rows have their own positions"""
    past_TS = positions_T[..., :, None] - positions_S[..., None, :]
    mask_TS = (past_TS >= 0) & (positions_S >= 0)[..., None, :]
    if window is not None:
        mask_TS &= past_TS < window
    return mask_TS if mask_TS.ndim == 2 else mask_TS[:, None]


def kept(old_BSKC: Array, new_BTKC: Array, positions_T: Array, is_ring: bool) -> Array:
    """The cache of a layer with what is new, at its positions; in a ring, at the rests of these."""
    places, length = old_BSKC.shape[1], new_BTKC.shape[1]
    if is_ring and length > 1:
        at_BT = jnp.broadcast_to(positions_T % places, new_BTKC.shape[:2])
        return jax.vmap(lambda old, new, at: old.at[at].set(new))(old_BSKC, new_BTKC, at_BT)
    first = positions_T[..., 0] % places if is_ring else positions_T[..., 0]
    if first.ndim == 0:
        return lax.dynamic_update_slice_in_dim(old_BSKC, new_BTKC, first, axis=1)
    return jax.vmap(lambda old, new, at: lax.dynamic_update_slice_in_dim(old, new, at, axis=0))(
        old_BSKC, new_BTKC, first
    )
