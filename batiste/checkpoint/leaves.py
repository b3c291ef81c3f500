# SPDX-License-Identifier: Apache-2.0
"""Any tree as leaves with names, and the way back: modules, optimizers, Linen variables, train states, pytrees.

    model                      "layers/0/kernel"
    {"model": m, "step": 3}    "model/layers/0/kernel", "step"

A module's entries are named by its state's paths, each shared Variable once; a pytree's by its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph import State, Variable, from_flat_state, state, to_flat_state, update
from batiste.graph.errors import ArgumentError, StructureError
from batiste.graph.flatten import is_graph_node

SCALARS = (bool, int, float, complex, str)
Key = tuple[Any, ...]


def is_key_array(x: Any) -> bool:
    """Whether an array holds typed random keys."""
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class Leaves:
    """The leaves of a tree by name, in `values`; of its objects, those that the filter `only` chooses.

    >>> Leaves({"a": [1, 2.5], "b": {"c": True}}).values
    {'a/0': 1, 'a/1': 2.5, 'b/c': True}

    Raises:
        ArgumentError: a leaf is neither an array, a random key, a number nor text.
        StructureError: two leaves have one name.
    """

    def __init__(self, tree: Any, only: Any = ...):
        found, self._treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_object)
        self._parts = [part for _, part in found]
        prefixes = [_name(path) for path, _ in found]
        objects = [(prefix, part) for prefix, part in zip(prefixes, self._parts) if _is_object(part)]
        self._objects = [part for _, part in objects]
        flat: Any = to_flat_state(cast(State, state(self._objects, only))) if objects else ()
        self._flat: list[tuple[Key, Any]] = list(flat)
        self.values: dict[str, Any] = {}
        self._names: list[list[str] | None] = [
            None if _is_object(part) else self._add(prefix, part) for prefix, part in zip(prefixes, self._parts)
        ]
        self._flat_names = [
            self._add("/".join(filter(None, (objects[path[0]][0], *map(str, path[1:])))), _plain(value))
            for path, value in self._flat
        ]

    def _add(self, prefix: str, value: Any) -> list[str]:
        """Takes in a leaf, or the leaves of a Variable's value that is a tree; their names."""
        names = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            name = "/".join(filter(None, (prefix, _name(path)))) or "value"
            if name in self.values:
                raise StructureError("Two leaves have the same name", at=name, fix="rename one of the keys")
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, *SCALARS)):
                raise ArgumentError(
                    "A checkpoint cannot hold this value",
                    at=name,
                    got=type(leaf).__name__,
                    expected="an array, a random key, a number or text",
                    fix="leave it out of what is saved",
                )
            self.values[name] = leaf
            names.append(name)
        return names

    def restored(self, new: Mapping[str, Any]) -> Any:
        """The tree with new values: its objects are written into, all else is made anew."""

        def fill(old: Any, names: list[str]) -> Any:
            return jax.tree.unflatten(jax.tree.structure(old), [new[name] for name in names])

        if self._objects:
            flat = []
            for (path, part), names in zip(self._flat, self._flat_names):
                value = fill(_plain(part), names)
                flat.append((path, part.replace(value) if isinstance(part, Variable) else value))
            update(self._objects, from_flat_state(flat, cls=State))
        parts = [part if names is None else fill(part, names) for part, names in zip(self._parts, self._names)]
        return jax.tree.unflatten(self._treedef, parts)


def _is_object(x: Any) -> bool:
    return is_graph_node(x) and not isinstance(x, State)


def _plain(x: Any) -> Any:
    return x.get_value() if isinstance(x, Variable) else x


def _name(path: Key) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names with slashes as nested dicts.

    >>> nested({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}

    Raises:
        StructureError: one name is the beginning of another.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *above, last = name.split("/")
        node: Any = tree
        for key in above:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise StructureError("An entry's name is the beginning of another's", at=name, fix="load with into=")
        node[last] = value
    return tree
