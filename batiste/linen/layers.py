# SPDX-License-Identifier: Apache-2.0
"""The layers of the functional face: each is an object layer, its fields, and what the input says about its sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste import nn
from batiste.core.frozen_dict import FrozenDict
from batiste.graph.errors import ArgumentError
from batiste.nn import initializers
from batiste.nn.attend import dot_product_attention
from batiste.nn.conv import PaddingLike, PerDim
from batiste.nn.initializers import Initializer
from batiste.nn.linear import as_tuple, default_bias_init, default_embed_init, default_kernel_init
from batiste.precision import canonicalize_dtype, promote_dtype

from .calls import merge_param
from .lazy import Lazy
from .module import Module, compact, nowrap

Axes = int | Sequence[int]
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def _product(given: Any, cls: Any, default: Any) -> Any:
    """The function that multiplies: made by `cls`, or given, or the layer's own."""
    made = cls() if cls is not None else given
    return default if made is None else made


# ---------------------------------------------------------------- linear maps
class Dense(Lazy, of=nn.Linear):
    """y[..., features] = x[..., in] @ kernel[in, features] + bias[features]; see `batiste.nn.Linear`

    Args:
        dot_general, dot_general_cls: in place of `jax.lax.dot_general`: a function, or a module class.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    promote_dtype: Callable[..., Any] = promote_dtype
    dot_general: Callable[..., Array] | None = None
    dot_general_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        product = _product(self.dot_general, self.dot_general_cls, lax.dot_general)
        return self.run(
            self.settings(in_features=inputs.shape[-1], out_features=self.features, dot_general=product), inputs
        )


class DenseGeneral(Lazy, of=nn.LinearGeneral):
    """y[*batch, ..., *features] = Σ x[*batch, ..., *in] kernel[*batch, *in, *features] + bias

    See `batiste.nn.LinearGeneral`.

    Args:
        axis: the dims of `x` that are summed over.
        batch_dims: leading dims for each entry of which there is a kernel of its own.
    """

    features: Axes
    axis: Axes = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    precision: Any = None
    promote_dtype: Callable[..., Any] = promote_dtype
    dot_general: Callable[..., Array] | None = None
    dot_general_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        axes = tuple(axis % inputs.ndim for axis in as_tuple(self.axis))
        batch = tuple(sorted(axis % inputs.ndim for axis in as_tuple(self.batch_dims)))
        if batch != tuple(range(len(batch))):
            raise ArgumentError(f"batch_dims {batch} must be consecutive leading dimensions starting from 0",
                                fix="transpose the input")  # fmt: skip
        settings = self.settings(
            in_features=tuple(inputs.shape[axis] for axis in axes),
            out_features=as_tuple(self.features),
            axis=axes,
            batch_axis=nn.linear.AxisSizes({axis: inputs.shape[axis] for axis in batch}),
            dot_general=_product(self.dot_general, self.dot_general_cls, None),
            dot_general_cls=None,
        )
        return self.run(settings, inputs)


class Einsum(Lazy, of=nn.Einsum):
    """y = einsum(einsum_str, x, kernel[*shape]) + bias; see `batiste.nn.Einsum`"""

    shape: Sequence[int]
    einsum_str: str | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    promote_dtype: Callable[..., Any] = promote_dtype
    preferred_element_type: DTypeLike | None = None

    @compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        equation = merge_param("einsum_str", self.einsum_str, einsum_str).replace(" ", "")
        bias_shape = None
        if self.use_bias and "->" in equation and equation.count(",") == 1:
            operands, result = equation.split("->")
            sizes = dict(zip(operands.split(",")[1].replace("...", ""), self.shape))
            bias_shape = tuple(sizes[label] for label in result if label in sizes)
        settings = self.settings(einsum_str=equation, kernel_shape=tuple(self.shape), bias_shape=bias_shape)
        return self.run(settings, inputs)


class Embed(Lazy, of=nn.Embed):
    """y[..., features] = embedding[x[...], features]; see `batiste.nn.Embed`"""

    num_embeddings: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    embedding_init: Initializer = default_embed_init
    promote_dtype: Callable[..., Any] = promote_dtype

    def __call__(self, inputs: Array) -> Array:
        return self.run(self.settings(), inputs)

    def attend(self, query: Array) -> Array:
        """logits[..., n] = query[..., features] @ embedding[n, features].T"""
        return self.run(self.settings(), query, method="attend")

    @property
    def embedding(self) -> Array:
        """The table, [num_embeddings, features]."""
        return self.get_variable("params", "embedding")


# ---------------------------------------------------------------- convolutions
class Conv(Lazy, of=nn.Conv):
    """y[*batch, *out, features] = x[*batch, *spatial, in] * kernel[*kernel_size, in, features] + bias

    See `batiste.nn.Conv`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: PerDim = 1
    padding: PaddingLike = "SAME"
    input_dilation: PerDim = 1
    kernel_dilation: PerDim = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: Array | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    promote_dtype: Callable[..., Any] = promote_dtype
    conv_general_dilated: Callable[..., Array] | None = None
    conv_general_dilated_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        product = _product(self.conv_general_dilated, self.conv_general_dilated_cls, lax.conv_general_dilated)
        sizes = dict(in_features=inputs.shape[-1], out_features=self.features, kernel_size=as_tuple(self.kernel_size))
        return self.run(self.settings(**sizes, conv_general_dilated=product), inputs)


class ConvTranspose(Lazy, of=nn.ConvTranspose):
    """y[*batch, *out, features] = spread(x) * kernel[*kernel_size, in, features] + bias

    See `batiste.nn.ConvTranspose`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: PerDim = None
    padding: PaddingLike = "SAME"
    kernel_dilation: PerDim = None
    use_bias: bool = True
    mask: Array | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    transpose_kernel: bool = False
    promote_dtype: Callable[..., Any] = promote_dtype
    preferred_element_type: DTypeLike | None = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        sizes = dict(in_features=inputs.shape[-1], out_features=self.features, kernel_size=as_tuple(self.kernel_size))
        return self.run(self.settings(**sizes), inputs)


# ---------------------------------------------------------------- normalisation
class _Norm(Lazy):
    """What the normalising layers share: the shape of their variables in the scope."""

    @nowrap
    def normalize(
        self, x: Array, axes: Axes, *args: Any, settings: Mapping[str, Any] = NO_SETTINGS, **kwargs: Any
    ) -> Array:
        """Runs the layer; its variables have the sizes of `x` on `axes`, each as a dim of its own."""
        shape = tuple(x.shape[axis] for axis in sorted(axis % x.ndim for axis in as_tuple(axes)))
        size = math.prod(shape)
        names = ("scale", "bias", "mean", "var")
        shapes: dict[str, tuple[int, ...]] = {name: shape for name in names if len(shape) > 1}
        return self.run(self.settings(num_features=size, **settings), x, *args, shapes=shapes, **kwargs)


class BatchNorm(_Norm, of=nn.BatchNorm):
    """y[..., c] = (x[..., c] - mean[c]) / √(var[c] + ε) * scale[c] + bias[c]; see `batiste.nn.BatchNorm`

    Args:
        use_running_average: use the stored moments (evaluation); given here or in the call. While a model is
            initialised the batch's are used and none is stored.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        stored = merge_param("use_running_average", self.use_running_average, use_running_average)
        mapped = None if self.is_initializing() else self.axis_name  # nothing need be mapped to make the variables
        settings = {"use_running_average": stored, "axis_name": mapped}
        return self.normalize(x, self.axis, mask=mask, settings=settings)


class LayerNorm(_Norm, of=nn.LayerNorm):
    """y = (x - mean) / √(var + ε) * scale + bias, moments over the features of each entry

    See `batiste.nn.LayerNorm`.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, self.feature_axes, mask=mask)


class RMSNorm(_Norm, of=nn.RMSNorm):
    """y = x / √(E[x²] + ε) * scale, the mean square over the features of each entry; see `batiste.nn.RMSNorm`"""

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, self.feature_axes, mask=mask)


class GroupNorm(_Norm, of=nn.GroupNorm):
    """y = (x - mean) / √(var + ε) * scale + bias, moments over a group of features and space

    See `batiste.nn.GroupNorm`.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, -1, mask=mask)


class InstanceNorm(_Norm, of=nn.InstanceNorm):
    """y = (x - mean) / √(var + ε) * scale + bias, moments of each feature over space; see `batiste.nn.InstanceNorm`"""

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return self.normalize(x, self.feature_axes, mask=mask)


# ---------------------------------------------------------------- attention
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


# ---------------------------------------------------------------- others
class Dropout(Lazy, of=nn.Dropout):
    """y = x * m / (1 - rate), m drawn from Bernoulli(1 - rate), in training; y = x in evaluation

    See `batiste.nn.Dropout`.

    Args:
        deterministic: evaluation; given here or in the call.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Args:
        rng: the key to draw from, in place of one from the stream `rng_collection`.
        """
        still = merge_param("deterministic", self.deterministic, deterministic)
        if still or self.rate == 0:
            return inputs
        if self.rate != 1 and rng is None:
            rng = self.make_rng(self.rng_collection)
        layer = nn.Dropout(self.rate, broadcast_dims=tuple(self.broadcast_dims), deterministic=False)
        return layer(inputs, rngs=rng)


class PReLU(Lazy, of=nn.PReLU):
    """y = x where x ≥ 0, else negative_slope * x; see `batiste.nn.PReLU`"""

    param_dtype: DTypeLike = jnp.float32
    negative_slope_init: float = 0.01

    @compact
    def __call__(self, inputs: Array) -> Array:
        return self.run(self.settings(), inputs)


class Sequential(Module):
    """y = fₙ(… f₂(f₁(x)))

    A layer that returns a tuple or a dict gives the next one several arguments, or named ones.
    """

    layers: Sequence[Callable[..., Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            raise ArgumentError(
                "'layers' must be a sequence", got=type(self.layers).__name__, fix="pass a list of layers"
            )
        super().__post_init__()

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layers:
            raise ArgumentError("Empty Sequential module", at=str(self.path), fix="pass at least one layer")
        y = self.layers[0](*args, **kwargs)
        for layer in self.layers[1:]:
            if isinstance(y, tuple):
                y = layer(*y)
            elif isinstance(y, (dict, FrozenDict)):
                y = layer(**y)
            else:
                y = layer(y)
        return y


class BatchApply:
    """f with the first `num_dims` dims of all its arguments made one, and split again in its results

    >>> BatchApply(jnp.sum, num_dims=2)(jnp.ones((2, 3, 4))).shape
    ()
    """

    def __init__(self, f: Callable[..., Any], num_dims: int = 2):
        self.f, self.num_dims = f, num_dims

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays = [jnp.shape(x) for x in jax.tree.leaves((args, kwargs)) if jnp.ndim(x) >= self.num_dims]
        if not arrays:
            raise ArgumentError(f"BatchApply requires at least one input of {self.num_dims} dims or more",
                                fix="pass an array with the dims to merge, or another num_dims")  # fmt: skip
        leading = arrays[0][: self.num_dims]
        merge = lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[self.num_dims :])) if jnp.ndim(x) >= self.num_dims else x
        split = lambda y: jnp.reshape(y, (*leading, *jnp.shape(y)[1:])) if jnp.ndim(y) else y
        args, kwargs = jax.tree.map(merge, (args, kwargs))
        return jax.tree.map(split, self.f(*args, **kwargs))
