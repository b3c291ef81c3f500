# SPDX-License-Identifier: Apache-2.0
"""vmap of functions of scopes: each position of the axis has variables and keys of its own, or shares them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from batiste.graph.boundary import broadcast
from batiste.graph.errors import ArgumentError
from batiste.transforms.axes import In, Out

from ..filters import in_filter, union_filters
from .call import LiftedCall, first_axis_size
from .metadata import within_axes


class Axes:
    """The axes of collections: `{filter: axis}`, the first that matches. `In(axis)` and `Out(axis)` go one way only."""

    def __init__(self, axes: Mapping[Any, Any]):
        self.of = [(cols, axis.axis if isinstance(axis, (In, Out)) else axis) for cols, axis in axes.items()]
        self.into: Any = False
        self.out: Any = False
        for cols, axis in axes.items():
            self.into = self.into if isinstance(axis, Out) else union_filters(self.into, cols)
            self.out = self.out if isinstance(axis, In) else union_filters(self.out, cols)

    def __call__(self, col: str) -> Any:
        return next((axis for cols, axis in self.of if in_filter(cols, col)), None)

    @property
    def labels(self) -> list[Any]:
        return [axis for _, axis in self.of]


def streams_in(split_rngs: Mapping[Any, bool]) -> Any:
    """The filter of all streams that `split_rngs` speaks of."""
    found: Any = False
    for streams in split_rngs:
        found = union_filters(found, streams)
    return found


def is_split(split_rngs: Mapping[Any, bool], stream: str) -> bool:
    """Whether each position gets a key of its own."""
    return next((split for streams, split in split_rngs.items() if in_filter(streams, stream)), False)


def split_keys(call: LiftedCall, split_rngs: Mapping[Any, bool], size: int) -> None:
    """Puts `size` keys in the place of each key that is split."""
    call.map_keys(lambda name, key: jax.random.split(key, size) if is_split(split_rngs, name) else key)


def vmap(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any],
    split_rngs: Mapping[Any, bool],
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: Hashable | None = None,
    spmd_axis_name: Hashable | None = None,
    metadata_params: dict[Any, Any] = {},  # noqa: B006  (the default that Flax shows; it is only read)
) -> Callable[..., Any]:
    """y[i] = fn(scopes[i], *args[i])

    Args:
        variable_axes: the axis of each collection that is passed on; None: all positions share it. `In`, `Out`: only
            what goes in, or comes out, has it.
        split_rngs: whether each position gets a key of its own, by stream; streams that are not named stay outside.
        in_axes, out_axes: as for `jax.vmap`, of the other arguments and the result.
        axis_size: for when nothing that goes in has an axis.
        metadata_params: what boxes around variables are told of the axis.

    Raises:
        ArgumentError: nothing tells the size of the axis.

    >>> from batiste.linen.scope import Scope
    >>> scope = Scope({"params": {"w": jax.numpy.array([1.0, 2.0])}})
    >>> vmap(lambda scope, x: scope.get_variable("params", "w") * x, {"params": 0}, {}, in_axes=None)(scope, 3.0)
    Array([3., 6.], dtype=float32)
    """
    axes = Axes(variable_axes)

    def inner(scopes: Any, *args: Any) -> Any:
        with within_axes(scopes, axes, metadata_params):
            return mapped(scopes, *args)

    def mapped(scopes: Any, *args: Any) -> Any:
        call = LiftedCall("vmap", fn, scopes, into=axes.into, out=axes.out, rngs=streams_in(split_rngs), labels=axes,
                          streams=lambda name: 0 if is_split(split_rngs, name) else None,
                          all_labels=(None, 0, *axes.labels))  # fmt: skip
        size = axis_size
        if size is None:
            given = zip(broadcast(in_axes, args, "in_axes"), jax.tree.leaves(args))
            size = first_axis_size([*given, *((axis, x.get_raw_value()) for axis, x in call.variables())])
        if size is None:
            raise ArgumentError("axis_size should be specified manually",
                                got="no argument and no variable with an axis", fix="pass axis_size=")  # fmt: skip
        split_keys(call, split_rngs, size)
        groups = call.enter()

        def run(groups: Any, args: Any) -> Any:
            return call.run(groups, *args)

        out, groups = jax.vmap(run, (call.labels, in_axes), (out_axes, call.labels), axis_size=size,
                               axis_name=axis_name, spmd_axis_name=spmd_axis_name)(groups, args)  # fmt: skip
        call.leave(groups)
        return out

    return inner
