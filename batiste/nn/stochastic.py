# SPDX-License-Identifier: Apache-2.0
"""Layers that are random in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batiste.graph import Module, Rngs, RngStream, data
from batiste.graph.errors import ArgumentError, DtypeError, RngError

from .checks import decided


def dropped(x: Array, key: Array, rate: float, mask_shape: Sequence[int]) -> Array:
    """y = x * m / (1 - rate), m drawn from Bernoulli(1 - rate) in a shape that broadcasts to that of `x`."""
    keep = 1.0 - rate
    mask = jnp.broadcast_to(jax.random.bernoulli(key, keep, tuple(mask_shape)), x.shape)
    return jnp.where(mask, x / keep, jnp.zeros((), x.dtype))


def forked_stream(layer: Any, rngs: Any, name: str) -> RngStream | None:
    """A stream of the layer's own, forked from `rngs` or from its stream `name`.

    Raises:
        RngTypeError: `rngs` is something else.
    """
    if rngs is None:
        return None
    if isinstance(rngs, Rngs):
        return rngs[name].fork()
    if isinstance(rngs, RngStream):
        return rngs.fork()
    raise RngTypeError(f"rngs must be a Rngs, RngStream or None for {type(layer).__name__}",
                       got=type(rngs).__name__, fix="pass rngs=nnx.Rngs(0)")  # fmt: skip


class RngTypeError(RngError, TypeError):
    """Something stands where random streams are wanted and is none."""


class Dropout(Module):
    """y = x * m / (1 - rate), m drawn from Bernoulli(1 - rate), in training; y = x in evaluation

    Args:
        rate: the share of entries that become 0, from 0 to 1.
        broadcast_dims: dims along which all entries share one draw.
        deterministic: evaluation. `train()`, `eval()` and `view` switch it.
        rng_collection: the name of the stream.
        rngs: where the layer forks its own stream from; without it each call has to be given one.

    Raises:
        ArgumentError: the rate or a dim is out of range, or `deterministic` is given neither here nor in the call.
        RngError: in training, no stream is given here nor in the call.

    >>> dropout = Dropout(0.5, rngs=Rngs(0))
    >>> sorted(set(dropout(jnp.ones(99)).tolist()))
    [0.0, 2.0]
    >>> float(dropout(jnp.ones(99), deterministic=True).sum())
    99.0

    Source: Srivastava et al. 2014, "Dropout", section 4, scaled in training instead of evaluation.
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: Rngs | RngStream | None = None,
    ):
        if not 0 <= rate <= 1:
            raise ArgumentError("Dropout got a rate outside its range", got=rate, expected="0 <= rate <= 1",
                                fix="pass the share of entries to drop, not the share to keep")  # fmt: skip
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.rngs = data(forked_stream(self, rngs, rng_collection))

    def __call__(self, inputs: Array, *, deterministic: bool | None = None,
                 rngs: Rngs | RngStream | Array | None = None) -> Array:  # fmt: skip
        """Args:
        deterministic: instead of the layer's own setting.
        rngs: streams, a stream, or a key, instead of the layer's own.
        """
        if decided(self, "deterministic", deterministic, self.deterministic) or self.rate == 0:
            return inputs
        if self.rate == 1:
            return jnp.zeros_like(inputs)
        key = _key(self, rngs if rngs is not None else self.rngs)
        if not jnp.issubdtype(inputs.dtype, jnp.inexact):
            raise DtypeError("Dropout cannot scale whole numbers", at=self, got=inputs.dtype, expected="a float dtype",
                             fix="convert the input, or drop after the embedding")  # fmt: skip
        shape = list(inputs.shape)
        for dim in self.broadcast_dims:
            if not -inputs.ndim <= dim < inputs.ndim:
                raise ArgumentError(f"Dropout got an input without dim {dim} of its broadcast_dims", at=self,
                                    got=inputs.shape, expected=f"more than {dim if dim >= 0 else -dim - 1} dims",
                                    fix="name dims that the input has")  # fmt: skip
            shape[dim] = 1
        return dropped(inputs, key, self.rate, shape)

    def set_view(self, deterministic: bool | None = None) -> None:
        """The options of this layer for `nnx.view`.

        Args:
            deterministic: return the input as it is: evaluation.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def _key(layer: Dropout, rngs: Any) -> Array:
    """The key of this call."""
    if isinstance(rngs, Rngs):
        return rngs[layer.rng_collection]()
    if isinstance(rngs, RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    if rngs is None:
        raise RngError("`deterministic` is False, but no `rngs` argument was provided to Dropout", at=layer,
                       fix="pass rngs=nnx.Rngs(0) to the constructor or call, or set deterministic")  # fmt: skip
    raise RngTypeError("rngs must be a Rngs, RngStream or jax.Array for Dropout", at=layer,
                       got=type(rngs).__name__, fix="pass nnx.Rngs(0) or jax.random.key(0)")  # fmt: skip
