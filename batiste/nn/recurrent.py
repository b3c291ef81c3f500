# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers: a cell run along the time axis, in one direction or both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batiste.graph import Module, Rngs, RngState, RngStream, data
from batiste.graph.errors import DtypeError, ShapeError, StructureError
from batiste.graph.filters import All, Filter
from batiste.graph.restream import split_rngs
from batiste.transforms.axes import Carry, StateAxes
from batiste.transforms.loops import scan

from .cells import Cell, RNNCellBase, carry_stream, check_carry
from .stochastic import RngTypeError, forked_stream

Lengths = Array | None
_log = logging.getLogger(__name__)


class RNN(Module):
    """carry_t, y_t = cell(carry_{t-1}, x_t) for t = 1 … T, over x[B…, T, features]

    Args:
        cell: any `RNNCellBase`.
        time_major: the inputs and outputs are [T, B…, features].
        return_carry: return `(last carry, outputs)`.
        reverse: run from the last step to the first. The outputs come in the order in which they are computed, unless
            `keep_order`.
        unroll: how many steps are compiled as one.
        state_axes: how the cell's Variables go through the loop, by filter: from step to step (`Carry`, the default),
            the same at each step (None), or an axis.
        broadcast_rngs: a filter for random streams that give the same keys at each step.
        rngs: where first carries are drawn from: an Rngs or a stream (a stream is forked from it), True for one of seed
            0, or False for none.

    Raises:
        ShapeError: the input has too few dims, or the lengths do not fit it.
        DtypeError: the lengths are not whole numbers.
        RngTypeError: `rngs` is something else.

    >>> from batiste.nn.cells import GRUCell
    >>> layer = RNN(GRUCell(3, 4, rngs=Rngs(0)))
    >>> layer(jnp.ones((2, 5, 3)), seq_lengths=jnp.array([3, 5])).shape
    (2, 5, 4)
    """

    def __init__(
        self,
        cell: RNNCellBase,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Mapping[Any, Any] | StateAxes | None = None,
        broadcast_rngs: Filter = None,
        rngs: Rngs | RngStream | bool = True,
    ):
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.rngs = data(_own_stream(self, rngs))
        self.state_axes = state_axes if isinstance(state_axes, StateAxes) else StateAxes(state_axes or {...: Carry})
        self.broadcast_rngs = broadcast_rngs

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Rngs | RngStream | None = None,
    ) -> Any:
        """Args:
        initial_carry: instead of the cell's own.
        seq_lengths: [B…], how many steps of each sequence count: the carry returned is that after the last of them, and
            with `reverse` only they are reversed. Outputs after them are computed all the same.
        return_carry, time_major, reverse, keep_order: instead of the layer's own settings.
        rngs: streams, or a stream, for the first carry, instead of the layer's own.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order

        num_batch_dims = inputs.ndim - self.cell.num_feature_axes - 1
        if num_batch_dims < 0:
            raise ShapeError("RNN got an input without a time axis", at=self, got=inputs.shape,
                             expected=f"at least {self.cell.num_feature_axes + 1} dims: (..., time, features)",
                             fix="add the time axis, of size 1 for a single step")  # fmt: skip
        time_axis = 0 if time_major else num_batch_dims
        step_shape = (*inputs.shape[:time_axis], *inputs.shape[time_axis + 1 :])
        seq_lengths = _checked(self, seq_lengths, step_shape[:num_batch_dims])
        if initial_carry is None:
            stream = carry_stream(self, self.rngs if rngs is None else rngs)
            initial_carry = self.cell.initialize_carry(step_shape, rngs=stream)
        if isinstance(self.cell, Cell):  # here, where the model is known, and not in the loop
            check_carry(self.cell, initial_carry, jax.ShapeDtypeStruct(step_shape, inputs.dtype))

        def loop(carry: Any, inputs: Any, last: Array | None, backwards: bool) -> tuple[Any, Any]:
            axes, only = self.state_axes, self.broadcast_rngs
            if only is not None:
                axes = StateAxes([(All(RngState, only), None), *zip(axes.filters, axes.labels)])
            run = scan(one_step, in_axes=(axes, Carry, time_axis, None if last is None else 0),
                       out_axes=(Carry, time_axis), unroll=self.unroll, reverse=backwards, graph=True,
                       graph_updates=True)  # fmt: skip
            with split_rngs(self.cell, splits=1, only=only, squeeze=True, graph=True, graph_updates=True):
                return run(self.cell, carry, inputs, last)

        return over_time(
            loop,
            inputs,
            initial_carry,
            seq_lengths,
            num_batch_dims=num_batch_dims,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
        )


def _checked(layer: RNN, seq_lengths: Any, batch: tuple[int, ...]) -> Lengths:
    if seq_lengths is None:
        return None
    lengths = jnp.asarray(seq_lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise DtypeError("RNN got lengths that are not whole numbers", at=layer, got=lengths.dtype,
                         expected="an integer dtype", fix="convert seq_lengths to int32")  # fmt: skip
    if lengths.shape != batch:
        raise ShapeError("RNN got lengths that do not fit the batch", at=layer, got=lengths.shape, expected=batch,
                         fix="pass one length for each sequence")  # fmt: skip
    return lengths


def concatenate(a: Array, b: Array) -> Array:
    """[..., A] and [..., B] -> [..., A + B]"""
    return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Module):
    """y = merge_fn(forward_rnn(x), backward_rnn(x reversed) in the order of x), x[B…, T, features]

    Args:
        merge_fn: joins the two outputs; by default along the last dim.
        time_major, return_carry: as in `RNN`; the carry is the pair of both.
        rngs: where first carries are drawn from: an Rngs or a stream, True for one of seed 0, or False for those of the
            two layers.

    Raises:
        RngTypeError: `rngs` is something else.

    >>> from batiste.nn.cells import GRUCell
    >>> one_way = lambda seed: RNN(GRUCell(3, 4, rngs=Rngs(seed)))
    >>> Bidirectional(one_way(0), one_way(1))(jnp.ones((2, 5, 3))).shape
    (2, 5, 8)

    Source: Schuster, Paliwal 1997, "Bidirectional Recurrent Neural Networks".
    """

    def __init__(
        self,
        forward_rnn: Any,
        backward_rnn: Any,
        *,
        merge_fn: Callable[[Array, Array], Array] = concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: Rngs | RngStream | bool = True,
    ):
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry
        self.rngs = data(_own_stream(self, rngs))
        if forward_rnn is backward_rnn:
            _log.warning("forward_rnn and backward_rnn are the same object: they share their parameters.")

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        rngs: Rngs | RngStream | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Args:
        initial_carry: the first carries of both layers, instead of the cells' own.
        seq_lengths, return_carry, time_major: as in `RNN`.
        rngs: streams, or a stream, for the first carries, instead of the layer's own.
        reverse, keep_order: without effect: the two layers run in their own directions.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        try:
            first, second = (None, None) if initial_carry is None else initial_carry
        except (TypeError, ValueError):
            raise StructureError("Bidirectional got a wrong initial carry", at=self,
                                 got=jax.tree.structure(initial_carry), expected="a pair, one for each layer",
                                 fix="pass initial_carry=(forward, backward)") from None  # fmt: skip
        stream = carry_stream(self, self.rngs if rngs is None else rngs)
        common = dict(rngs=stream, seq_lengths=seq_lengths, return_carry=True, time_major=time_major)
        carry_f, forward = self.forward_rnn(inputs, initial_carry=first, reverse=False, **common)
        carry_b, backward = self.backward_rnn(inputs, initial_carry=second, reverse=True, keep_order=True, **common)
        outputs = jax.tree.map(self.merge_fn, forward, backward)
        return ((carry_f, carry_b), outputs) if return_carry else outputs


# ---------------------------------------------------------------- parts
State = tuple[Any, Any]
Loop = Callable[[State, Any, Lengths, bool], tuple[State, Any]]


def over_time(
    loop: Loop,
    inputs: Array,
    initial_carry: Any,
    seq_lengths: Lengths,
    *,
    num_batch_dims: int,
    time_major: bool,
    return_carry: bool,
    reverse: bool,
    keep_order: bool,
) -> Any:
    """What is done around a loop over time: sequences of various lengths, and the order of what goes in and out.

    Args:
        loop: `loop((carry, final carry), inputs, last, backwards)` runs `one_step` along the time axis; `last`[T, B…]
            says which step is the last of a sequence.
    """
    time_axis = 0 if time_major else num_batch_dims
    if reverse and seq_lengths is not None:
        inputs = flip_sequences(inputs, seq_lengths, num_batch_dims, time_major)
    last = None
    if return_carry and seq_lengths is not None:
        last = jnp.arange(inputs.shape[time_axis]).reshape(-1, *(1,) * seq_lengths.ndim) == seq_lengths[None] - 1
    state = (initial_carry, None if last is None else initial_carry)
    (carry, final), outputs = loop(state, inputs, last, reverse and seq_lengths is None)
    if reverse and keep_order == (seq_lengths is not None):  # a loop that runs backwards keeps the order by itself
        outputs = jax.tree.map(lambda y: flip_sequences(y, seq_lengths, num_batch_dims, time_major), outputs)
    return (carry if last is None else final, outputs) if return_carry else outputs


def one_step(cell: Any, state: State, x: Any, is_last: Array | None) -> tuple[State, Any]:
    """One step of the loop; the final carry is the one after the step that is the last."""
    carry, final = state
    carry, y = cell(carry, x)
    if is_last is not None:
        final = jax.tree.map(lambda new, old: jnp.where(_expanded(is_last, new.ndim), new, old), carry, final)
    return (carry, final), y


def flip_sequences(inputs: Array, seq_lengths: Array | None, num_batch_dims: int, time_major: bool) -> Array:
    """The sequences in `inputs` backwards, each in its first `seq_lengths[b]` places.

    Without lengths that is all of the time axis, which is dim 0 if `time_major`, else `num_batch_dims`. What comes
    after a sequence stays after it, backwards too.

    >>> flip_sequences(jnp.array([[1, 0, 0], [2, 3, 0], [4, 5, 6]]), jnp.array([1, 2, 3]), 1, False).tolist()
    [[1, 0, 0], [3, 2, 0], [6, 5, 4]]
    """
    time_axis = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(inputs, axis=time_axis)
    length = inputs.shape[time_axis]
    steps = _expanded(jnp.arange(length), num_batch_dims + 1 - time_axis)
    steps = steps.reshape((1,) * time_axis + steps.shape)
    places = (jnp.expand_dims(seq_lengths, time_axis) - 1 - steps) % length
    return jnp.take_along_axis(inputs, _expanded(places, inputs.ndim), axis=time_axis)


def _expanded(x: Array, ndim: int) -> Array:
    """`x` with dims of size 1 at the end."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _own_stream(layer: Any, rngs: Any) -> RngStream | None:
    """The stream of a layer, from its argument `rngs`."""
    if rngs is True:
        return RngStream(0, tag="carry")
    if rngs is False:
        return None
    if rngs is None:
        raise RngTypeError(f"Expected rngs to be a Rngs, a stream, or bool for {type(layer).__name__}", got="None",
                           fix="pass rngs=False for no stream")  # fmt: skip
    return forked_stream(layer, rngs, "carry")
