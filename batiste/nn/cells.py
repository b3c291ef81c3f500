# SPDX-License-Identifier: Apache-2.0
"""Recurrent cells: one step of a recurrence, (carry, input) -> (carry, output)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste.graph import Module, Rngs, RngStream, data
from batiste.graph.errors import RngError, ShapeError, StructureError
from batiste.precision import promote_dtype

from . import initializers
from .activations import sigmoid, tanh
from .checks import check_last_dim
from .initializers import Initializer
from .linear import NO_METADATA, Linear
from .stochastic import RngTypeError, forked_stream

default_kernel_init = initializers.lecun_normal()
default_bias_init = initializers.zeros
_orthogonal = initializers.orthogonal()


def modified_orthogonal(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **kwargs: Any) -> Array:
    """An orthogonal matrix, drawn in float32 also where `dtype` has half the precision, for which there is no QR."""
    wide = jnp.promote_types(jnp.float32, dtype)
    return _orthogonal(key, shape, wide, **kwargs).astype(dtype)


def carry_stream(owner: Any, rngs: Any) -> RngStream | None:
    """The stream that first carries are drawn from: the stream `carry` of an Rngs, or the stream that is given.

    Raises:
        RngTypeError: `rngs` is something else.
    """
    if rngs is None or isinstance(rngs, RngStream):
        return rngs
    if isinstance(rngs, Rngs):
        return rngs["carry"]
    raise RngTypeError(f"rngs must be a Rngs or RngStream for {type(owner).__name__}", at=owner,
                       got=type(rngs).__name__, fix="pass rngs=nnx.Rngs(0)")  # fmt: skip


class RNNCellBase(Module):
    """Interface of recurrent cells; `RNN` runs whatever has these three.

    >>> class Sum(RNNCellBase):
    ...     num_feature_axes = 1
    ...     def __call__(self, carry, inputs):
    ...         return carry + inputs, carry + inputs
    ...     def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    ...         return jnp.zeros(input_shape)
    >>> Sum()(1.0, 2.0)
    (3.0, 3.0)
    """

    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """One step: `(new carry, output)`."""
        raise NotImplementedError

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Rngs | RngStream | None = None,
                         carry_init: Initializer | None = None) -> Any:  # fmt: skip
        """The first carry.

        Args:
            input_shape: of the input of one step.
            rngs: where keys are drawn from.
            carry_init: an initialiser `(key, shape, dtype) -> array`.
        """
        raise NotImplementedError

    @property
    def num_feature_axes(self) -> int:
        """How many of the last dims of an input are features; those before are batch and time."""
        raise NotImplementedError


class Cell(RNNCellBase):
    """What the cells of this file share: carries of shape (B…, hidden_features), and their birth."""

    in_features: int
    hidden_features: int
    param_dtype: DTypeLike
    rngs: RngStream | None
    carry_init: Initializer | None

    @property
    def num_feature_axes(self) -> int:
        return 1

    def _keep_stream(self, keep_rngs: bool, rngs: Any) -> None:
        """Sets `rngs`, where it is asked for, which is deprecated."""
        if keep_rngs:
            warnings.warn("keep_rngs is deprecated: pass rngs to initialize_carry, or to the call of the RNN, instead.",
                          UserWarning, stacklevel=3)  # fmt: skip
        self.rngs = data(forked_stream(self, rngs, "carry") if keep_rngs else None)

    def _keep_carry_init(self, carry_init: Initializer | None) -> None:
        """Sets `carry_init`, which is deprecated."""
        if carry_init is not None:
            warnings.warn("carry_init in the constructor is deprecated: pass it to initialize_carry instead. Two cells "
                          "with different functions are different programs.", UserWarning, stacklevel=3)  # fmt: skip
        self.carry_init = carry_init


def _first(cell: Cell, count: int, input_shape: tuple[int, ...], rngs: Any, carry_init: Any) -> list[Array]:
    """`count` arrays (B…, hidden), each from a key of its own, for inputs of shape (B…, features).

    Raises:
        RngError: there is no stream.
    """
    stream = carry_stream(cell, rngs if rngs is not None else cell.rngs)
    if stream is None:
        raise RngError("RNGs must be provided to initialize the cell carry", at=cell,
                       fix="pass rngs=nnx.Rngs(0) to initialize_carry, or to the call of the RNN")  # fmt: skip
    init = carry_init or cell.carry_init or initializers.zeros
    shape = (*input_shape[:-1], cell.hidden_features)
    return [init(stream(), shape, cell.param_dtype) for _ in range(count)]


def check_carry(cell: Cell, carry: Any, inputs: Any) -> None:
    """Raises a ShapeError unless inputs and states are (B…, in_features) and (B…, hidden_features)."""
    (_pair if isinstance(cell, _LSTM) else _fits)(cell, carry, inputs)


def _pair(cell: Cell, carry: Any, inputs: Array) -> tuple[Array, Array]:
    """The states c and h of an LSTM."""
    try:
        c, h = carry
    except (TypeError, ValueError):
        raise StructureError(f"{type(cell).__name__} got a wrong carry", at=cell, got=jax.tree.structure(carry),
                             expected="a pair (c, h)", fix="take it from initialize_carry") from None  # fmt: skip
    _fits(cell, c, inputs)
    _fits(cell, h, inputs)
    return c, h


def _fits(cell: Cell, state: Any, inputs: Any) -> None:
    check_last_dim(cell, inputs, cell.in_features, "in_features")
    shape = jnp.shape(state)
    if not shape or shape[-1] != cell.hidden_features or not _broadcasts(shape[:-1], inputs.shape[:-1]):
        raise ShapeError(f"{type(cell).__name__} got a wrong carry", at=cell, got=shape,
                         expected=(*inputs.shape[:-1], cell.hidden_features),
                         fix="take it from initialize_carry for inputs of this shape")  # fmt: skip


def _broadcasts(*shapes: tuple[int, ...]) -> bool:
    try:
        jnp.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


class _LSTM(Cell):
    """The carries of both spellings of the LSTM."""

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Rngs | RngStream | None = None,
                         carry_init: Initializer | None = None) -> tuple[Array, Array]:  # fmt: skip
        """The first carry (c, h), zeros by default; see `RNNCellBase`."""
        c, h = _first(self, 2, input_shape, rngs, carry_init)
        return c, h


class LSTMCell(_LSTM):
    """i, f, o = σ(W_i· x + W_h· h + b·),  g = tanh(W_ig x + W_hg h + b_g),  c' = f c + i g,  h' = o tanh(c')

    for inputs x[B…, in], carry (c[B…, hidden], h[B…, hidden]) and output h'. Its parameters are in eight layers,
    `ii`, `if_`, `ig`, `io` of the input and `hi`, `hf`, `hg`, `ho` (with biases) of the state.

    Args:
        gate_fn, activation_fn: in the places of σ and tanh.
        dtype: what is computed in; None takes what the inputs and the parameters promote to.
        carry_init, keep_rngs: deprecated; what they set belongs into `initialize_carry`.

    Raises:
        ShapeError: the input or the carry has a wrong shape.

    >>> cell = LSTMCell(3, 4, rngs=Rngs(0))
    >>> carry = cell.initialize_carry((2, 3), Rngs(0))
    >>> carry, y = cell(carry, jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

    Source: Hochreiter, Schmidhuber 1997, "Long Short-Term Memory"; Gers et al. 2000, "Learning to Forget".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        keep_rngs: bool = False,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        self._keep_stream(keep_rngs, rngs)
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, promote_dtype=promote_dtype, rngs=rngs)
        of_input = partial(Linear, in_features, hidden_features, use_bias=False,
                           kernel_init=kernel_init, kernel_metadata=kernel_metadata, **common)  # fmt: skip
        of_state = partial(Linear, hidden_features, hidden_features,
                           kernel_init=recurrent_kernel_init, kernel_metadata=recurrent_kernel_metadata,
                           bias_init=bias_init, bias_metadata=bias_metadata, **common)  # fmt: skip
        self.ii, self.if_, self.ig, self.io = of_input(), of_input(), of_input(), of_input()
        self.hi, self.hf, self.hg, self.ho = of_state(), of_state(), of_state(), of_state()
        self._keep_carry_init(carry_init)

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """One step: ((c', h'), h')."""
        c, h = _pair(self, carry, inputs)
        i = self.gate_fn(self.ii(inputs) + self.hi(h))
        f = self.gate_fn(self.if_(inputs) + self.hf(h))
        g = self.activation_fn(self.ig(inputs) + self.hg(h))
        o = self.gate_fn(self.io(inputs) + self.ho(h))
        c = f * c + i * g
        h = o * self.activation_fn(c)
        return (c, h), h


class OptimizedLSTMCell(_LSTM):
    """The formula of `LSTMCell`, its eight products as two: [i, f, g, o] = dense_i(x) + dense_h(h)

    for inputs x[B…, in], carry (c[B…, hidden], h[B…, hidden]) and output h'.

    Args:
        gate_fn, activation_fn: in the places of σ and tanh.
        dtype: what is computed in; None takes what the inputs and the parameters promote to.
        carry_init, keep_rngs: deprecated; what they set belongs into `initialize_carry`.

    Raises:
        ShapeError: the input or the carry has a wrong shape.

    >>> cell = OptimizedLSTMCell(3, 4, rngs=Rngs(0))
    >>> cell.dense_i.kernel.shape, cell.dense_h.kernel.shape
    ((3, 16), (4, 16))

    Source: Hochreiter, Schmidhuber 1997, "Long Short-Term Memory"; Gers et al. 2000, "Learning to Forget".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        keep_rngs: bool = False,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        self._keep_stream(keep_rngs, rngs)
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, promote_dtype=promote_dtype, rngs=rngs)
        self.dense_i = Linear(in_features, 4 * hidden_features, use_bias=False,
                              kernel_init=kernel_init, kernel_metadata=kernel_metadata, **common)  # fmt: skip
        self.dense_h = Linear(hidden_features, 4 * hidden_features,
                              kernel_init=recurrent_kernel_init, kernel_metadata=recurrent_kernel_metadata,
                              bias_init=bias_init, bias_metadata=bias_metadata, **common)  # fmt: skip
        self._keep_carry_init(carry_init)

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """One step: ((c', h'), h')."""
        c, h = _pair(self, carry, inputs)
        i, f, g, o = jnp.split(self.dense_i(inputs) + self.dense_h(h), 4, axis=-1)
        c = self.gate_fn(f) * c + self.gate_fn(i) * self.activation_fn(g)
        h = self.gate_fn(o) * self.activation_fn(c)
        return (c, h), h


class GRUCell(Cell):
    """r, z = σ(W_i· x + b· + W_h· h),  n = tanh(W_in x + b_n + r (W_hn h)),  h' = (1 - z) n + z h

    for inputs x[B…, in], carry h[B…, hidden] and output h'. The products of the three gates are in `dense_i` (with
    biases) and `dense_h`.

    Args:
        gate_fn, activation_fn: in the places of σ and tanh.
        dtype: what is computed in; None takes what the inputs and the parameters promote to.
        carry_init, keep_rngs: deprecated; what they set belongs into `initialize_carry`.

    Raises:
        ShapeError: the input or the carry has a wrong shape.

    >>> cell = GRUCell(3, 4, rngs=Rngs(0))
    >>> carry, y = cell(jnp.zeros((2, 4)), jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

    Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", section 2.3, the reset gate
        after the product.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        keep_rngs: bool = False,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        self._keep_stream(keep_rngs, rngs)
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, promote_dtype=promote_dtype, rngs=rngs)
        self.dense_i = Linear(in_features, 3 * hidden_features, kernel_init=kernel_init, bias_init=bias_init,
                              kernel_metadata=kernel_metadata, bias_metadata=bias_metadata, **common)  # fmt: skip
        self.dense_h = Linear(hidden_features, 3 * hidden_features, use_bias=False, kernel_init=recurrent_kernel_init,
                              kernel_metadata=recurrent_kernel_metadata, **common)  # fmt: skip
        self._keep_carry_init(carry_init)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """One step: (h', h')."""
        h = carry
        _fits(self, h, inputs)
        r_i, z_i, n_i = jnp.split(self.dense_i(inputs), 3, axis=-1)
        r_h, z_h, n_h = jnp.split(self.dense_h(h), 3, axis=-1)
        r, z = self.gate_fn(r_i + r_h), self.gate_fn(z_i + z_h)
        n = self.activation_fn(n_i + r * n_h)
        h = (1 - z) * n + z * h
        return h, h

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Rngs | RngStream | None = None,
                         carry_init: Initializer | None = None) -> Array:  # fmt: skip
        """The first carry h, zeros by default; see `RNNCellBase`."""
        return _first(self, 1, input_shape, rngs, carry_init)[0]


class SimpleCell(Cell):
    """h' = tanh(W_i x + b + W_h h (+ h))

    for inputs x[B…, in], carry h[B…, hidden] and output h'.

    Args:
        residual: add h inside the activation.
        activation_fn: in the place of tanh.
        carry_init, keep_rngs: deprecated; what they set belongs into `initialize_carry`.

    Raises:
        ShapeError: the input or the carry has a wrong shape.

    >>> cell = SimpleCell(3, 4, rngs=Rngs(0))
    >>> carry, y = cell(jnp.zeros((2, 4)), jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

    Source: Elman 1990, "Finding Structure in Time".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = default_bias_init,
        promote_dtype: Callable[..., Any] = promote_dtype,
        keep_rngs: bool = False,
        rngs: Any,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.residual = residual
        self.activation_fn = activation_fn
        self.promote_dtype = promote_dtype
        self._keep_stream(keep_rngs, rngs)
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, promote_dtype=promote_dtype, rngs=rngs)
        self.dense_h = Linear(hidden_features, hidden_features, use_bias=False, kernel_init=recurrent_kernel_init,
                              kernel_metadata=recurrent_kernel_metadata, **common)  # fmt: skip
        self.dense_i = Linear(in_features, hidden_features, kernel_init=kernel_init, bias_init=bias_init,
                              kernel_metadata=kernel_metadata, bias_metadata=bias_metadata, **common)  # fmt: skip
        self._keep_carry_init(carry_init)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """One step: (h', h')."""
        _fits(self, carry, inputs)
        h = self.dense_i(inputs) + self.dense_h(carry)
        h = self.activation_fn(h + carry if self.residual else h)
        return h, h

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Rngs | RngStream | None = None,
                         carry_init: Initializer | None = None) -> Array:  # fmt: skip
        """The first carry h, zeros by default; see `RNNCellBase`."""
        return _first(self, 1, input_shape, rngs, carry_init)[0]
