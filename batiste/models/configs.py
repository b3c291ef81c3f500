# SPDX-License-Identifier: Apache-2.0
"""The sizes of decoders: what can be chosen, and the published choices."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

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
        hidden: features of the MLP.
        head_dim: depth of a head; features / heads if left out.
        gated: SwiGLU; otherwise GELU.
        parallel: attention and MLP read the same input (PaLM).
        tied: the embedding is the head.
        qkv_bias, qk_norm: biases of queries, keys and values (Qwen2); RMSNorm of each head's queries and keys (Qwen3).
        window: how many positions attention looks back on; all if left out.
        rope_theta: the base of RoPE's wavelengths.
        rope_stretch: how they are stretched.
        epsilon: of RMSNorm.
        z_loss: weight of (log Z)² in the loss.
        context: the number of positions the model was trained for.

    Raises:
        ArgumentError: sizes are below one, or do not divide.

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
    window: int | None = None
    rope_theta: float = 1e4
    rope_stretch: Stretch | None = None
    epsilon: float = 1e-5
    z_loss: float = 0.0
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
        if self.depth % 2:
            raise ArgumentError("RoPE turns pairs: a head's depth is even", got=self.depth, fix="pass an even head_dim")

    @property
    def depth(self) -> int:
        """Features of a head."""
        return self.head_dim or self.features // self.heads

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        D, C, heads = self.features, self.depth, self.heads + 2 * self.kv_heads
        attention = D * C * (heads + self.heads) + C * heads * self.qkv_bias + 2 * C * self.qk_norm
        block = attention + D * self.hidden * (2 + self.gated) + D * (2 - self.parallel)
        return self.vocab * D * (2 - self.tied) + self.layers * block + D

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of forward and backward pass per token: 6 N + 6 L T H C

        N: the parameters that multiply (the head, not the lookup of the embedding). Attention counts T / 2 positions,
        as it is causal, or the window. Recomputation does not count.

        Source: Chowdhery et al. 2022, "PaLM", appendix B (with 12 L T H C: there all positions count).
        """
        matrices = self.parameters - self.vocab * self.features * (1 - self.tied)
        span = length / 2 if self.window is None else min(length / 2, self.window)
        return 6 * matrices + 12 * self.layers * self.heads * self.depth * span

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
