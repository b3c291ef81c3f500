# SPDX-License-Identifier: Apache-2.0
"""A model with weights of 8 or 4 bits, made from a trained one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from batiste import nn
from batiste.graph import Module, Param, Variable, recursive_map
from batiste.graph.errors import ArgumentError
from batiste.nn.conv import ConvLocal
from batiste.precision.policy import KEEP, fitting

from .weight import BITS, quantized

M = TypeVar("M")

GROUP = 32
"""How many 4-bit numbers share a scale unless told otherwise."""

RESCALED = ("SpectralNorm", "WeightNorm")
"""What computes the weights of the layer in it, which therefore stay."""


class Weight(NamedTuple):
    """The weight of a layer: its attribute, how many dims it has, and those over which a result sums."""

    name: str
    rank: int
    axes: tuple[int, ...]


@functools.singledispatch
def weight_of(layer: Any) -> Weight | None:
    """The weight of a layer; None if it has none that is worth it. Register other layers here."""
    return None


@weight_of.register
def _(layer: nn.Linear) -> Weight:
    return Weight("kernel", 2, (0,))


@weight_of.register
def _(layer: nn.LinearGeneral) -> Weight:
    batch, summed = len(layer.batch_axis), len(layer.in_features)
    return Weight("kernel", batch + summed + len(layer.out_features), tuple(range(batch, batch + summed)))


@weight_of.register
def _(layer: nn.Einsum) -> Weight | None:
    operands, result = layer.einsum_str.split("->")
    names = operands.split(",")[1]
    axes = tuple(i for i, name in enumerate(names) if name not in result)
    return Weight("kernel", len(names), axes) if axes and "." not in names else None


@weight_of.register
def _(layer: nn.Conv) -> Weight:
    rank = len(layer.kernel_shape)
    return Weight("kernel", rank, (rank - 2,) if isinstance(layer, ConvLocal) else tuple(range(rank - 1)))


@weight_of.register
def _(layer: nn.ConvTranspose) -> Weight:
    rank = len(layer.kernel_shape)
    out = rank - 2 if layer.transpose_kernel else rank - 1
    return Weight("kernel", rank, tuple(i for i in range(rank) if i != out))


@weight_of.register
def _(layer: nn.Embed) -> Weight:
    return Weight("embedding", 2, (1,))


def quantize(model: M, bits: int = 8, *, group: int | None = None, keep: tuple[str, ...] = KEEP,
             choose: Callable[[tuple[Any, ...], Any], int | None] | None = None) -> M:  # fmt: skip
    """A copy of a model with weights of `bits` bits, each with a scale per output channel or per group

    The layers are the same; they read floats, which are made where they are multiplied. All else (biases, norms,
    statistics) is copied as it is. Under `jax.eval_shape` it makes the structure that a saved state is loaded into.

    Args:
        bits: 8 or 4.
        group: how many of the values that one result sums over share a scale; None for all of them with 8 bits, and
            for 32 with 4 bits.
        keep: patterns of modules whose weights stay, by path or class, as of a `Policy`.
        choose: `f(path, layer)` gives the bits of a layer, or None to leave it.

    Raises:
        ArgumentError: bits are neither 8 nor 4, or 4 with a group that is odd.

    >>> from batiste import nnx
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
    >>> small = quantize(model, 4)
    >>> type(small.kernel).__name__, small.kernel.nbytes, model.kernel.nbytes
    ('QuantizedWeight', 120, 768)
    >>> bool(jnp.allclose(small(jnp.ones((1, 64))), model(jnp.ones((1, 64))), atol=0.3))
    True
    """
    kept = {**fitting(model, keep), **fitting(model, RESCALED)}

    def change(path: tuple[Any, ...], x: Any) -> Any:
        if isinstance(x, Variable):
            return x.replace(x.get_value())
        weight = weight_of(x) if isinstance(x, Module) and path not in kept else None
        param = vars(x)[weight.name] if weight is not None else None
        n = bits if choose is None else choose(path, x) if param is not None else None
        if weight is not None and isinstance(param, Param) and n is not None:
            w = param[...]
            vars(x)[weight.name] = quantized(w, weight.axes, bits=n, group=group_size(n, group),
                                             lead=w.ndim - weight.rank)  # fmt: skip
        return x

    return recursive_map(change, model)


def group_size(bits: int, group: int | None) -> int | None:
    """How many numbers of so many bits share a scale; None for all that one result sums over.

    Raises:
        ArgumentError: bits are neither 8 nor 4, or 4 with a group that is odd.
    """
    if bits not in BITS:
        raise ArgumentError("a weight is quantised to 8 or 4 bits", got=f"bits={bits}", fix="pass bits=8 or bits=4")
    if group is not None and (group < 1 or (bits == 4 and group % 2)):
        raise ArgumentError("4-bit numbers lie in pairs: a group is even", got=f"group={group}", fix="pass group=32")
    return group or GROUP if bits == 4 else group
