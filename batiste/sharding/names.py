# SPDX-License-Identifier: Apache-2.0
"""Sharding by metadata: a Variable names its axes, rules say what the names mean, one function joins the two.

    out_sharding metadata  --logical axis rules-->  PartitionSpec  --mesh-->  NamedSharding

A value is put there when its Variable is made (`graph.placement`); here are the specs of whole models, models that are
made only in the abstract, and the names of the axes that vmap and scan add.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from batiste.graph import Variable, VariableMetadata, recursive_map, split
from batiste.graph.errors import ArgumentError
from batiste.graph.placement import (
    Rules,
    current_mesh,
    get_logical_axis_rules,
    logical_axis_rules,
    on_mesh,
    put,
    set_logical_axis_rules,
    sharding_of,
    spec_of,
    use_eager_sharding,
    using_eager_sharding,
)

__all__ = [
    "PARTITION_NAME",
    "abstract_with_sharding",
    "add_axis",
    "as_abstract",
    "get_abstract_model",
    "get_logical_axis_rules",
    "get_named_sharding",
    "get_partition_spec",
    "get_var_pspec",
    "logical_axis_rules",
    "remove_axis",
    "set_logical_axis_rules",
    "sharded_struct",
    "use_eager_sharding",
    "using_eager_sharding",
    "with_partitioning",
    "with_sharding_constraint",
]

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])
Names = Any  # a name, a tuple of names, or None per dim; a PartitionSpec; or a NamedSharding

PARTITION_NAME = "partition_name"
"""The key of a transform's metadata that names the axis it adds."""


def with_partitioning(initializer: F, sharding: Names, mesh: Mesh | None = None, **metadata: Any) -> F:
    """The initialiser, its values named: the Variable made of one gets `out_sharding`, `mesh` and the other metadata.

    >>> ones = with_partitioning(jax.nn.initializers.ones, ("embed", "mlp"))
    >>> ones(jax.random.key(0), (2, 3)).metadata["out_sharding"]
    ('embed', 'mlp')
    """

    @functools.wraps(initializer)
    def initialize(*args: Any, **kwargs: Any) -> VariableMetadata:
        value = initializer(*args, **kwargs)
        return VariableMetadata(value, metadata={"out_sharding": sharding, "mesh": mesh, **metadata})

    return initialize  # type: ignore[return-value]


def with_sharding_constraint(
    x: A, names: Names, mesh: Mesh | AbstractMesh | None = None, rules: Rules | None = None
) -> A:
    """`x` where these names say, on `mesh` or the mesh in context; unchanged where there is no mesh."""
    mesh = current_mesh() if mesh is None else mesh
    if mesh.empty:
        return x
    sharding = on_mesh(mesh, spec_of(names, rules))
    return jax.tree.map(lambda leaf: put(leaf, sharding), x)


# ---------------------------------------------------------------- the specs of a model
def _is_variable(x: Any) -> bool:
    return isinstance(x, Variable)


def get_var_pspec(v: Variable) -> PartitionSpec:
    """The PartitionSpec of a Variable: its `out_sharding`, by the rules in context and its own `sharding_rules`."""
    metadata = v.get_metadata()
    return spec_of(metadata.get("out_sharding"), metadata.get("sharding_rules"))


def get_partition_spec(tree: A) -> A:
    """The tree with a PartitionSpec in the place of every Variable's value and every array, and None for other leaves.

    >>> from batiste.graph import Param
    >>> kernel = Param(jax.numpy.ones((2, 3)), out_sharding=(None, "mlp"), eager_sharding=False)
    >>> get_partition_spec(kernel).get_value()
    P(None, 'mlp')
    """
    return jax.tree.map(_spec, tree, is_leaf=_is_variable)


def _spec(x: Any) -> Any:
    if isinstance(x, Variable):
        return x.replace(get_var_pspec(x))
    return PartitionSpec() if hasattr(x, "shape") else None


def get_named_sharding(tree: A, mesh: Mesh | AbstractMesh) -> A:
    """The tree with a NamedSharding on `mesh` in the place of every Variable's value and every array.

    Raises:
        ArgumentError: a Variable names an axis that the mesh has not.
    """
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ArgumentError("get_named_sharding needs a mesh", got=repr(mesh), fix="pass jax.make_mesh(sizes, names)")
    return jax.tree.map(lambda spec: on_mesh(mesh, spec), get_partition_spec(tree), is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


# ---------------------------------------------------------------- models that are not made yet
def sharded_struct(variable: Variable) -> Variable:
    """An abstract Variable with its sharding on its `ShapeDtypeStruct`s, where they have none and there is a mesh."""
    metadata = variable.get_metadata()
    mesh = metadata.get("mesh")
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh

    def annotate(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct) or x.sharding is not None:
            return x
        sharding = sharding_of(metadata, mesh)
        return x if isinstance(sharding, NamedSharding) and sharding.mesh.empty else x.update(sharding=sharding)

    old = variable.get_raw_value()
    new = jax.tree.map(annotate, old)
    changed = any(a is not b for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)))
    return variable.replace(new) if changed else variable


def as_abstract(tree: A, graph: bool | None = None) -> A:
    """A copy of an abstract model, as `eval_shape` gives it, with shardings where Variables have `out_sharding`.

    Raises:
        ArgumentError: there is no mesh, in the metadata or in context, or it lacks an axis.
    """

    def annotate(path: tuple, x: Any) -> Any:
        return sharded_struct(x) if isinstance(x, Variable) and x.has_metadata("out_sharding") else x

    return recursive_map(annotate, tree, graph=graph)


def abstract_with_sharding(tree: A, graph: bool | None = None) -> A:
    """Deprecated name of `as_abstract`."""
    warnings.warn("This function is deprecated. Use as_abstract instead.", DeprecationWarning, stacklevel=2)
    return as_abstract(tree, graph=graph)


def get_abstract_model(init_fn: Callable[[], Any], mesh: Mesh, *, graph: bool | None = None) -> tuple[Any, Any]:
    """`(GraphDef, State)` of the model that `init_fn()` would make on `mesh`: shapes, dtypes and shardings, no arrays.

    Raises:
        ArgumentError: a Variable names an axis that the mesh has not.
    """
    graphdefs = []

    def build() -> Any:
        graphdef, state = split(init_fn(), graph=graph)
        graphdefs.append(graphdef)
        return state

    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(build)
    shardings = get_named_sharding(abstract, mesh)
    return graphdefs[0], jax.tree.map(lambda x, sharding: x.update(sharding=sharding), abstract, shardings)


# ---------------------------------------------------------------- the axes that vmap and scan add
def add_axis(tree: A, index: int, transform_metadata: Mapping[str, Any]) -> A:
    """Puts the name of a new axis at `index` into the metadata of all Variables in the tree, and runs their hooks.

    Besides `PARTITION_NAME`, each other key of the transform's metadata is put into the metadata of the same name.

    Raises:
        ArgumentError: the transform's metadata has no `PARTITION_NAME`.
    """
    return _each_axis(tree, index, transform_metadata, _insert, "add_axis")


def remove_axis(tree: A, index: int, transform_metadata: Mapping[str, Any]) -> A:
    """Takes the name of a mapped axis out of the metadata of all Variables in the tree, and runs their hooks.

    Raises:
        ArgumentError: another name stands at `index`, or the transform's metadata has no `PARTITION_NAME`.
    """
    return _each_axis(tree, index, transform_metadata, _remove, "remove_axis")


def _each_axis(tree: A, index: int, transform_metadata: Mapping[str, Any], change: Callable, hook: str) -> A:
    if PARTITION_NAME not in transform_metadata:
        raise ArgumentError(
            f'Trying to transform a Partitioned variable but "{PARTITION_NAME}" is not specified in transform_metadata',
            got=str(dict(transform_metadata)), fix="pass transform_metadata={nnx.PARTITION_NAME: 'layers'}",
        )  # fmt: skip
    axis = transform_metadata[PARTITION_NAME]
    entries = {"out_sharding" if key == PARTITION_NAME else key: name for key, name in transform_metadata.items()}

    def visit(x: Any) -> Any:
        if isinstance(x, Variable):
            changes = {key: x.get_metadata(key, None) for key in entries}
            changes = {key: change(old, index, entries[key]) for key, old in changes.items() if old is not None}
            if changes:
                x.set_metadata(**changes)
            getattr(x, hook)(index, axis)
        return x

    return jax.tree.map(visit, tree, is_leaf=_is_variable)


def _insert(names: Any, index: int, name: Any) -> Any:
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*_insert(names.spec, index, name)))
    longer = [*names, *[None] * (index - len(names))]
    longer.insert(index, name)
    return tuple(longer)


def _remove(names: Any, index: int, name: Any) -> Any:
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*_remove(names.spec, index, name)))
    shorter = list(names)
    found = shorter.pop(index) if -len(shorter) <= index < len(shorter) else None
    if found != name:
        raise ArgumentError(
            f"Expected to remove {name!r} at index {index} from {names}, but found {found!r}",
            fix="give the transform the metadata that the axis was added with",
        )
    return tuple(shorter)
