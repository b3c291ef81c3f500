# SPDX-License-Identifier: Apache-2.0
"""The rows of the parity table of the functional face: layers and small models, built with either library's `linen`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from tests.parity.case import Case, integers, normal

X, X_BTD, IMAGE = (normal(4, 3),), (normal(2, 5, 8),), (normal(2, 6, 6, 4),)
bias_init = initializers.normal(1.0)


def mlp(lib: Any) -> Any:
    class MLP(lib.Module):
        width: int = 4

        @lib.compact
        def __call__(self, x):
            x = lib.relu(lib.Dense(self.width)(x))
            x = x + self.param("shift", initializers.normal(), (1, self.width))
            return lib.Dense(2, name="head")(x) + lib.Dense(2)(x)

    return MLP()


def with_setup(lib: Any) -> Any:
    class Model(lib.Module):
        blocks: Any
        named: Any

        def setup(self):
            self.norm = lib.LayerNorm()
            self.more = [lib.Dense(8), {"a": lib.Dense(8), "b": lib.Dense(8, use_bias=False)}]
            self.scale = self.param("scale", bias_init, (1, 1, 8))

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            x = self.norm(self.named["first"](x)) * self.scale
            return self.more[0](x) + self.more[1]["a"](x) + self.more[1]["b"](self.more[0](x))

    return Model([lib.Dense(8), lib.relu], {"first": lib.Dense(8)})


def shared(lib: Any) -> Any:
    class Caller(lib.Module):
        inner: Any

        @lib.compact
        def __call__(self, x):
            return lib.Dense(3)(self.inner(x))

    class Pair(lib.Module):
        left: Any
        right: Any

        def __call__(self, x):
            return self.left(x) + self.right(x)

    one = lib.Dense(3, bias_init=bias_init)
    return Pair(Caller(one), Caller(one))


def statistics(lib: Any) -> Any:
    class Model(lib.Module):
        @lib.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, (1, x.shape[-1]))
            if not self.is_initializing():
                mean.value = 0.9 * mean.value + 0.1 * x.mean(0, keepdims=True)
            self.sow("intermediates", "seen", x.sum())
            x = self.perturb("before", x)
            return lib.BatchNorm(use_running_average=False)(lib.Dense(4)(x - mean.value))

    return Model()


def one_step(cell: Any, x: Any) -> Any:
    """Carry and output of one step, from a carry that the cell draws, as one array."""
    carry = cell.initialize_carry(jax.random.key(3), x.shape)
    return jnp.concatenate([y.reshape(-1) for y in jax.tree.leaves(cell(carry, x))])


def all_of(layer: Any, x: Any, **options: Any) -> Any:
    return jnp.concatenate([y.reshape(-1) for y in jax.tree.leaves(layer(x, **options))])


def cell(name: str, kind: str, **options: Any) -> Case:
    settings = {"carry_init": bias_init, **options}
    return Case(name, lambda nn: getattr(nn, kind)(4, **settings), X, call=one_step)


def rnn(name: str, kind: str, call: dict[str, Any] | None = None, **options: Any) -> Case:
    return Case(name, lambda nn: nn.RNN(getattr(nn, kind)(4, carry_init=bias_init), **options), X_BTD,
                call=lambda layer, x: all_of(layer, x, **(call or {})), tolerance=1e-4)  # fmt: skip


def bidirectional(lib: Any) -> Any:
    return lib.Bidirectional(lib.RNN(lib.GRUCell(4)), lib.RNN(lib.LSTMCell(3)), return_carry=True)


LENGTHS = jnp.array([2, 5])

CASES = [
    Case("dense", lambda nn: nn.Dense(4), X),
    Case("dense-bias", lambda nn: nn.Dense(4, bias_init=bias_init), X_BTD),
    Case("dense-no-bias", lambda nn: nn.Dense(4, use_bias=False), X),
    Case("dense-bf16", lambda nn: nn.Dense(4, dtype=jnp.bfloat16), X, tolerance=2e-2),
    Case("general", lambda nn: nn.DenseGeneral((2, 3), axis=(-2, -1), bias_init=bias_init), X_BTD),
    Case("general-batch", lambda nn: nn.DenseGeneral(4, batch_dims=(0,), bias_init=bias_init), X_BTD),
    Case("general-axes", lambda nn: nn.DenseGeneral(3, axis=(-1, 1), bias_init=bias_init), IMAGE),
    Case("einsum", lambda nn: nn.Einsum((8, 2, 3), "btd,dhk->bthk", bias_init=bias_init), X_BTD),
    Case("einsum-ellipsis", lambda nn: nn.Einsum((8, 3), "...d,df->...f", bias_init=bias_init), X_BTD),
    Case("einsum-no-bias", lambda nn: nn.Einsum((8, 3), "abd,df->abf", use_bias=False), X_BTD),
    Case("embed", lambda nn: nn.Embed(7, 4), (integers(2, 5, below=7),)),
    Case("embed-attend", lambda nn: nn.Embed(7, 3), X, call=lambda layer, x: layer.attend(x)),
    Case("conv", lambda nn: nn.Conv(5, (3, 3), bias_init=bias_init), IMAGE),
    Case("conv-1d", lambda nn: nn.Conv(5, 3, padding="CAUSAL"), X_BTD),
    Case("conv-groups", lambda nn: nn.Conv(6, (3, 2), strides=2, feature_group_count=2, padding="VALID"), IMAGE),
    Case("conv-transpose", lambda nn: nn.ConvTranspose(5, (3, 3), strides=(2, 2), bias_init=bias_init), IMAGE),
    Case("conv-transpose-flipped", lambda nn: nn.ConvTranspose(5, (3, 3), transpose_kernel=True), IMAGE),
    Case("conv-local", lambda nn: nn.ConvLocal(5, (3, 2), strides=(2, 1), bias_init=bias_init), IMAGE),
    Case("conv-local-1d", lambda nn: nn.ConvLocal(5, 3, padding="CAUSAL"), X_BTD),
    Case("batch-norm", lambda nn: nn.BatchNorm(use_running_average=False, scale_init=bias_init), X_BTD),
    Case("batch-norm-stored", lambda nn: nn.BatchNorm(use_running_average=True, bias_init=bias_init), X_BTD),
    Case("batch-norm-two-axes", lambda nn: nn.BatchNorm(
        use_running_average=False, axis=(1, 2), scale_init=bias_init), (normal(9, 2, 3),)),
    Case("layer-norm", lambda nn: nn.LayerNorm(scale_init=bias_init, bias_init=bias_init), X_BTD),
    Case("layer-norm-two-axes", lambda nn: nn.LayerNorm(
        reduction_axes=(1, 2), feature_axes=(1, 2), scale_init=bias_init), X_BTD),
    Case("rms-norm", lambda nn: nn.RMSNorm(scale_init=bias_init), X_BTD),
    Case("group-norm", lambda nn: nn.GroupNorm(2, scale_init=bias_init), IMAGE),
    Case("group-norm-size", lambda nn: nn.GroupNorm(None, group_size=2, bias_init=bias_init), IMAGE),
    Case("instance-norm", lambda nn: nn.InstanceNorm(scale_init=bias_init), IMAGE),
    Case("prelu", lambda nn: nn.PReLU(), X),
    Case("dropout", lambda nn: nn.Dropout(0.5, deterministic=False), X_BTD),
    Case("dropout-broadcast", lambda nn: nn.Dropout(0.3, broadcast_dims=(1,), deterministic=False), X_BTD),
    Case("attention", lambda nn: nn.MultiHeadDotProductAttention(2, bias_init=bias_init), X_BTD, tolerance=1e-4),
    Case("attention-two-inputs", lambda nn: nn.MultiHeadAttention(
        2, qkv_features=6, out_features=3), (*X_BTD, normal(2, 7, 4)), tolerance=1e-4),
    Case("attention-normalised", lambda nn: nn.MultiHeadAttention(2, normalize_qk=True), X_BTD, tolerance=1e-4),
    Case("attention-dropout", lambda nn: nn.MultiHeadAttention(
        2, dropout_rate=0.5, deterministic=False), X_BTD, tolerance=1e-4),
    Case("attention-weights", lambda nn: nn.MultiHeadAttention(2), X_BTD, tolerance=1e-4,
         call=lambda layer, x: layer(x, sow_weights=True)),
    Case("attention-decoding", lambda nn: nn.MultiHeadAttention(2, decode=True), (normal(2, 1, 8),), tolerance=1e-4),
    Case("self-attention", lambda nn: nn.SelfAttention(2), X_BTD, tolerance=1e-4),
    cell("lstm", "LSTMCell", bias_init=bias_init),
    cell("lstm-optimized", "OptimizedLSTMCell", bias_init=bias_init),
    cell("simple-cell", "SimpleCell", bias_init=bias_init),
    cell("simple-cell-residual", "SimpleCell", residual=True),
    cell("gru", "GRUCell", bias_init=bias_init),
    cell("mgu", "MGUCell", activation_bias_init=bias_init),
    cell("mgu-no-reset", "MGUCell", reset_gate=False),
    Case("conv-lstm", lambda nn: nn.ConvLSTMCell(3, (3, 3), carry_init=bias_init), IMAGE, call=one_step),
    rnn("rnn", "OptimizedLSTMCell"),
    rnn("rnn-carry", "LSTMCell", return_carry=True),
    rnn("rnn-lengths", "GRUCell", {"seq_lengths": LENGTHS, "return_carry": True}),
    rnn("rnn-reverse", "GRUCell", reverse=True),
    rnn("rnn-reverse-lengths", "SimpleCell", {"seq_lengths": LENGTHS}, reverse=True, keep_order=True),
    rnn("rnn-time-major", "GRUCell", time_major=True, unroll=2),
    Case("bidirectional", bidirectional, X_BTD, call=all_of, tolerance=1e-4),
    Case("spectral-norm", lambda nn: nn.SpectralNorm(nn.Dense(4), n_steps=2), X,
         call=lambda layer, x: layer(x, update_stats=True), tolerance=1e-4),
    Case("spectral-norm-stored", lambda nn: nn.SpectralNorm(nn.Dense(4)), X_BTD,
         call=lambda layer, x: layer(x, update_stats=False), tolerance=1e-4),
    Case("weight-norm", lambda nn: nn.WeightNorm(nn.Sequential([nn.Dense(4), nn.Dense(3)])), X),
    Case("weight-norm-all", lambda nn: nn.WeightNorm(
        nn.Dense(4, bias_init=bias_init), variable_filter=None, scale_init=bias_init, feature_axes=None), X),
    Case("fp8", lambda nn: nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp), X),
    Case("fp8-bf16", lambda nn: nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp, dtype=jnp.bfloat16), X,
         tolerance=2e-2),
    Case("fp8-nanoo", lambda nn: nn.Dense(4, dot_general_cls=nn.NANOOFp8DotGeneralOp), X),
    Case("fp8-einsum", lambda nn: nn.Fp8Einsum(), (normal(3, 4), normal(4, 5)),
         call=lambda layer, x, y: layer("ab,bc->ac", x, y)),
    Case("sequential", lambda nn: nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), X),
    Case("mlp", mlp, X),
    Case("setup", with_setup, X_BTD),
    Case("shared", shared, X),
    Case("statistics", statistics, X),
]  # fmt: skip
