# SPDX-License-Identifier: Apache-2.0
"""Boxes: values that carry axis metadata through the trees of the functional face.

    initialiser --with_partitioning--> box in the tree of variables --unbox--> value, put where its axes say

A box is a pytree around its value. A transform that adds or removes an axis of the value tells the box.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from batiste import struct
from batiste.errors import PartitioningUnspecifiedError
from batiste.graph.errors import ArgumentError
from batiste.graph.placement import current_mesh, on_mesh, put
from batiste.sharding import PARTITION_NAME

__all__ = [
    "PARTITION_NAME",
    "AxisMetadata",
    "Partitioned",
    "add_axis",
    "get_global_mesh",
    "get_partition_spec",
    "get_sharding",
    "global_mesh_defined",
    "is_axis_metadata",
    "map_axis_meta",
    "remove_axis",
    "replace_boxed",
    "unbox",
    "with_partitioning",
]

A = TypeVar("A")
LogicalNames = tuple[str | None, ...]


class AxisMetadata(abc.ABC, Generic[A]):
    """A box around a value; it is a pytree, and transforms tell it which axes they add and remove."""

    @abc.abstractmethod
    def unbox(self) -> A:
        """The value inside."""

    @abc.abstractmethod
    def replace_boxed(self, val: Any) -> AxisMetadata[Any]:
        """The same box around another value."""

    @abc.abstractmethod
    def add_axis(self, index: int, params: dict[Any, Any]) -> AxisMetadata[A]:
        """The box after a transform put a new axis at `index`."""

    @abc.abstractmethod
    def remove_axis(self, index: int, params: dict[Any, Any]) -> AxisMetadata[A]:
        """The box after a transform took the axis at `index` away."""


# ---------------------------------------------------------------- trees with boxes
def is_axis_metadata(val: Any) -> bool:
    """Whether `val` is a box."""
    return isinstance(val, AxisMetadata)


def map_axis_meta(fn: Callable[[AxisMetadata[Any]], Any], tree: Any) -> Any:
    """`tree` with `fn(box)` in place of every box."""
    return jax.tree.map(lambda x: fn(x) if is_axis_metadata(x) else x, tree, is_leaf=is_axis_metadata)


def unbox(tree: Any) -> Any:
    """`tree` with the values in place of their boxes, those inside other boxes too."""
    return map_axis_meta(lambda box: unbox(box.unbox()), tree)


def replace_boxed(tree: Any, updates: Any) -> Any:
    """The boxes of `tree` around the values of `updates`."""

    def replace(box: Any, update: Any) -> Any:
        return box.replace_boxed(replace_boxed(box.unbox(), update)) if is_axis_metadata(box) else update

    return jax.tree.map(replace, tree, updates, is_leaf=is_axis_metadata)


def add_axis(tree: Any, index: int, params: dict[Any, Any]) -> Any:
    """Tells the boxes of `tree` that a transform put an axis at `index`."""
    return map_axis_meta(lambda box: box.add_axis(index, params), tree)


def remove_axis(tree: Any, index: int, params: dict[Any, Any]) -> Any:
    """Tells the boxes of `tree` that a transform took the axis at `index` away."""
    return map_axis_meta(lambda box: box.remove_axis(index, params), tree)


# ---------------------------------------------------------------- where values are put
def get_global_mesh() -> AbstractMesh | Mesh | None:
    """The mesh of `jax.set_mesh`, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def global_mesh_defined() -> bool:
    """Whether `jax.set_mesh` has set a mesh."""
    return get_global_mesh() is not None


def constrained(x: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh | None = None) -> Any:
    """The arrays of `x` where `spec` says, on `mesh` or the mesh in context; unchanged where there is none.

    Raises:
        ArgumentError: the mesh lacks an axis.
    """
    mesh = current_mesh() if mesh is None else mesh
    if mesh.empty:
        return x
    sharding = on_mesh(mesh, spec)
    explicit = set(mesh.axis_types) == {AxisType.Explicit}

    def constrain(leaf: Any) -> Any:
        if explicit or isinstance(leaf, jax.ShapeDtypeStruct):
            return put(leaf, sharding)
        return jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(constrain, x)


class Partitioned(struct.PyTreeNode, AxisMetadata[A]):
    """A value, the mesh axis of each of its dims, and perhaps a mesh.

    >>> box = Partitioned(jax.numpy.ones((2, 3)), names=("data", None))
    >>> box.add_axis(0, {PARTITION_NAME: "layers"}).names
    ('layers', 'data', None)
    """

    value: Any
    names: LogicalNames = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(default=None, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, where its names say, on the box's mesh or the one in context.

        Args:
            apply_constraint: False leaves it where it is.
        """
        if apply_constraint and (self.mesh is not None or global_mesh_defined()):
            return constrained(self.value, self.get_partition_spec(), self.mesh)
        return self.value

    def replace_boxed(self, val: Any) -> Partitioned[Any]:
        return self.replace(value=val)

    def _axis_name(self, params: Mapping[Any, Any]) -> str | None:
        if PARTITION_NAME not in params:
            raise PartitioningUnspecifiedError(self)
        return params[PARTITION_NAME]

    def add_axis(self, index: int, params: dict[Any, Any]) -> Partitioned[A]:
        """The box with the name of the new axis at `index`.

        Raises:
            PartitioningUnspecifiedError: `params` does not say its name.
        """
        name = self._axis_name(params)
        names = [*self.names, *[None] * (index - len(self.names))]
        names.insert(index, name)
        return self.replace(names=tuple(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Partitioned[A]:
        """The box without the name at `index`.

        Raises:
            PartitioningUnspecifiedError: `params` does not say which name that is.
            ArgumentError: another name is there.
        """
        name, names = self._axis_name(params), list(self.names)
        found = names.pop(index) if -len(names) <= index < len(names) else None
        if found != name or len(names) == len(self.names):
            raise ArgumentError(
                f"Expected to remove {name!r} at index {index} from {self.names}, but found {found!r}",
                fix="give the transform the metadata_params that the axis was added with",
            )
        return self.replace(names=tuple(names))

    def get_partition_spec(self) -> PartitionSpec:
        """The names as a PartitionSpec."""
        return PartitionSpec(*self.names)

    def get_sharding(self, mesh: Mesh) -> Sharding:
        """The NamedSharding of the value on `mesh`."""
        return on_mesh(mesh, self.get_partition_spec())

    # A Variable of the object face has the same facts as metadata.
    def to_nnx_metadata(self) -> dict[str, Any]:
        """The fields as metadata of a Variable, whose `out_sharding` are the names."""
        fields = dict(vars(self))
        names = fields.pop("names")
        return {**fields, "out_sharding": names}

    @classmethod
    def from_nnx_metadata(cls, metadata: Mapping[str, Any]) -> Partitioned[Any]:
        """The box of a Variable's metadata; those that are no field are left out."""
        return cls(value=metadata["value"], names=metadata["out_sharding"], mesh=metadata.get("mesh"))


def with_partitioning(
    fn: Callable[..., Any], names: LogicalNames, mesh: Mesh | None = None
) -> Callable[..., Partitioned[Any]]:
    """The initialiser, its values in boxes that name a mesh axis for each dim.

    >>> kernel_init = with_partitioning(jax.nn.initializers.ones, (None, "model"))
    >>> kernel_init(jax.random.key(0), (2, 3)).names
    (None, 'model')
    """

    @functools.wraps(fn)
    def initialize(*args: Any, **kwargs: Any) -> Partitioned[Any]:
        return Partitioned(fn(*args, **kwargs), names, mesh)

    return initialize


def _has_spec(x: Any) -> bool:
    return is_axis_metadata(x) and hasattr(x, "get_partition_spec")


def _spec(x: Any) -> PartitionSpec | None:
    if _has_spec(x):
        return x.get_partition_spec()
    return PartitionSpec() if hasattr(x, "shape") else None


def get_partition_spec(tree: Any) -> Any:
    """`tree` with the PartitionSpecs of its boxes, `P()` for other arrays, and None for what is no array."""
    return jax.tree.map(_spec, tree, is_leaf=_has_spec)


def get_sharding(tree: Any, mesh: Mesh) -> Any:
    """`tree` with the NamedShardings of its boxes and arrays on `mesh`.

    Raises:
        ArgumentError: a box names an axis that the mesh has not.
    """

    def sharding(x: Any) -> NamedSharding | None:
        spec = _spec(x)
        return None if spec is None else on_mesh(mesh, spec)

    return jax.tree.map(sharding, tree, is_leaf=_has_spec)
