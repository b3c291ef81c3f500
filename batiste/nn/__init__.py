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
from .attend import combine_masks, dot_product_attention, make_attention_mask, make_causal_mask
from .attention import MultiHeadAttention
from .cells import GRUCell, LSTMCell, OptimizedLSTMCell, RNNCellBase, SimpleCell
from .conv import Conv, ConvLocal, ConvTranspose
from .linear import Einsum, Embed, Linear, LinearGeneral
from .lora import LoRA, LoRALinear, LoRAParam
from .moe import Experts, MixtureOfExperts, RouterLoss
from .norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .pooling import avg_pool, max_pool, min_pool, pool
from .recurrent import RNN, Bidirectional
from .reparam import SpectralNorm, WeightNorm
from .stack import Stack
from .stochastic import Dropout
