# SPDX-License-Identifier: Apache-2.0
"""Attention of the functional face."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph.errors import ArgumentError
from batiste.nn import attend
from batiste.nn.attend import (
    combine_masks,
    make_attention_mask,
    make_causal_mask,
    weights_by,
)
from batiste.nn.initializers import Initializer
from batiste.nn.linear import default_bias_init, default_kernel_init
from batiste.precision import canonicalize_dtype
from batiste.typing import DotGeneralT, Dtype, PrecisionLike, PRNGKey, Shape

from .calls import merge_param
from .dtypes import promote_dtype
from .lazy import Lazy
from .linear import DenseGeneral
from .module import Module, compact, nowrap
from .normalization import LayerNorm

__all__ = [
    "DotGeneralT",
    "Dtype",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "PRNGKey",
    "PrecisionLike",
    "SelfAttention",
    "Shape",
    "combine_masks",
    "dot_product_attention",
    "dot_product_attention_weights",
    "make_attention_mask",
    "make_causal_mask",
]


EINSUM_OF_KEYS, EINSUM_OF_VALUES = "...qhd,...khd->...hqk", "...hqk,...khd->...qhd"
Einsum = Callable[..., Array]


class _Recorder:
    """What attention records its weights in: a module of the functional face."""

    def __init__(self, module: Module):
        self.module = module

    def sow(self, kind: Any, name: str, value: Array) -> None:
        self.module.sow(kind.collection, name, value)


def _exclusive(problem: str) -> ArgumentError:
    return ArgumentError(f"{problem} are mutually exclusive. Please specify only one of them",
                         fix="let the einsum functions choose the precision")  # fmt: skip


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    einsum: Einsum | None = None,
) -> Array:
    """w[B…, H, T, S] = softmax_S(query[B…, T, H, D] · key[B…, S, K, D] / √D + bias, where mask)

    The arguments are those of `dot_product_attention`.

    >>> x = jnp.ones((2, 5, 4, 3))
    >>> dot_product_attention_weights(x, x).shape
    (2, 4, 5, 5)

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    if einsum is not None and (precision is not None or einsum_dot_general is not None):
        raise _exclusive("precision/einsum_dot_general and einsum")
    query, key = promote_dtype(query, key, dtype=dtype)
    own = _einsum(einsum, einsum_dot_general, precision)
    swap = lambda x: jnp.swapaxes(x, -2, -3)
    multiply = lambda q, k: own(EINSUM_OF_KEYS, swap(q), swap(k))
    rate, recorder = 0.0 if deterministic else dropout_rate, None if module is None else _Recorder(module)
    wide = jnp.float32 if force_fp32_for_softmax else None
    return weights_by(multiply, query, key, bias, mask, broadcast_dropout, dropout_rng, rate, recorder, dtype=wide)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Einsum | None = None,
    attn_weights_value_einsum: Einsum | None = None,
) -> Array:
    """y[B…, T, H, D'] = softmax_S(query[B…, T, H, D] · key[B…, S, H, D] / √D + bias, where mask) · value[B…, S, H, D']

    See `batiste.nn.dot_product_attention`, whose formula it is.

    Args:
        module: a module that records the weights, before dropout, in `intermediates` as `attention_weights`.
        force_fp32_for_softmax: the weights, and with them the result, are float32. The softmax itself always is.
        einsum_dot_general: takes the place of `jax.lax.dot_general` in both products.
        qk_attn_weights_einsum, attn_weights_value_einsum: take the place of `jax.numpy.einsum` in either product.

    Raises:
        ArgumentError: one of the einsum functions is given alone, or with `precision` or `einsum_dot_general`.

    >>> x = jnp.ones((2, 5, 4, 3))
    >>> dot_product_attention(x, x, x).shape
    (2, 5, 4, 3)

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    if (qk_attn_weights_einsum is None) != (attn_weights_value_einsum is None):
        raise ArgumentError("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together",
                            fix="pass jnp.einsum as the other one")  # fmt: skip
    if qk_attn_weights_einsum is not None and (precision is not None or einsum_dot_general is not None):
        raise _exclusive("precision/einsum_dot_general and qk_attn_weights_einsum/attn_weights_value_einsum")
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    common = (broadcast_dropout, dropout_rng, dropout_rate, deterministic, None, precision)
    if qk_attn_weights_einsum is None and einsum_dot_general is None and not force_fp32_for_softmax:
        recorder: Any = None if module is None else _Recorder(module)
        return attend.dot_product_attention(query, key, value, bias, mask, *common, module=recorder)
    attend.check_shapes(module, query, key, value)
    weights = dot_product_attention_weights(
        query, key, bias, mask, *common, module, force_fp32_for_softmax, einsum_dot_general, qk_attn_weights_einsum
    )
    own = _einsum(attn_weights_value_einsum, einsum_dot_general, precision)
    return own(EINSUM_OF_VALUES, weights, value)


def _einsum(given: Einsum | None, dot_general: Any, precision: lax.PrecisionLike) -> Einsum:
    return given or functools.partial(jnp.einsum, precision=precision, _dot_general=dot_general or lax.dot_general)


class _Attention(nn.MultiHeadAttention):
    """An attention layer whose cache is there from the start, and whose stream for dropout is one key."""

    is_functional = True

    def __init__(self, *args: Any, cache_shape: tuple[int, ...] | None, cache_dtype: Any, rngs: Any, **kwargs: Any):
        super().__init__(*args, rngs=rngs, keep_rngs=False, **kwargs)
        if cache_shape is not None:
            self.init_cache(cache_shape, cache_dtype)


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
        if inputs_kv is not None:
            if inputs_k is not None or inputs_v is not None:
                raise ArgumentError("If either `inputs_k` or `inputs_v` is not None, `inputs_kv` must be None",
                                    fix="pass inputs_k and inputs_v")  # fmt: skip
            warnings.warn("The inputs_kv arg will be deprecated soon. Pass inputs_k and inputs_v.",
                          DeprecationWarning, stacklevel=2)  # fmt: skip
            inputs_k = inputs_v = inputs_kv
        elif inputs_v is not None and inputs_v.ndim > 3 and inputs_v.shape[-1] == inputs_v.shape[-2]:
            warnings.warn(f"An array of shape {inputs_v.shape} is passed as inputs_v. If it is a mask, use the kwarg "
                          "`mask` instead: the function signature of MultiHeadDotProductAttention's `__call__` method "
                          "has changed.", DeprecationWarning, stacklevel=2)  # fmt: skip
        keys = inputs_q if inputs_k is None else inputs_k
        is_random = self.dropout_rate > 0 and not merge_param("deterministic", self.deterministic, deterministic)
        if is_random and dropout_rng is None:
            dropout_rng = self.make_rng("dropout")
        settings = self.settings(
            in_features=inputs_q.shape[-1],
            in_kv_features=keys.shape[-1],
            deterministic=not is_random,
            decode=self.decode and self.has_variable("cache", "cached_key"),
            cache_shape=keys.shape if self.decode else None,
            cache_dtype=canonicalize_dtype(keys, jnp.zeros((), self.param_dtype), dtype=self.dtype),
        )
        width = self.qkv_features or inputs_q.shape[-1]
        parts = self._parts(width // self.num_heads, self.out_features or inputs_q.shape[-1])
        parts["attention_fn"] = self._attention_fn(sow_weights)
        return self.run(settings, inputs_q, inputs_k, inputs_v, mask=mask, rngs=dropout_rng, parts=parts)

    @nowrap
    def _parts(self, depth: int, features: int) -> dict[str, Any]:
        """The modules that take the places of the layer's parts."""
        common: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        project: Any = functools.partial(
            DenseGeneral, use_bias=self.use_bias, precision=self.precision, kernel_init=self.kernel_init,
            bias_init=self.bias_init, **common,
        )  # fmt: skip
        one: Any = functools.partial(
            project,
            (self.num_heads, depth),
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        parts: dict[str, Any] = {name: one(name=name) for name in ("query", "key", "value")}
        if self.normalize_qk:
            norm: Any = functools.partial(LayerNorm, use_bias=False, **common)
            parts |= {name: norm(name=name) for name in ("query_ln", "key_ln")}
        own = {"kernel_init": self.out_kernel_init, "bias_init": self.out_bias_init}
        parts["out"] = project(
            features,
            axis=(-2, -1),
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
            **{name: init for name, init in own.items() if init is not None},
        )
        return parts

    @nowrap
    def _attention_fn(self, sow_weights: bool) -> Callable[..., Array]:
        """`attention_fn` with those of the arguments that it knows."""
        known = inspect.signature(self.attention_fn).parameters
        more: dict[str, Any] = {"force_fp32_for_softmax": self.force_fp32_for_softmax}
        for name in ("qk_attn_weights_einsum", "attn_weights_value_einsum"):
            made_by = getattr(self, f"{name}_cls")
            more[name] = None if made_by is None else made_by()

        def call(q: Array, k: Array, v: Array, **given: Any) -> Array:
            given = {name: x for name, x in (given | more).items() if name in known and name != "module"}
            return self.attention_fn(q, k, v, **given, **({"module": self} if sow_weights else {}))

        return call


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
