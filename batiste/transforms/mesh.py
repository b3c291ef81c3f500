# SPDX-License-Identifier: Apache-2.0
"""shard_map: one function call per device of a mesh, over live objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

import jax
from jax.sharding import PartitionSpec

from batiste.graph.boundary import Boundary, Mode
from batiste.graph.variable import MISSING

from .compile import refuse_bound_method, refuse_rules


def shard_map(f: Any = MISSING, *, mesh: Any, in_specs: Any, out_specs: Any, axis_names: AbstractSet[Any] = frozenset(),
              check_vma: bool = True, graph: bool | None = None, graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`jax.shard_map` for functions of live objects: inside, each Variable holds the device's own part.

    Args:
        in_specs, out_specs: prefixes of PartitionSpecs; `StateSharding` may stand for a module.
        axis_names: the mesh axes that `f` handles by hand; all of them by default.

    Raises:
        ArgumentError: `f` is a bound method.
        AliasError: one Variable gets two different specs.
    """
    if f is MISSING:
        return functools.partial(shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names,
                                 check_vma=check_vma, graph=graph, graph_updates=graph_updates)  # fmt: skip
    mode = Mode.of("shard_map", graph, graph_updates)
    refuse_bound_method(f, mode.name)
    refuse_rules(mode, in_specs=in_specs, out_specs=out_specs)
    return _Sharded(f, mode, in_specs, out_specs, dict(mesh=mesh, axis_names=set(axis_names), check_vma=check_vma))


class _Sharded:
    """A function that runs once per device."""

    def __init__(self, f: Callable, mode: Mode, in_specs: Any, out_specs: Any, options: dict[str, Any]):
        functools.update_wrapper(self, f)
        self.f, self.mode, self.in_specs, self.out_specs, self.options = f, mode, in_specs, out_specs, options

    def __call__(self, *args: Any) -> Any:
        boundary = Boundary(self.f, self.mode, self.out_specs, keep=lambda spec: spec is not None)
        groups = boundary.enter(args, self.in_specs, "in_specs")
        specs = tuple(PartitionSpec() if label is None else label for label in boundary.labels)
        run = jax.shard_map(lambda *groups: boundary.run(groups), in_specs=specs, out_specs=specs, **self.options)
        return boundary.leave(run(*groups))
