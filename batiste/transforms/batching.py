# SPDX-License-Identifier: Apache-2.0
"""vmap and pmap: one function for many values, along axes of arrays and of the Variables inside objects."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax

from batiste.graph.boundary import Boundary, Crossing, Mode, broadcast, is_root
from batiste.graph.callers import user_place
from batiste.graph.rng import RngCount
from batiste.graph.variable import MISSING

from .axes import (
    NO_METADATA,
    bound_to_axes,
    check_function,
    check_sizes,
    explain_batched,
    positional,
    without_axis_names,
)
from .compare import place
from .compile import Arguments, _way

_log = logging.getLogger(__name__)


def vmap(f: Any = MISSING, *, in_axes: Any = 0, out_axes: Any = 0, axis_name: Hashable | None = None,
         axis_size: int | None = None, spmd_axis_name: Hashable | tuple[Hashable, ...] | None = None,
         transform_metadata: Mapping[str, Any] = NO_METADATA, graph: bool | None = None,
         graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`jax.vmap` for functions of live objects: the Variables inside have lost the mapped axis, and get it back.

    Args:
        in_axes, out_axes: prefixes of axes; `StateAxes` or the result of `nnx.prefix` may stand for a module.
        transform_metadata: `{nnx.PARTITION_NAME: name}` takes the axis' name out of the Variables' metadata inside.
        graph, graph_updates: see `set_graph_mode` and `set_graph_updates`.

    Raises:
        ArgumentError: `f` is a bound method; or a Variable with the axis None was written with values that differ.
        AliasError: one object gets two axes.
        ShapeError: the axes differ in size.

    >>> import jax.numpy as jnp
    >>> from batiste import nnx
    >>> weights = nnx.Param(jnp.arange(6.0).reshape(3, 2))
    >>> vmap(lambda w, x: w @ x, in_axes=(0, None))(weights, jnp.ones(2))
    Array([1., 5., 9.], dtype=float32)
    """
    if f is MISSING:
        return functools.partial(vmap, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name, axis_size=axis_size,
                                 spmd_axis_name=spmd_axis_name, transform_metadata=transform_metadata, graph=graph,
                                 graph_updates=graph_updates)  # fmt: skip
    mode = Mode.of("vmap", graph, graph_updates)
    check_function(f, mode, in_axes, out_axes)
    metadata = transform_metadata if mode.live else NO_METADATA
    options: dict[str, Any] = dict(axis_name=axis_name, axis_size=axis_size, spmd_axis_name=spmd_axis_name)
    told: set[str] = set()

    @functools.wraps(f, updated=())
    def mapped(*args, **kwargs):
        if mode.live:
            args, kwargs = bound_to_axes(f, args, kwargs, in_axes)
        call, args, axes = positional(f, args, kwargs, in_axes)
        boundary = Boundary(without_axis_names(call, axes, out_axes, metadata), mode, out_axes)
        groups = boundary.enter(args, axes)
        check_sizes("vmap", boundary.crossing, boundary.flat.values())
        try:
            out = jax.vmap(boundary.run, (boundary.labels,), boundary.labels, **options)(groups)
        except ValueError as error:
            raise explain_batched(error, boundary.crossing) from None
        tell_of_shared_randomness(boundary, axes, told)
        return boundary.leave(out)

    return mapped


def tell_of_shared_randomness(boundary: Boundary, axes: Any, told: set[str]) -> None:
    """Logs once that a random stream of an argument with the axis None was drawn from: all members drew the same.

    Who gives axes to parts of an argument knows of its streams.
    """
    crossing = boundary.crossing
    assert crossing.note is not None
    drawn = [n for n in crossing.note.changed if isinstance(boundary.flat.leaves[n], RngCount)]
    shared = [n for n in drawn if (axes[crossing.paths[n][0]] if isinstance(axes, (tuple, list)) else axes) is None]
    streams = ", ".join(place(crossing.paths[n][:-1]) for n in shared[:4])
    if streams and streams not in told:
        told.add(streams)
        _log.warning("All members of nnx.vmap drew the same random numbers, since the axis of the stream is None: %s. "
                     "To give each its own, split the stream with @nnx.split_rngs(splits=N) above the transform, and "
                     "map it along axis 0. In: %s", streams, user_place())  # fmt: skip


def pmap(f: Any = MISSING, *, axis_name: Hashable | None = None, in_axes: Any = 0, out_axes: Any = 0,
         static_broadcasted_argnums: int | Iterable[int] = (), devices: Sequence[Any] | None = None,
         backend: str | None = None, axis_size: int | None = None, donate_argnums: int | Iterable[int] = (),
         transform_metadata: Mapping[str, Any] = NO_METADATA, graph: bool | None = None,
         graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`jax.pmap` for functions of live objects: `vmap`, with one device per position of the axis.

    Args:
        static_broadcasted_argnums: the numbers of arguments that are part of the program, and hashable.
        donate_argnums: the numbers of arguments whose buffers are given away; all their Variables get new ones.
    """
    if f is MISSING:
        return functools.partial(pmap, axis_name=axis_name, in_axes=in_axes, out_axes=out_axes, devices=devices,
                                 static_broadcasted_argnums=static_broadcasted_argnums, backend=backend,
                                 axis_size=axis_size, donate_argnums=donate_argnums, graph=graph,
                                 transform_metadata=transform_metadata, graph_updates=graph_updates)  # fmt: skip
    mode = Mode.of("pmap", graph, graph_updates)
    check_function(f, mode, in_axes, out_axes)
    metadata = transform_metadata if mode.live else NO_METADATA
    options: dict[str, Any] = dict(axis_name=axis_name, devices=devices, backend=backend, axis_size=axis_size)
    arguments = Arguments(f, static_broadcasted_argnums, None, donate_argnums, None)
    out_ways = jax.tree.map(lambda axis: _way(axis, False), out_axes, is_leaf=lambda x: x is None or is_root(x))
    programs: dict[Any, Callable] = {}

    @functools.wraps(f, updated=())
    def mapped(*args, **kwargs):
        args, kwargs, static = arguments.cut(args, kwargs)
        axes = in_axes
        if isinstance(axes, (tuple, list)):
            axes = tuple(axis for n, axis in enumerate(axes) if n not in arguments.static_numbers)
        join = arguments.join(f, static)
        call, values, axes = positional(lambda *a, **k: join({"args": a, "kwargs": k}), args, kwargs, axes)
        gifts = [*arguments.dynamic_donated(len(args), static), *[False] * len(kwargs)]
        gifts = [gift for gift, x in zip(gifts, values) for _ in jax.tree.leaves(x, is_leaf=is_root)]
        ways = [_way(axis, gift) for axis, gift in zip(broadcast(axes, values, "in_axes"), gifts)]
        call = without_axis_names(call, axes, out_axes, metadata)
        boundary = Boundary(call, mode, out_ways, keep=lambda way: way.donated)
        groups = boundary.enter(values, specs=ways)
        key = boundary.crossing.key(), static, tuple(kwargs)
        if key not in programs:
            programs[key] = _parallel(boundary.crossing, options)
        return boundary.leave(*programs[key](*groups))

    return mapped


def _parallel(crossing: Crossing, options: dict[str, Any]) -> Callable:
    """The program of one structure of arguments."""

    def run(*groups):
        out = crossing.run(groups)
        return out, crossing.note

    axes = tuple(way.sharding for way in crossing.labels)
    # An axis per value: JAX takes a flat tuple of axes for one per leaf if there are as many leaves as groups.
    in_axes = tuple([axis] * len(part) for axis, part in zip(axes, crossing.order))
    donated = tuple(n for n, way in enumerate(crossing.labels) if way.donated)
    return jax.pmap(run, in_axes=in_axes, out_axes=(axes, None), donate_argnums=donated, **options)
