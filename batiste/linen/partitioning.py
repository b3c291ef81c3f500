# SPDX-License-Identifier: Apache-2.0
"""Axis names beside the variables: each collection has a second one that names the axes of its variables.

    params/dense/kernel                     an array
    params_axes/dense/kernel_axes           AxisMetadata(names=("embed", "mlp"))

Boxes (`linen.boxes`) say the same inside the tree of variables itself; new programs use those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from batiste import struct
from batiste.core.frozen_dict import FrozenDict, freeze
from batiste.graph.errors import ArgumentError
from batiste.sharding import get_logical_axis_rules, logical_axis_rules, set_logical_axis_rules
from batiste.transforms.axes import In, Out

from . import lift, transforms
from .context import running
from .module import Module
from .scope import Scope, Variable
from .spmd import RulesFallback, is_names, logical_to_mesh, logical_to_mesh_axes, with_logical_constraint

__all__ = [
    "AxisMetadata",
    "PartitionedVariable",
    "RulesFallback",
    "ScanIn",
    "ScanOut",
    "axis_rules",
    "core_remat_static",
    "get_axis_names",
    "get_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_axes",
    "param_with_axes",
    "remat",
    "scan_with_axes",
    "set_axis_rules",
    "variable_with_axes",
    "vmap_with_axes",
    "with_sharding_constraint",
]

axis_rules = logical_axis_rules
get_axis_rules = get_logical_axis_rules
set_axis_rules = set_logical_axis_rules
with_sharding_constraint = with_logical_constraint
core_remat_static = lift.remat
ScanIn, ScanOut = In, Out

Axes = Any  # a tuple of names, or a tree of them
SUFFIX = "_axes"


@struct.dataclass
class AxisMetadata:
    """The names of the axes of one variable, or of each part of one that is a tree; a pytree without leaves."""

    names: Axes = struct.field(pytree_node=False)


# ---------------------------------------------------------------- variables with axes
class PartitionedVariable(Variable):
    """A variable of a scope; what is read and written goes where the names of its axes say."""

    __slots__ = ("axes", "fallback")

    def __init__(self, scope: Scope, collection: str, name: str, axes: Axes = None,
                 fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED):  # fmt: skip
        super().__init__(scope, collection, name, unbox=True)
        self.axes, self.fallback = axes, fallback

    @property
    def value(self) -> Any:
        value = super().value
        return value if self.axes is None else with_logical_constraint(value, self.axes, fallback=self.fallback)

    @value.setter
    def value(self, value: Any) -> None:
        if self.axes is not None:
            value = with_logical_constraint(value, self.axes, fallback=self.fallback)
        Variable.value.__set__(self, value)  # type: ignore[attr-defined]


def _current(module: Module | None, function: str) -> Module:
    module = running.modules[-1] if module is None else module
    if module is None:
        raise ArgumentError(f"{function} is called outside the methods of a module",
                            fix="call it in setup() or in a method wrapped in @compact, or pass module=")  # fmt: skip
    return module


def _same(before: AxisMetadata | None, names: AxisMetadata) -> AxisMetadata:
    if before is not None and before != names:
        raise ArgumentError(f"If axis names are sown twice, expected them to match. Got {before} and {names}",
                            fix="give the variable the names that it was made with")  # fmt: skip
    return names


def _note(module: Module, collection: str, name: str, axes: Axes) -> None:
    """Puts the names into the second collection."""
    module.sow(collection + SUFFIX, name + SUFFIX, AxisMetadata(axes), reduce_fn=_same, init_fn=lambda: None)  # type: ignore[arg-type, return-value]


def param_with_axes(
    name: str, init_fn: Callable[..., Any], *init_args: Any, axes: Axes = None, module: Module | None = None,
    **init_kwargs: Any,
) -> Any:  # fmt: skip
    """The parameter `name` of the module that is running, where the names of its axes say.

    Args:
        axes: a name or None for each dim; the collection `params_axes` remembers them.
        module: the module that is meant, by default the one whose method is running.

    Raises:
        ArgumentError: no module is running, or the parameter has other names already.
    """
    module = _current(module, "param_with_axes")
    value = module.param(name, init_fn, *init_args, **init_kwargs)
    if axes is None:
        return value
    value = with_logical_constraint(value, axes)
    _note(module, "params", name, axes)
    return value


def variable_with_axes(
    collection: str, name: str, init_fn: Callable[..., Any], *init_args: Any, axes: Axes = None,
    module: Module | None = None, fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED, **init_kwargs: Any,
) -> PartitionedVariable:  # fmt: skip
    """The variable `name` of a collection, where the names of its axes say. Arguments as in `param_with_axes`.

    Args:
        fallback: what to do with names that no rule fits.
    """
    module = _current(module, "variable_with_axes")
    made = module.variable(collection, name, init_fn, *init_args, **init_kwargs)
    if axes is not None:
        _note(module, collection, name, axes)
    return PartitionedVariable(made.scope, collection, name, axes, fallback)


def get_axis_names(axes_metadata: Mapping[str, Any]) -> FrozenDict:
    """The PartitionSpecs that a collection such as `params_axes` holds, under the names of their variables.

    >>> get_axis_names({"dense": {"kernel_axes": AxisMetadata(("embed", "mlp"))}})["dense"]["kernel"]
    P('embed', 'mlp')
    """

    def spec(names: Any) -> PartitionSpec | None:
        return None if names is None else PartitionSpec(*names)

    def specs(tree: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, x in tree.items():
            if isinstance(x, Mapping):
                found[key] = specs(x)
            else:
                found[key.removesuffix(SUFFIX)] = jax.tree.map(spec, x.names, is_leaf=is_names)
        return found

    return freeze(specs(axes_metadata))


# ---------------------------------------------------------------- transforms of modules with axes
def _map_names(change: Callable[[list[Any]], None], tree: Any) -> Any:
    """`tree`, the lists of names in it changed."""

    def changed(names: Any) -> Any:
        if names is None:
            return None
        new = list(names)
        change(new)
        return tuple(new)

    def visit(x: AxisMetadata) -> AxisMetadata:
        return dataclasses.replace(x, names=jax.tree.map(changed, x.names, is_leaf=is_names))

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, AxisMetadata))


def _naming(target: transforms.Target, collection: str, axis: Any, name: str, methods: Any) -> transforms.Target:
    """The target, each variable of `collection` with one name more outside than inside: `name` at `axis`."""
    axis = axis.axis if isinstance(axis, (In, Out)) else axis
    if axis is None:
        return target
    inside = functools.partial(_map_names, lambda names: names.pop(axis))
    outside = functools.partial(_map_names, lambda names: names.insert(axis, name))
    return transforms.map_variables(target, collection + SUFFIX, inside, outside, mutable=True, methods=methods)


def vmap_with_axes(
    target: transforms.Target,
    variable_axes: Mapping[Any, Any],
    split_rngs: Mapping[Any, bool] = FrozenDict({}),
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    partitioning_axis_names: Mapping[Any, str] = FrozenDict({}),
    spmd_axis_name: str | None = None,
    methods: Any = None,
) -> transforms.Target:
    """`linen.vmap`, and the collections of names follow: `params_axes` where `params` is mapped, and so on.

    Args:
        partitioning_axis_names: the name of the mapped axis, by collection; other collections keep no names.
    """
    named = {col: variable_axes[col] for col in partitioning_axis_names if col in variable_axes}
    mapped = transforms.vmap(
        target, variable_axes={**variable_axes, **{col + SUFFIX: None for col in named}}, split_rngs=split_rngs,
        in_axes=in_axes, out_axes=out_axes, axis_size=axis_size, axis_name=axis_name, spmd_axis_name=spmd_axis_name,
        methods=methods,
    )  # fmt: skip
    for collection, axis in named.items():
        mapped = _naming(mapped, collection, axis, partitioning_axis_names[collection], methods)
    return mapped


def scan_with_axes(
    target: transforms.Target,
    variable_axes: Mapping[Any, Any] = FrozenDict({}),
    variable_broadcast: transforms.Filter = False,
    variable_carry: transforms.Filter = False,
    split_rngs: Mapping[Any, bool] = FrozenDict({}),
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    axis_name: str = "layers",
    axes_collections: Collection[str] = ("params",),
    data_transform: Callable[..., Any] | None = None,
    methods: Any = None,
) -> transforms.Target:
    """`linen.scan`, and the collections of names follow: `params_axes` where `params` has an axis of the steps.

    Args:
        axis_name: the name of that axis.
        axes_collections: the collections whose axes have names.
    """
    named = {col: variable_axes[col] for col in axes_collections if col in variable_axes}
    scanned = transforms.scan(
        target, variable_axes={**variable_axes, **{col + SUFFIX: 0 for col in named}},
        variable_broadcast=variable_broadcast, variable_carry=variable_carry, split_rngs=split_rngs, in_axes=in_axes,
        out_axes=out_axes, length=length, reverse=reverse, unroll=unroll, data_transform=data_transform,
        methods=methods,
    )  # fmt: skip
    for collection, axis in named.items():
        scanned = _naming(scanned, collection, axis, axis_name, methods)
    return scanned


def remat(
    target: transforms.Target,
    variables: transforms.Filter = True,
    rngs: transforms.Filter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    methods: Any = None,
) -> transforms.Target:
    """`linen.remat`, but `static_argnums` counts the arguments after the module."""
    numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
    return transforms.remat(
        target, variables=variables, rngs=rngs, concrete=concrete, prevent_cse=prevent_cse,
        static_argnums=tuple(n + 1 for n in numbers), policy=policy, methods=methods,
    )  # fmt: skip
