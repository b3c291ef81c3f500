# SPDX-License-Identifier: Apache-2.0
"""Layers as functions of a scope, under Flax's path."""

from batiste.linen import activation, initializers
from batiste.linen.activation import (
    celu,
    elu,
    gelu,
    glu,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    relu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    swish,
    tanh,
)
from batiste.nn.pooling import avg_pool, max_pool

from .attention import dot_product_attention, multi_head_dot_product_attention
from .linear import Embedding, conv, conv_transpose, dense, dense_general, embedding
from .normalization import batch_norm, group_norm, layer_norm
from .stochastic import dropout

__all__ = [
    "Embedding", "activation", "avg_pool", "batch_norm", "celu", "conv", "conv_transpose", "dense", "dense_general",
    "dot_product_attention", "dropout", "elu", "embedding", "gelu", "glu", "group_norm", "initializers", "layer_norm",
    "leaky_relu", "log_sigmoid", "log_softmax", "max_pool", "multi_head_dot_product_attention", "relu", "sigmoid",
    "silu", "soft_sign", "softmax", "softplus", "swish", "tanh",
]  # fmt: skip
