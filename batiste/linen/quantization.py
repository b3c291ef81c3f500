# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 or 4 bits in the variables of the functional face: boxes that modules find floats in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from batiste import struct
from batiste.precision.policy import KEEP, Path, fits
from batiste.quant.quantize import RESCALED, Weight, group_size, weight_of
from batiste.quant.weight import Quantized, as_floats, as_numbers

from .boxes import AxisMetadata
from .context import InterceptorContext, intercept_methods, running
from .module import Module
from .recurrent import DenseParams
from .scope import unboxed

Shape = tuple[int, ...]

__all__ = ["QuantizedBox", "quantize"]


class QuantizedBox(struct.PyTreeNode, AxisMetadata[Array]):
    """A box around the whole numbers and scales of a weight; what is inside, for a module, are its floats.

    Args:
        value: numbers and scales, with the leading dims of a stack of layers.
        of_shape, axes: of the weight in its layer: the shape, and the dims that a result sums over.
        shape: of the weight as the module keeps it, without the leading dims.
    """

    value: Quantized
    bits: int = struct.field(pytree_node=False)
    of_shape: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[int, ...] = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    float_dtype: str = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        w = as_floats(self.value, self.bits, self.of_shape, self.axes, self.float_dtype)
        return w.reshape(*w.shape[: w.ndim - len(self.of_shape)], *self.shape)

    def replace_boxed(self, val: Any) -> Any:
        """What is written in the place of a weight is a weight, of floats."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> QuantizedBox:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QuantizedBox:
        return self

    @property
    def nbytes(self) -> int:
        """Of whole numbers and scales."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.value)


def quantize(module: Module, variables: Mapping[str, Any], *args: Any, bits: int = 8, group: int | None = None,
             keep: tuple[str, ...] = KEEP, choose: Callable[[Path, Any], int | None] | None = None,
             **kwargs: Any) -> dict[str, Any]:  # fmt: skip
    """The variables of a module with weights of `bits` bits: `module.apply(small, ...)` as before

    Which arrays are weights, and over what their layers sum, is learnt from a call on shapes alone. Stacks of layers
    have their layers in dim 0. Names of axes that stood around a weight are dropped.

    Args:
        args, kwargs: of `module.apply`, such as `rngs` and `method`.
        bits, group, keep, choose: as of `batiste.quant.quantize`; `choose(path, layer)` is given the object layer.

    Raises:
        ArgumentError: bits are neither 8 nor 4, or 4 with a group that is odd.

    >>> from batiste import linen as nn
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 64))
    >>> variables = nn.Dense(3).init(jax.random.key(0), x)
    >>> small = quantize(nn.Dense(3), variables, x, bits=4)
    >>> small["params"]["kernel"].nbytes, variables["params"]["kernel"].nbytes
    (120, 768)
    >>> bool(jnp.allclose(nn.Dense(3).apply(small, x), nn.Dense(3).apply(variables, x), atol=0.3))
    True
    """
    found = _Found(keep)
    leaves, treedef = jax.tree.flatten((variables, args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def call(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        values = [next(rest) if yes else x for x, yes in zip(leaves, is_array)]
        variables, args, kwargs = treedef.unflatten(values)
        return module.apply(variables, *args, **{"mutable": True, **kwargs})

    before, running.told_of_layers = running.told_of_layers, found.layer
    try:
        with intercept_methods(found.call):
            jax.eval_shape(call, [x for x, yes in zip(leaves, is_array) if yes])
    finally:
        running.told_of_layers = before
    params = variables["params"]
    for path, (layer, axes, of_shape, shape) in found.weights.items():
        n = bits if choose is None else choose(path[:-1], layer)
        if n is not None:
            params = _with(params, path, functools.partial(_boxed, axes, of_shape, shape, n, group_size(n, group)))
    return {**variables, "params": params}


def _boxed(axes: Shape, of_shape: Shape, shape: Shape, bits: int, group: int | None, value: Any) -> Any:
    """A weight in its box; one whose stack does not lie in dim 0 stays."""
    w = unboxed(value)
    lead = w.shape[: w.ndim - len(shape)]
    if (*lead, *shape) != w.shape:
        return value
    numbers = as_numbers(w.reshape(*lead, *of_shape), axes, bits, group, len(lead))
    return QuantizedBox(numbers, bits, of_shape, axes, shape, str(w.dtype))


def _with(tree: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A nested mapping in which the entry at `path` is changed."""
    return change(tree) if not path else {**tree, path[0]: _with(tree[path[0]], path[1:], change)}


class _Found:
    """The layers that ran, but for those that are kept: by the path of the weight, the layer, the dims that it sums
    over, and the weight's shapes in the layer and in the scope."""

    def __init__(self, keep: tuple[str, ...]):
        self.keep = keep
        self.weights: dict[Path, tuple[Any, Shape, Shape, Shape]] = {}
        self._kept: set[Path] = set()
        self._rescaled = 0

    def call(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        module = context.module
        if module.scope is not None and fits(module.path, type(module), self.keep):
            self._kept.add(module.path)
        rescaled = type(module).__name__ in RESCALED
        self._rescaled += rescaled
        try:
            return call(*args, **kwargs)
        finally:
            self._rescaled -= rescaled
            if isinstance(module, DenseParams):  # a part of a cell that multiplies by several at once
                self._note(module, Weight("kernel", 2, (0,)), None, module.scope)

    def layer(self, layer: Any, scope: Any) -> None:
        """Notes an object layer that is about to run on the variables of a scope."""
        if (weight := weight_of(layer)) is not None:
            self._note(layer, weight, tuple(vars(layer)[weight.name].get_raw_value().shape), scope)

    def _note(self, layer: Any, weight: Weight, of_shape: Shape | None, scope: Any) -> None:
        path = tuple(scope.path)
        above = [path[:n] for n in range(len(path) + 1)]
        if self._rescaled or not scope.has_variable("params", weight.name):
            return
        if not any(p in self._kept or fits(p, type(layer), self.keep) for p in above):
            shape = tuple(unboxed(scope.get_variable("params", weight.name)).shape)
            self.weights[(*path, weight.name)] = (layer, weight.axes, of_shape or shape, shape)
