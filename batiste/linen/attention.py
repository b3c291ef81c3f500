# SPDX-License-Identifier: Apache-2.0
"""Attention of the functional face."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph.errors import ArgumentError
from batiste.nn.attend import (
    combine_masks,
    dot_product_attention,
    dot_product_attention_weights,
    make_attention_mask,
    make_causal_mask,
)
from batiste.nn.initializers import Initializer
from batiste.nn.linear import default_bias_init, default_kernel_init
from batiste.precision import canonicalize_dtype

from .calls import merge_param
from .lazy import Lazy
from .module import compact

__all__ = [
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "combine_masks",
    "dot_product_attention",
    "dot_product_attention_weights",
    "make_attention_mask",
    "make_causal_mask",
]


class _Attention(nn.MultiHeadAttention):
    """An attention layer whose cache is there from the start, and whose stream for dropout is one key."""

    def __init__(self, *args: Any, cache_shape: tuple[int, ...] | None, cache_dtype: Any, rngs: Any, **kwargs: Any):
        super().__init__(*args, rngs=rngs, keep_rngs=False, **kwargs)
        if cache_shape is not None:
            self.init_cache(cache_shape, cache_dtype)

    def _dropout_key(self, rngs: Any) -> Array:
        return rngs

    def sow(self, kind: Any, name: str, value: Any, **options: Any) -> bool:
        """Records a value for the module around this layer, which collects it after the call."""
        setattr(self, name, kind((value,)))
        return True


class MultiHeadDotProductAttention(Lazy, of=_Attention):
    """y = softmax(q · k / √d) · v over several heads, projected in and out; see `batiste.nn.MultiHeadAttention`

    Args:
        decode: one position per call, keys and values kept in the collection `cache`, which `init` makes as long as the
            input that it is given.
    """

    num_heads: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = default_bias_init
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    attention_fn: Callable[..., Array] = dot_product_attention
    decode: bool = False
    normalize_qk: bool = False
    force_fp32_for_softmax: bool = False
    qkv_dot_general: Callable[..., Array] | None = None
    out_dot_general: Callable[..., Array] | None = None
    qkv_dot_general_cls: Any = None
    out_dot_general_cls: Any = None
    qk_attn_weights_einsum_cls: Any = None
    attn_weights_value_einsum_cls: Any = None

    @compact
    def __call__(self, inputs_q: Array, inputs_k: Array | None = None, inputs_v: Array | None = None, *,
                 inputs_kv: Array | None = None, mask: Array | None = None, deterministic: bool | None = None,
                 dropout_rng: Array | None = None, sow_weights: bool = False) -> Array:  # fmt: skip
        """Args:
        inputs_q, inputs_k, inputs_v: [B…, T, in], [B…, S, in_kv], [B…, S, in_kv]; keys default to the queries' input,
            values to the keys'.
        inputs_kv: older name of what keys and values have in common.
        mask: entries that are False (or 0) get no weight; broadcasts to (B…, H, T, S).
        dropout_rng: the key of dropout, in place of one from the stream `dropout`.
        sow_weights: record the weights in `intermediates` as `attention_weights`.
        """
        for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
            if getattr(self, name) is not None:
                raise ArgumentError(f"{name} is not supported", fix="pass an attention_fn that uses it")
        if inputs_kv is not None:
            if inputs_k is not None or inputs_v is not None:
                raise ArgumentError("If either `inputs_k` or `inputs_v` is not None, `inputs_kv` must be None",
                                    fix="pass inputs_k and inputs_v")  # fmt: skip
            warnings.warn(
                "The inputs_kv arg is deprecated: pass inputs_k and inputs_v.", DeprecationWarning, stacklevel=2
            )
            inputs_k = inputs_v = inputs_kv
        keys = inputs_q if inputs_k is None else inputs_k
        is_random = self.dropout_rate > 0 and not merge_param("deterministic", self.deterministic, deterministic)
        if is_random and dropout_rng is None:
            dropout_rng = self.make_rng("dropout")
        width = inputs_q.shape[-1]
        dtype = canonicalize_dtype(inputs_q, keys, dtype=self.dtype) if self.decode else None
        settings = self.settings(
            in_features=width,
            in_kv_features=keys.shape[-1],
            qkv_features=self.qkv_features or width,
            out_features=self.out_features or width,
            deterministic=not is_random,
            decode=self.decode and not self.is_initializing(),
            cache_shape=(*keys.shape[:-1], keys.shape[-1]) if self.decode else None,
            cache_dtype=dtype,
        )
        return self.run(settings, inputs_q, inputs_k, inputs_v, mask=mask, rngs=dropout_rng, sow_weights=sow_weights)


class MultiHeadAttention(MultiHeadDotProductAttention):
    """The newer name of `MultiHeadDotProductAttention`."""


class SelfAttention(MultiHeadDotProductAttention):
    """Attention of a sequence to itself."""

    @compact
    def __call__(self, inputs_q: Array, mask: Array | None = None, deterministic: bool | None = None,
                 dropout_rng: Array | None = None, sow_weights: bool = False) -> Array:  # type: ignore[override]  # fmt: skip
        warnings.warn("SelfAttention will be deprecated soon: use `MultiHeadDotProductAttention.__call__(inputs_q)`.",
                      DeprecationWarning, stacklevel=2)  # fmt: skip
        return super().__call__(
            inputs_q, mask=mask, deterministic=deterministic, dropout_rng=dropout_rng, sow_weights=sow_weights
        )
