# SPDX-License-Identifier: Apache-2.0
"""The functional face: modules that hold settings, and variables that are passed in and out of their methods."""

from batiste.core.frozen_dict import FrozenDict
from batiste.nn.initializers import ones, ones_init, zeros, zeros_init

from . import (
    activation,
    attention,
    batch_apply,
    combinators,
    dtypes,
    fp8_ops,
    initializers,
    kw_only_dataclasses,
    linear,
    normalization,
    partitioning,
    pooling,
    recurrent,
    spmd,
    stochastic,
    transforms,
)
from . import boxes as meta
from .activation import (
    PReLU,
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
    normalize,
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
from .attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
    combine_masks,
    dot_product_attention,
    dot_product_attention_weights,
    make_attention_mask,
    make_causal_mask,
)
from .batch_apply import BatchApply
from .boxes import PARTITION_NAME, Partitioned, get_partition_spec, get_sharding, unbox, with_partitioning
from .calls import apply, init, init_with_output, merge_param
from .combinators import Sequential
from .context import disable_named_call, enable_named_call, intercept_methods, override_named_call
from .fp8_ops import Fp8DirectDotGeneralOp, Fp8DotGeneral, Fp8DotGeneralOp, Fp8Einsum, NANOOFp8DotGeneralOp
from .lift import broadcast
from .linear import Conv, ConvLocal, ConvTranspose, Dense, DenseGeneral, Einsum, Embed
from .module import Module, compact, compact_name_scope, nowrap, share_scope
from .normalization import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, SpectralNorm, WeightNorm
from .pooling import avg_pool, max_pool, min_pool, pool
from .recurrent import (
    RNN,
    Bidirectional,
    ConvLSTMCell,
    GRUCell,
    LSTMCell,
    MGUCell,
    OptimizedLSTMCell,
    RNNCellBase,
    SimpleCell,
)
from .scope import DenyList, Variable
from .spmd import (
    LogicallyPartitioned,
    get_logical_axis_rules,
    logical_axis_rules,
    logical_to_mesh,
    logical_to_mesh_axes,
    logical_to_mesh_sharding,
    set_logical_axis_rules,
    with_logical_constraint,
    with_logical_partitioning,
)
from .stochastic import Dropout
from .summary import tabulate
from .transforms import (
    add_metadata_axis,
    checkpoint,
    cond,
    custom_vjp,
    fold_rngs,
    grad,
    jit,
    jvp,
    map_variables,
    named_call,
    remat,
    remat_scan,
    scan,
    switch,
    value_and_grad,
    vjp,
    vmap,
    while_loop,
)
