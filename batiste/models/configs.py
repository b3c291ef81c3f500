# SPDX-License-Identifier: Apache-2.0
"""The sizes of decoders: what can be chosen, and the published choices."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from batiste.graph.errors import ArgumentError


class Stretch(NamedTuple):
    """How RoPE's long waves are stretched, for more positions than the first training had (Llama 3.1).

    Args:
        factor: by which.
        low, high: waves that turn less than `low` times in `context` are stretched; more than `high` times, not at all.
        context: positions of the first training.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and choices of a decoder.

    Args:
        vocab: tokens.
        features: of the residual stream.
        layers: blocks.
        heads, kv_heads: of queries, and of keys and values: fewer is grouped-query, one multi-query.
        hidden: features of the MLP; of each, if there are several.
        head_dim: depth of a head; features / heads if left out.
        gated: the MLP has a gate.
        activation: of the MLP; SiLU with a gate and GELU without, if left out.
        experts, top_k: so many MLPs in place of one, of which each position goes through `top_k` (Mixtral).
        capacity: places of each MLP for the positions of a row, as a part of an even share; later positions pass it by.
            Nothing passes if left out.
        parallel: attention and MLP read the same input (PaLM).
        tied: the embedding is the head.
        norm: RMSNorm, with 1 + scale in place of the scale, or LayerNorm.
        post_norms: what attention and MLP give is normed as well (Gemma 2).
        bias: of all other linear layers (GPT-2).
        qkv_bias, qk_norm: biases of queries, keys and values (Qwen2); RMSNorm of each head's queries and keys (Qwen3).
        query_scale: by whose root products of queries and keys are divided; the depth of a head, if left out.
        attn_cap, logit_cap: products of queries and keys, and logits, x become cap tanh(x / cap).
        window: how many positions attention looks back on; all if left out.
        full_every: each so-manyth layer looks back on all positions, in spite of the window (Gemma 2 and 3).
        learned_positions: an embedding of each of `context` positions is added, in place of RoPE (GPT-2).
        embed_scale: embeddings are multiplied by √features (Gemma).
        rope_theta: the base of RoPE's wavelengths.
        local_theta: that of the layers with a window, where not all have one; as the others, if left out.
        rope_stretch: how they are stretched.
        epsilon: of the norms.
        z_loss: weight of (log Z)² in the loss.
        balance_loss, router_z_loss: weights of what routers add to the loss of a token; see `Decoder.loss`.
        context: the number of positions the model was trained for.

    Raises:
        ArgumentError: sizes are below one or do not divide, or choices contradict each other.

    >>> DecoderConfig(vocab=256, features=64, layers=2, heads=4, kv_heads=2, hidden=128).parameters
    90432
    """

    vocab: int
    features: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int | None = None
    gated: bool = True
    parallel: bool = False
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    norm: Literal["rms", "rms+1", "layer"] = "rms"
    post_norms: bool = False
    bias: bool = False
    activation: Literal["silu", "gelu"] | None = None
    experts: int = 0
    top_k: int = 2
    capacity: float | None = None
    query_scale: int | None = None
    attn_cap: float | None = None
    logit_cap: float | None = None
    window: int | None = None
    full_every: int = 0
    learned_positions: bool = False
    embed_scale: bool = False
    rope_theta: float = 1e4
    local_theta: float | None = None
    rope_stretch: Stretch | None = None
    epsilon: float = 1e-5
    z_loss: float = 0.0
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    context: int = 2048

    def __post_init__(self):
        for name in ("vocab", "features", "layers", "heads", "kv_heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"a decoder's {name} is a size", got=getattr(self, name), expected="1 or more")
        if self.heads % self.kv_heads:
            raise ArgumentError("each head of keys serves the same number of heads of queries",
                                got=f"heads={self.heads}, kv_heads={self.kv_heads}",
                                fix="choose kv_heads that divide heads")  # fmt: skip
        if self.head_dim is None and self.features % self.heads:
            raise ArgumentError("the heads do not divide the features",
                                got=f"{self.features} features, {self.heads} heads",
                                fix="pass head_dim")  # fmt: skip
        if self.norm not in ("rms", "rms+1", "layer") or self.activation not in (None, "silu", "gelu"):
            raise ArgumentError("a decoder has norms and activations of a few kinds",
                                got=f"norm={self.norm!r}, activation={self.activation!r}",
                                expected="rms, rms+1 or layer; silu, gelu or None")  # fmt: skip
        if self.experts and (not self.gated or self.bias or not 1 <= self.top_k <= self.experts):
            raise ArgumentError("experts are MLPs with a gate and without biases",
                                got=f"gated={self.gated}, bias={self.bias}, top_k={self.top_k} of {self.experts}",
                                expected="top_k from 1 to the number of experts")  # fmt: skip
        if (self.full_every and not self.window) or (self.local_theta and not self.full_every):
            raise ArgumentError("layers differ where some have a window", expected="window, full_every, local_theta",
                                got=f"{self.window}, {self.full_every}, {self.local_theta}")  # fmt: skip
        if self.depth % 2 and not self.learned_positions:
            raise ArgumentError("RoPE turns pairs: a head's depth is even", got=self.depth, fix="pass an even head_dim")

    @property
    def depth(self) -> int:
        """Features of a head."""
        return self.head_dim or self.features // self.heads

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        D, C, heads = self.features, self.depth, self.heads + 2 * self.kv_heads
        norm = D * (2 if self.norm == "layer" else 1)
        attention = D * C * (heads + self.heads) + C * heads * self.qkv_bias + 2 * C * self.qk_norm + D * self.bias
        block = attention + norm * (2 - self.parallel + 2 * self.post_norms) + D * self.experts
        block += self._mlp * (self.experts or 1) + self.bias * (D + self.hidden * (1 + self.gated))
        first = self.vocab * D * (2 - self.tied) + self.context * D * self.learned_positions
        return first + self.layers * block + norm

    @property
    def _mlp(self) -> int:
        """The parameters of the kernels of an MLP."""
        return self.features * self.hidden * (2 + self.gated)

    @property
    def full_layers(self) -> tuple[bool, ...]:
        """Which layers look back on all positions."""
        every = self.full_every or (self.layers + 1 if self.window else 1)
        return tuple((i + 1) % every == 0 for i in range(self.layers))

    @property
    def ring(self) -> int | None:
        """How many positions a cache has to hold, if not all."""
        return None if self.full_every else self.window

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of forward and backward pass per token: 6 N + 6 L T H C

        N: the parameters that multiply (the head, not the lookup of the embedding). Attention counts T / 2 positions,
        as it is causal, or the window; of experts, those that a position goes through. Recomputation does not count.

        Source: Chowdhery et al. 2022, "PaLM", appendix B (with 12 L T H C: there all positions count).
        """
        looked_up = self.vocab * (1 - self.tied) + self.context * self.learned_positions
        idle = self.layers * self._mlp * max(self.experts - self.top_k, 0)
        matrices = self.parameters - looked_up * self.features - idle
        spans = sum(length / 2 if is_full else min(length / 2, self.window or length) for is_full in self.full_layers)
        return 6 * matrices + 12 * self.heads * self.depth * spans

    def replace(self, **changes: Any) -> DecoderConfig:
        """A configuration with other choices."""
        return dataclasses.replace(self, **changes)


_c = DecoderConfig
DECODERS: dict[str, DecoderConfig] = {
    "tiny": _c(256, 64, 2, 4, 2, 160, context=128),
    "smollm2-135m": _c(49152, 576, 30, 9, 3, 1536, rope_theta=1e5, context=8192),
    "smollm2-360m": _c(49152, 960, 32, 15, 5, 2560, rope_theta=1e5, context=8192),
    "llama2-7b": _c(32000, 4096, 32, 32, 32, 11008, tied=False, context=4096),
    "llama3-8b": _c(128256, 4096, 32, 32, 8, 14336, tied=False, rope_theta=5e5, context=8192),
    "llama3.1-8b": _c(
        128256, 4096, 32, 32, 8, 14336, tied=False, rope_theta=5e5, rope_stretch=Stretch(), context=131072
    ),
    "llama3.2-1b": _c(128256, 2048, 16, 32, 8, 8192, rope_theta=5e5, rope_stretch=Stretch(32.0), context=131072),
    "mistral-7b": _c(32000, 4096, 32, 32, 8, 14336, tied=False, window=4096, context=32768),
    "qwen2-0.5b": _c(151936, 896, 24, 14, 2, 4864, qkv_bias=True, rope_theta=1e6, epsilon=1e-6, context=32768),
    "qwen3-0.6b": _c(151936, 1024, 28, 16, 8, 3072, 128, qk_norm=True, rope_theta=1e6, epsilon=1e-6, context=40960),
    "palm-8b": _c(256000, 4096, 32, 16, 1, 16384, 256, parallel=True, z_loss=1e-4, epsilon=1e-6),
}
"""Published configurations, and `tiny` for trying. `palm-8b` has PaLM's shapes, with RMSNorm and one input norm."""

_gpt2 = _c(50257, 768, 12, 12, 12, 3072, gated=False, norm="layer", bias=True, qkv_bias=True, learned_positions=True,
           context=1024)  # fmt: skip
GPT2S = {
    "tiny": _gpt2.replace(vocab=256, features=64, layers=2, heads=4, kv_heads=4, hidden=256, context=128),
    "gpt2": _gpt2,
    "gpt2-medium": _gpt2.replace(features=1024, layers=24, heads=16, kv_heads=16, hidden=4096),
    "gpt2-large": _gpt2.replace(features=1280, layers=36, heads=20, kv_heads=20, hidden=5120),
    "gpt2-xl": _gpt2.replace(features=1600, layers=48, heads=25, kv_heads=25, hidden=6400),
}
"""GPT-2, of Radford et al. 2019."""

_gemma2 = _c(256000, 2304, 26, 8, 4, 9216, 256, norm="rms+1", post_norms=True, activation="gelu", embed_scale=True,
             attn_cap=50.0, logit_cap=30.0, query_scale=256, window=4096, full_every=2, epsilon=1e-6,
             context=8192)  # fmt: skip
_gemma3 = _gemma2.replace(vocab=262144, features=1152, heads=4, kv_heads=1, hidden=6912, qk_norm=True, attn_cap=None,
                          logit_cap=None, window=512, full_every=6, rope_theta=1e6, local_theta=1e4,
                          context=32768)  # fmt: skip
GEMMAS = {
    "tiny": _gemma3.replace(vocab=256, features=64, layers=3, heads=4, hidden=160, head_dim=24, query_scale=20,
                            window=8, full_every=3, context=128),
    "gemma2-2b": _gemma2,
    "gemma2-9b": _gemma2.replace(features=3584, layers=42, heads=16, kv_heads=8, hidden=14336),
    "gemma2-27b": _gemma2.replace(features=4608, layers=46, heads=32, kv_heads=16, hidden=36864, head_dim=128,
                                  query_scale=144),
    "gemma3-270m": _gemma3.replace(features=640, layers=18, hidden=2048),
    "gemma3-1b": _gemma3,
}  # fmt: skip
"""Gemma 2 and the Gemma 3 that read text alone, of their technical reports (2024, table 1; 2025, table 1)."""

_mixtral = _c(32000, 4096, 32, 32, 8, 14336, tied=False, experts=8, rope_theta=1e6, context=32768)
MIXTRALS = {
    "tiny": _mixtral.replace(vocab=256, features=64, layers=2, heads=4, kv_heads=2, hidden=96, experts=4, context=128),
    "mixtral-8x7b": _mixtral,
    "mixtral-8x22b": _mixtral.replace(vocab=32768, features=6144, layers=56, heads=48, hidden=16384, context=65536),
}
"""Mixtral, of Jiang et al. 2024, table 1; 8x22b with the vocabulary of its instructed version."""

QWEN3_MOES = {
    "tiny": MIXTRALS["tiny"].replace(qk_norm=True, head_dim=24, epsilon=1e-6),
    "qwen3-30b-a3b": _c(151936, 2048, 48, 32, 4, 768, 128, tied=False, qk_norm=True, experts=128, top_k=8,
                        rope_theta=1e6, epsilon=1e-6, context=40960),
    "qwen3-235b-a22b": _c(151936, 4096, 94, 64, 4, 1536, 128, tied=False, qk_norm=True, experts=128, top_k=8,
                          rope_theta=1e6, epsilon=1e-6, context=40960),
}  # fmt: skip
"""Qwen3's mixtures of experts, of its technical report, 2025, table 2."""
