# SPDX-License-Identifier: Apache-2.0
"""The functional face: modules that hold settings, and variables that are passed in and out of their methods."""

from batiste.core.frozen_dict import FrozenDict
from batiste.nn import initializers
from batiste.nn.activations import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
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
from batiste.nn.attend import (
    combine_masks,
    dot_product_attention,
    dot_product_attention_weights,
    make_attention_mask,
    make_causal_mask,
)
from batiste.nn.initializers import ones, ones_init, zeros, zeros_init
from batiste.nn.pooling import avg_pool, max_pool, min_pool, pool

from .boxes import unbox
from .calls import apply, init, init_with_output, merge_param
from .context import disable_named_call, enable_named_call, intercept_methods, override_named_call
from .layers import (
    BatchApply,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DenseGeneral,
    Dropout,
    Einsum,
    Embed,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    PReLU,
    RMSNorm,
    SelfAttention,
    Sequential,
)
from .module import Module, compact, compact_name_scope, nowrap, share_scope
from .scope import DenyList, Variable
