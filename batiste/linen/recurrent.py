# SPDX-License-Identifier: Apache-2.0
"""Recurrent cells of the functional face, and the layers that run them along the time axis."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.core.frozen_dict import FrozenDict
from batiste.graph.errors import ShapeError
from batiste.nn import initializers
from batiste.nn.activations import sigmoid, tanh
from batiste.nn.cells import modified_orthogonal
from batiste.nn.conv import PaddingLike
from batiste.nn.initializers import Initializer
from batiste.nn.linear import add_bias, default_bias_init, default_kernel_init
from batiste.nn.recurrent import concatenate, flip_sequences, one_step, over_time
from batiste.typing import Dtype, PrecisionLike, PRNGKey

from .conv import Conv
from .dtypes import promote_dtype
from .lazy import Lazy
from .linear import Dense
from .module import Module, compact, nowrap
from .transforms import scan

__all__ = [
    "RNN",
    "Bidirectional",
    "ConvLSTMCell",
    "DenseParams",
    "Dtype",
    "GRUCell",
    "LSTMCell",
    "MGUCell",
    "OptimizedLSTMCell",
    "PRNGKey",
    "PrecisionLike",
    "RNNCellBase",
    "SimpleCell",
    "flip_sequences",
]

_log = logging.getLogger(__name__)
Pair = tuple[Array, Array]


# ---------------------------------------------------------------- cells
class RNNCellBase(Module):
    """Interface of recurrent cells: `cell(carry, inputs)` is one step, and gives `(new carry, output)`."""

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """The first carry.

        Args:
            rng: the key that it is drawn from.
            input_shape: of the input of one step.
        """
        raise NotImplementedError

    @property
    def num_feature_axes(self) -> int:
        """How many of the last dims of an input are features; those before are batch and time."""
        raise NotImplementedError


class _Cell(Lazy, RNNCellBase):
    """What cells with carries of shape (B…, features) share."""

    features: int

    @property
    def num_feature_axes(self) -> int:
        return 1

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """The first carry h[B…, features], for inputs of shape (B…, in)."""
        return self.carry_init(rng, (*input_shape[:-1], self.features), self.param_dtype)  # type: ignore[attr-defined]

    @nowrap
    def part(self, of_state: bool, name: str, kind: Callable[..., Any] = Dense, **options: Any) -> Any:
        """The affine map `name` of the input or of the state."""
        init = self.recurrent_kernel_init if of_state else self.kernel_init  # type: ignore[attr-defined]
        settings = {"kernel_init": init, "param_dtype": self.param_dtype, "name": name}  # type: ignore[attr-defined]
        return kind(self.features, **{**settings, **options})

    @nowrap
    def step(self, carry: Any, inputs: Array, parts: Mapping[str, Any]) -> Any:
        """One step of the object layer with these parts."""
        settings = self.settings(in_features=inputs.shape[-1], hidden_features=self.features, carry_init=None)
        return self.run(settings, carry, inputs, parts=parts)


class _LSTM(_Cell):
    """The carries of both spellings of the LSTM."""

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Pair:
        """The first carry (c, h), each [B…, features], for inputs of shape (B…, in)."""
        of_c, of_h = jax.random.split(rng)
        one = super().initialize_carry
        return one(of_c, input_shape), one(of_h, input_shape)


class LSTMCell(_LSTM, of=nn.LSTMCell):
    """i, f, o = σ(W_i· x + W_h· h + b·),  g = tanh(W_ig x + W_hg h + b_g),  c' = f c + i g,  h' = o tanh(c')

    See `batiste.nn.LSTMCell`.
    """

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = modified_orthogonal
    bias_init: Initializer = default_bias_init
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    carry_init: Initializer = initializers.zeros

    @compact
    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        of_input = {f"i{gate}": self.part(False, f"i{gate}", use_bias=False, dtype=self.dtype) for gate in "ifgo"}
        of_state = {f"h{gate}": self.part(True, f"h{gate}", bias_init=self.bias_init, dtype=self.dtype)
                    for gate in "ifgo"}  # fmt: skip
        of_input["if_"] = of_input.pop("if")
        return self.step(carry, inputs, {**of_input, **of_state})


class DenseParams(Module):
    """The kernel[in, features] and the bias[features] of an affine map, which is computed elsewhere."""

    features: int
    use_bias: bool = True
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init

    @compact
    def __call__(self, inputs: Array) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, (self.features,), self.param_dtype)


class OptimizedLSTMCell(_LSTM, of=nn.OptimizedLSTMCell):
    """The formula and the parameters of `LSTMCell`, its eight products as two; see `batiste.nn.OptimizedLSTMCell`"""

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = modified_orthogonal
    bias_init: Initializer = default_bias_init
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    carry_init: Initializer = initializers.zeros

    @compact
    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        one = functools.partial(self.part, kind=DenseParams)
        of_input = [one(False, f"i{gate}", use_bias=False) for gate in "ifgo"]
        of_state = [one(True, f"h{gate}", bias_init=self.bias_init) for gate in "ifgo"]
        parts = {"dense_i": self._as_one(of_input), "dense_h": self._as_one(of_state)}
        return self.step(carry, inputs, parts)

    @nowrap
    def _as_one(self, parts: Sequence[DenseParams]) -> Callable[[Array], Array]:
        """x -> [x W₁ + b₁, x W₂ + b₂, …] in one product"""

        def product(x: Array) -> Array:
            kernels, biases = zip(*(part(x) for part in parts))
            bias = None if biases[0] is None else jnp.concatenate(biases)
            x, kernel, bias = promote_dtype(x, jnp.concatenate(kernels, axis=-1), bias, dtype=self.dtype)
            return add_bias(x @ kernel, bias)

        return product


def _side_by_side(parts: Sequence[Callable[[Array], Array]]) -> Callable[[Array], Array]:
    """x -> [f₁(x), f₂(x), …] along the last dim"""
    return lambda x: jnp.concatenate([part(x) for part in parts], axis=-1)


class SimpleCell(_Cell, of=nn.SimpleCell):
    """h' = tanh(W_i x + b + W_h h (+ h)); see `batiste.nn.SimpleCell`

    Args:
        residual: add h inside the activation.
    """

    features: int
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = modified_orthogonal
    bias_init: Initializer = default_bias_init
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    carry_init: Initializer = initializers.zeros
    residual: bool = False

    @compact
    def __call__(self, carry: Array, inputs: Array) -> Pair:
        of_state = self.part(True, "h", use_bias=False, dtype=self.dtype)
        of_input = self.part(False, "i", bias_init=self.bias_init, dtype=self.dtype)
        return self.step(carry, inputs, {"dense_i": of_input, "dense_h": of_state})


class GRUCell(_Cell, of=nn.GRUCell):
    """r, z = σ(W_i· x + b· + W_h· h),  n = tanh(W_in x + b_n + r (W_hn h + b_hn)),  h' = (1 - z) n + z h

    See `batiste.nn.GRUCell`, which has no b_hn.
    """

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = modified_orthogonal
    bias_init: Initializer = default_bias_init
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    carry_init: Initializer = initializers.zeros

    @compact
    def __call__(self, carry: Array, inputs: Array) -> Pair:
        one = functools.partial(self.part, bias_init=self.bias_init, dtype=self.dtype)
        of_input = [one(False, f"i{gate}") for gate in "rzn"]
        of_state = [one(True, f"h{gate}", use_bias=gate == "n") for gate in "rzn"]
        parts = {"dense_i": _side_by_side(of_input), "dense_h": _side_by_side(of_state)}
        return self.step(carry, inputs, parts)


class MGUCell(_Cell):
    """f = σ(W_if x + b_f + W_hf h),  n = tanh(W_in x + b_n + f (W_hn h + b_hn)),  h' = (1 - f) n + f h

    for inputs x[B…, in], carry h[B…, features] and output h'.

    Args:
        forget_bias_init, activation_bias_init: of b_f, and of b_n and b_hn.
        reset_gate: if not, n = tanh(W_in x + b_n + W_hn h).

    Source: Zhou et al. 2016, "Minimal Gated Unit for Recurrent Neural Networks", eq. 6.
    """

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = modified_orthogonal
    forget_bias_init: Initializer = initializers.ones
    activation_bias_init: Initializer = initializers.zeros
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    carry_init: Initializer = initializers.zeros
    reset_gate: bool = True

    @compact
    def __call__(self, carry: Array, inputs: Array) -> Pair:
        one = functools.partial(self.part, dtype=self.dtype)
        of_input = one(False, "if", bias_init=self.forget_bias_init)(inputs)
        f = self.gate_fn(of_input + one(True, "hf", use_bias=False)(carry))
        n = one(True, "hn", use_bias=self.reset_gate, bias_init=self.activation_bias_init)(carry)
        n = f * n if self.reset_gate else n
        n = self.activation_fn(one(False, "in", bias_init=self.activation_bias_init)(inputs) + n)
        h = (1 - f) * n + f * carry
        return h, h


class ConvLSTMCell(RNNCellBase):
    """i, f, o = σ(W_i· * x + W_h· * h + b·),  g = tanh(W_ig * x + W_hg * h + b_g),  c' = f c + i g,  h' = o tanh(c')

    for inputs x[B…, *spatial, in], carry (c, h), each [B…, *spatial, features], and output h'; f is σ of 1 more, and
    `*` a convolution.

    Source: Shi et al. 2015, "Convolutional LSTM Network", eq. 3, without its peepholes.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] | None = None
    padding: PaddingLike = "SAME"
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    carry_init: Initializer = initializers.zeros

    @compact
    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        c, h = carry
        one: Any = functools.partial(
            Conv,
            4 * self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        i, g, f, o = jnp.split(one(name="ih")(inputs) + one(name="hh")(h), 4, axis=-1)
        c = sigmoid(f + 1) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        return (c, h), h

    @property
    def num_feature_axes(self) -> int:
        return len(self.kernel_size) + 1

    @nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Pair:
        """The first carry (c, h), each [B…, *spatial, features], for inputs of shape (B…, *spatial, in)."""
        of_c, of_h = (self.carry_init(key, (*input_shape[:-1], self.features), self.param_dtype)
                      for key in jax.random.split(rng))  # fmt: skip
        return of_c, of_h


# ---------------------------------------------------------------- layers over time
class RNN(Module):
    """carry_t, y_t = cell(carry_{t-1}, x_t) for t = 1 … T, over x[B…, T, features]

    Args:
        cell: any `RNNCellBase`.
        time_major, return_carry, reverse, keep_order, unroll: as in `batiste.nn.RNN`.
        variable_axes, variable_broadcast, variable_carry, split_rngs: how the cell's collections and streams go through
            the loop; as in `scan`.
    """

    cell: RNNCellBase
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    variable_axes: Mapping[Any, Any] = FrozenDict({})
    variable_broadcast: Any = "params"
    variable_carry: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False})

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        init_key: Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Args:
        initial_carry: instead of the cell's own.
        init_key: what the cell draws its first carry from; None for the key of seed 0.
        seq_lengths: [B…], how many steps of each sequence count: the carry returned is that after the last of them, and
            with `reverse` only they are reversed. Outputs after them are computed all the same.
        return_carry, time_major, reverse, keep_order: instead of the layer's own settings.
        """
        time_major = self.time_major if time_major is None else time_major
        num_batch_dims = inputs.ndim - self.cell.num_feature_axes - 1
        if num_batch_dims < 0:
            raise ShapeError("RNN got an input without a time axis", at="/".join(self.path), got=inputs.shape,
                             expected=f"at least {self.cell.num_feature_axes + 1} dims: (..., time, features)",
                             fix="add the time axis, of size 1 for a single step")  # fmt: skip
        time_axis = 0 if time_major else num_batch_dims
        if initial_carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            shape = (*inputs.shape[:time_axis], *inputs.shape[time_axis + 1 :])
            initial_carry = self.cell.initialize_carry(key, shape)

        def loop(carry: Any, inputs: Any, last: Array | None, backwards: bool) -> tuple[Any, Any]:
            run = scan(
                one_step,
                variable_axes=self.variable_axes,
                variable_broadcast=self.variable_broadcast,
                variable_carry=self.variable_carry,
                split_rngs=self.split_rngs,
                in_axes=(time_axis, 0),  # type: ignore[arg-type]
                out_axes=time_axis,
                unroll=self.unroll,
                reverse=backwards,
            )
            return run(self.cell, carry, inputs, last)

        return over_time(
            loop,
            inputs,
            initial_carry,
            seq_lengths,
            num_batch_dims=num_batch_dims,
            time_major=time_major,
            return_carry=self.return_carry if return_carry is None else return_carry,
            reverse=self.reverse if reverse is None else reverse,
            keep_order=self.keep_order if keep_order is None else keep_order,
        )


class Bidirectional(Module):
    """y = merge_fn(forward_rnn(x), backward_rnn(x reversed) in the order of x), x[B…, T, features]

    Args:
        merge_fn: joins the two outputs; by default along the last dim.
        time_major, return_carry: as in `RNN`; the carry is the pair of both.

    Source: Schuster, Paliwal 1997, "Bidirectional Recurrent Neural Networks".
    """

    forward_rnn: Any
    backward_rnn: Any
    merge_fn: Callable[[Array, Array], Array] = concatenate
    time_major: bool = False
    return_carry: bool = False

    def __post_init__(self) -> None:
        if self.forward_rnn is self.backward_rnn:
            _log.warning("forward_rnn and backward_rnn are the same module: they share their parameters.")
        super().__post_init__()

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        init_key: Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Args:
        initial_carry: the first carries of both layers, instead of the cells' own.
        init_key: is split into one for each layer.
        seq_lengths, return_carry, time_major: as in `RNN`.
        reverse, keep_order: without effect: the two layers run in their own directions.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        keys = [None, None] if init_key is None else list(jax.random.split(init_key))
        first, second = initial_carry or (None, None)
        common = dict(seq_lengths=seq_lengths, return_carry=True, time_major=time_major)
        carry_f, forward = self.forward_rnn(inputs, initial_carry=first, init_key=keys[0], reverse=False, **common)
        carry_b, backward = self.backward_rnn(
            inputs, initial_carry=second, init_key=keys[1], reverse=True, keep_order=True, **common
        )
        outputs = jax.tree.map(self.merge_fn, forward, backward)
        return ((carry_f, carry_b), outputs) if return_carry else outputs
