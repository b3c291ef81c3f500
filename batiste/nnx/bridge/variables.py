# SPDX-License-Identifier: Apache-2.0
"""Variables of the object face as values of the functional face, and back.

    {collection: {scope: {name: value or box}}}  <->  {scope: {name: Variable}}

A collection is a type of Variable. The metadata of a Variable travel in a box: in the box of axis names that it came
from, or in an `NNXMeta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from batiste import sharding, struct
from batiste.graph import Pytree, Variable, variable_name_from_type, variable_type_from_name
from batiste.graph.epoch import structure_changed
from batiste.graph.errors import ArgumentError, StructureError
from batiste.linen import boxes
from batiste.sharding.names import get_var_pspec

BOX_TYPE = "linen_meta_type"
"""The metadata entry that says which box of axis names a Variable has come from."""


class HashableDict(dict):
    """A dict that is never changed, and that a structure may therefore hold."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items(), key=lambda item: str(item[0]))))


# ---------------------------------------------------------------- boxes
class NNXMeta(struct.PyTreeNode, boxes.AxisMetadata):
    """The box around the value of a Variable: its type and its metadata.

    Args:
        var_type: the type of Variable.
        value: the value in the box.
        metadata: of the Variable.
    """

    var_type: type[Variable] = struct.field(pytree_node=False)
    value: Any = struct.field(pytree_node=True)
    metadata: Mapping[str, Any] = struct.field(pytree_node=False)

    def __post_init__(self):
        object.__setattr__(self, "metadata", HashableDict(self.metadata))

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> NNXMeta:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> NNXMeta:
        return self._told("add_axis", index, params)

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> NNXMeta:
        return self._told("remove_axis", index, params)

    def _told(self, change: str, index: int, params: Mapping[Any, Any]) -> NNXMeta:
        """The box after its Variable was told of an axis; where the transform names none, its hooks alone are."""
        variable = self.to_nnx_variable()
        if params.get(sharding.PARTITION_NAME) is not None:
            getattr(sharding.names, change)(variable, index, params)
        else:
            getattr(variable, change)(index, None)
        return self.replace(metadata={k: v for k, v in variable.get_metadata().items() if k in self.metadata})

    def get_partition_spec(self) -> PartitionSpec:
        """Where the value lives: the axis names in the metadata, by the rules in context."""
        return get_var_pspec(self.to_nnx_variable())

    def to_nnx_variable(self) -> Variable:
        """The Variable with this value and these metadata."""
        metadata = {"hijax": False, "ref": False, **self.metadata}
        for old in ("sharding", "sharding_names"):
            if old in metadata:
                metadata["out_sharding"] = metadata.pop(old)
        return self.var_type.from_metadata(self.value, metadata)


def with_partitioning(
    fn: Callable[..., Any], names: tuple[str | None, ...], mesh: Mesh | None = None
) -> Callable[..., Any]:
    """The initialiser, its values named; in the functional face they come in a `Partitioned` box."""
    return sharding.with_partitioning(fn, names, mesh, **{BOX_TYPE: boxes.Partitioned})


# ---------------------------------------------------------------- one Variable
def is_vanilla_variable(vs: Variable) -> bool:
    """Whether a Variable knows nothing but its type and value."""
    return not vs.get_metadata(exclude_required=True)


def to_linen_var(vs: Variable) -> Any:
    """The value of a Variable, in a box if the Variable has metadata."""
    if is_vanilla_variable(vs):
        return vs.get_raw_value()
    metadata = vs.get_metadata()
    box = metadata.get(BOX_TYPE)
    if box is not None:
        return box.from_nnx_metadata({"value": vs.get_raw_value(), **metadata})
    return NNXMeta(vs.type, vs.get_raw_value(), metadata)


def to_nnx_var(col: str, x: Any) -> Variable:
    """The Variable of a value, or of a box with its metadata.

    Raises:
        StructureError: the box is of a Variable that does not belong to the collection.
        ArgumentError: the box has no metadata for a Variable.
    """
    kind = variable_type_from_name(col, allow_register=True)
    if isinstance(x, NNXMeta):
        if x.var_type is not kind:
            raise StructureError(
                f"Type stored in NNXMeta {x.var_type} != type inferred from collection name {kind}",
                at=col, fix="keep the value in the collection of its type",
            )  # fmt: skip
        return x.to_nnx_variable()
    if not boxes.is_axis_metadata(x):
        return kind(x)
    if not hasattr(x, "to_nnx_metadata"):
        raise ArgumentError("a box becomes a Variable by its to_nnx_metadata()", at=col, got=type(x).__name__,
                            fix="define to_nnx_metadata and from_nnx_metadata in the class of the box")  # fmt: skip
    metadata: dict[str, Any] = {**x.to_nnx_metadata(), BOX_TYPE: type(x)}  # type: ignore[attr-defined]
    return kind(metadata.pop("value"), **metadata)


# ---------------------------------------------------------------- trees of them
def get_col_name(keypath: Sequence[Any]) -> str:
    """The collection of a leaf, from its path in the variables of the functional face."""
    return str(keypath[0].key)


def sort_variable_types(types: Iterable[type]) -> list[type]:
    """Types of Variable so that subtypes come before the types they are derived from."""
    return sorted(types, key=lambda kind: -len(kind.__mro__))


def linen_vars_to_nnx_attrs(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts `{scope: {name: Variable}}` from `{collection: {scope: {name: value}}}`.

    Raises:
        StructureError: two collections have a variable of the same path.
    """
    attributes: dict[str, Any] = {}
    for col in sorted(variables):
        _put_below(attributes, col, variables[col], ())
    return attributes


def _put_below(attributes: dict, col: str, tree: Mapping[Any, Any], path: tuple) -> None:
    for key in sorted(tree, key=str):
        value, here = tree[key], (*path, key)
        if isinstance(value, Mapping):
            below = attributes.setdefault(key, {})
            if not isinstance(below, dict):
                raise _met_twice(here, below, value)
            _put_below(below, col, value, here)
        elif key in attributes:
            raise _met_twice(here, attributes[key], value)
        else:
            attributes[key] = to_nnx_var(col, value)


def _met_twice(path: tuple, first: Any, second: Any) -> StructureError:
    return StructureError(
        f"Found duplicate variable path {path} with variables {type(first).__name__} and {type(second).__name__}. "
        "This is not allowed in NNX", at=path[-1], fix="give the variables of two collections different names",
    )  # fmt: skip


def nnx_attrs_to_linen_vars(
    nnx_attrs: Mapping[Any, Any], metadata_fn: Callable[[Variable], Any] = to_linen_var
) -> dict:
    """`{collection: {scope: {name: value}}}` from nested mappings of Variables: the inverse of the above.

    Args:
        metadata_fn: makes a value, boxed or not, of a Variable.

    Raises:
        StructureError: something in the mappings is no Variable.
    """
    variables: dict[str, Any] = {}

    def visit(tree: Mapping[Any, Any], path: tuple) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                visit(value, (*path, key))
                continue
            if not isinstance(value, Variable):
                raise StructureError(f"Cannot infer collection name from value: {value!r}", at="/".join(map(str, path)),
                                     got=type(value).__name__, expected="a Variable")  # fmt: skip
            at = variables.setdefault(variable_name_from_type(value.type, allow_register=True), {})
            for outer in path:
                at = at.setdefault(outer, {})
            at[key] = metadata_fn(value)

    visit(nnx_attrs, ())
    return variables


# ---------------------------------------------------------------- into objects
def give(node: Any, variables: Mapping[Any, Any], path: tuple = ()) -> list[str]:
    """Writes nested dicts of Variables into an object or container; returns the paths that have no place in it.

    Variables that are there stay, and get the values. Objects that make their parts late, such as `ToNNX`, keep what is
    new to them as attributes: `_takes_new_parts` says in which mapping.
    """
    unknown: list[str] = []
    for name, value in variables.items():
        part = part_of(node, name)
        takes = getattr(node, "_takes_new_parts", None)
        if isinstance(value, Mapping) and isinstance(part, (Pytree, Mapping, list, tuple)):
            unknown += give(part, value, (*path, name))
        elif isinstance(part, Variable) and isinstance(value, Variable) and part.type is value.type:
            if is_vanilla_variable(value):
                part.set_raw_value(value.get_raw_value())
            else:
                part.update_from_state(value)
        elif takes is not None:
            setattr(node, str(name), takes(value) if isinstance(value, Mapping) else value)
        elif isinstance(node, MutableMapping):
            node[name] = value
            structure_changed()
        else:
            unknown.append("/".join(map(str, (*path, name))))
    return unknown


def part_of(node: Any, name: Any) -> Any:
    """What an object or container holds under a name or index; None where it holds nothing."""
    if isinstance(node, Pytree):
        return vars(node).get(str(name))
    if isinstance(node, Mapping):
        return node.get(name)
    if isinstance(node, (list, tuple)):
        return node[int(name)] if int(name) < len(node) else None
    return None


__all__ = [
    "NNXMeta", "get_col_name", "is_vanilla_variable", "linen_vars_to_nnx_attrs", "nnx_attrs_to_linen_vars",
    "sort_variable_types", "to_linen_var", "to_nnx_var", "with_partitioning",
]  # fmt: skip
