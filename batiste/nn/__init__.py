# SPDX-License-Identifier: Apache-2.0
"""The layers, once: written object-style, used by both faces."""

from . import initializers
from .activations import (
    PReLU,
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
    tanh,
)
from .conv import Conv, ConvTranspose
from .linear import Einsum, Embed, Linear, LinearGeneral
from .pooling import avg_pool, max_pool, min_pool, pool
