# SPDX-License-Identifier: Apache-2.0
"""Logical axes of the functional face: names in boxes and constraints, which rules turn into mesh axes.

    names of dims  --rules, the first that is free wins-->  PartitionSpec  --mesh-->  NamedSharding

The rules in context are those of `batiste.sharding`. There a name has one meaning; here each array looks for its own:
a rule is passed over when the array uses its mesh axes already, so that `(("heads", "model"), ("mlp", "model"))` can
be true of two arrays, and of one that has both names, for the first.
"""

from __future__ import annotations

import collections
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste import struct
from batiste.graph.errors import ArgumentError
from batiste.graph.placement import Rules
from batiste.sharding import get_logical_axis_rules, logical_axis_rules, set_logical_axis_rules

from .boxes import LogicalNames, Partitioned
from .boxes import constrained as _with_sharding_constraint

__all__ = [
    "LogicallyPartitioned",
    "RulesFallback",
    "get_logical_axis_rules",
    "logical_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_axes",
    "logical_to_mesh_sharding",
    "set_logical_axis_rules",
    "with_logical_constraint",
    "with_logical_partitioning",
]

A = TypeVar("A")
_UNASSIGNED = object()


class RulesFallback(enum.Enum):
    """What to do with a name that no rule has a free mesh axis for."""

    AXIS_IS_UNSHARDED = "axis_is_unsharded"
    RAISE_ERROR = "raise_error"
    NO_CONSTRAINT = "no_constraint"


def _atoms(axes: Any) -> list[Any]:
    """The mesh axes of one entry of a PartitionSpec."""
    return list(axes) if isinstance(axes, (tuple, list)) else [axes]


def _assigned(names: Sequence[Any], rules: Rules | None) -> list[Any]:
    """What each name stands for; `_UNASSIGNED` where no rule fits. What is no name stays as it is.

    Raises:
        ArgumentError: a name is there twice, or the rules are no pairs.
    """
    rules = get_logical_axis_rules() if rules is None else rules
    if not isinstance(rules, (tuple, list)):
        raise ArgumentError("Unknown axis rule specification type", got=type(rules).__name__,
                            expected="pairs (name, mesh axis or axes)")  # fmt: skip
    twice = tuple(x for x, n in collections.Counter(x for x in names if isinstance(x, str)).items() if n > 1)
    if twice:
        raise ArgumentError(f"Unsupported: Dimensions {twice} occur more than once in array names", got=str(names),
                            fix="give each dim a name of its own")  # fmt: skip
    found = [_UNASSIGNED if isinstance(x, str) else x for x in names]
    taken = {atom for entry in found for atom in _atoms(entry)} - {_UNASSIGNED}
    free = {None, PartitionSpec.UNCONSTRAINED}
    places = {name: place for place, name in enumerate(names) if isinstance(name, str)}
    for name, axes in rules:
        place = places.get(name) if isinstance(name, str) else None
        if place is not None and found[place] is _UNASSIGNED and not taken - free & set(_atoms(axes)):
            found[place] = axes
            taken.update(_atoms(axes))
    return found


def logical_to_mesh_axes(
    array_dim_names: Sequence[str | None] | PartitionSpec | None, rules: Rules | None = None
) -> PartitionSpec | None:
    """The PartitionSpec of an array whose dims have these names; None for a dim that no rule fits.

    Rules are tried in their order, and each mesh axis is given to one dim only.

    >>> logical_to_mesh_axes(("heads", "mlp"), (("mlp", "model"), ("heads", "model"), ("heads", "data")))
    P('data', 'model')

    Args:
        rules: pairs (name, mesh axis or axes); by default those in context.

    Raises:
        ArgumentError: a name is there twice, or the rules are no pairs.
    """
    if array_dim_names is None:
        return None
    return PartitionSpec(*(None if x is _UNASSIGNED else x for x in _assigned(tuple(array_dim_names), rules)))


def _is_spec_or_none(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)


def is_names(x: Any) -> bool:
    """Whether `x` names the dims of an array, and is no tree of such names."""
    if _is_spec_or_none(x):
        return True
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) or n is PartitionSpec.UNCONSTRAINED for n in x)


def logical_to_mesh(tree: Any, rules: Rules | None = None) -> Any:
    """`tree`, its PartitionSpecs of names as PartitionSpecs of mesh axes."""
    return jax.tree.map(lambda names: logical_to_mesh_axes(names, rules), tree, is_leaf=_is_spec_or_none)


def logical_to_mesh_sharding(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """`tree`, its PartitionSpecs of names as NamedShardings on `mesh`."""
    specs = logical_to_mesh(tree, rules)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def with_logical_constraint(
    x: Any,
    logical_axis_resources: Any,
    rules: Rules | None = None,
    mesh: Mesh | None = None,
    fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED,
) -> Any:
    """`x` where the names of its dims say; unchanged where there is no mesh, or no rules.

    Args:
        logical_axis_resources: a tuple of names, or a tree of them that is a prefix of the tree `x`.
        rules: pairs (name, mesh axis or axes); by default those in context.
        mesh: by default the one of `jax.set_mesh`.
        fallback: what to do with names that no rule fits.

    Raises:
        ArgumentError: the mesh lacks an axis, or no rule fits and `fallback` is `RAISE_ERROR`.
    """
    rules = get_logical_axis_rules() if rules is None else rules
    if not rules or logical_axis_resources is None:
        return x

    def constrain(names: Any, part: Any) -> Any:
        if names is None:
            return part
        found = _assigned(tuple(names), rules)
        if any(entry is _UNASSIGNED for entry in found) and fallback is not RulesFallback.AXIS_IS_UNSHARDED:
            if fallback is RulesFallback.RAISE_ERROR:
                raise ArgumentError(f"Axis names {names} did not match a rule", expected=f"rules among {rules}",
                                    fix="add a rule for each name; (name, None) leaves its dim whole")  # fmt: skip
            return part
        spec = PartitionSpec(*(None if entry is _UNASSIGNED else entry for entry in found))
        return _with_sharding_constraint(part, spec, mesh=mesh)

    return jax.tree.map(constrain, logical_axis_resources, x, is_leaf=is_names)


class LogicallyPartitioned(Partitioned[A]):
    """A value, the logical name of each of its dims, and perhaps a mesh and rules of its own.

    >>> LogicallyPartitioned(jax.numpy.ones((2, 3)), names=("embed", "mlp")).get_partition_spec()
    P('embed', 'mlp')
    """

    rules: Rules | None = struct.field(default=None, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, where the rules say that its names are.

        Args:
            apply_constraint: False leaves it where it is.
        """
        return (
            with_logical_constraint(self.value, self.names, self.rules, self.mesh) if apply_constraint else self.value
        )

    def to_nnx_metadata(self) -> dict[str, Any]:
        metadata = super().to_nnx_metadata()
        rules = metadata.pop("rules")
        return {**metadata, "sharding_rules": rules}

    @classmethod
    def from_nnx_metadata(cls, metadata: Mapping[str, Any]) -> LogicallyPartitioned[Any]:
        names, mesh, rules = metadata["out_sharding"], metadata.get("mesh"), metadata.get("sharding_rules")
        return cls(value=metadata["value"], names=names, mesh=mesh, rules=rules)


def with_logical_partitioning(
    fn: Callable[..., Any], names: LogicalNames, mesh: Mesh | None = None, rules: Rules | None = None
) -> Callable[..., LogicallyPartitioned[Any]]:
    """The initialiser, its values in boxes that give each dim a logical name.

    >>> kernel_init = with_logical_partitioning(jax.nn.initializers.ones, ("embed", "mlp"))
    >>> kernel_init(jax.random.key(0), (2, 3)).names
    ('embed', 'mlp')
    """

    @functools.wraps(fn)
    def initialize(*args: Any, **kwargs: Any) -> LogicallyPartitioned[Any]:
        return LogicallyPartitioned(fn(*args, **kwargs), names, mesh, rules)

    return initialize
