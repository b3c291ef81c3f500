# SPDX-License-Identifier: Apache-2.0
"""Two structures that have to agree (of a loop's carry, of two branches): where is the first difference?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from batiste.graph.boundary import PLAIN, Walked
from batiste.graph.jaxcompat import key_name
from batiste.graph.structure import LEAF, OBJECT, REF, STATIC, TREE, VARIABLE, Path, show_path


def place(path: Path) -> str:
    """How an error message names a part of the arguments or of the result."""
    return show_path(("result", *path[1:])) if path[:1] == ("out",) else f"argument {show_path(path)}"


def structure_difference(old: Walked, new: Walked, start: str) -> str:
    """One line about the first place where two walked trees differ; empty if there is none."""
    if old.treedef != new.treedef:
        return f"{start}: {old.treedef} became {new.treedef}"
    tree = jax.tree.unflatten(old.treedef, range(len(old.defs)))
    for keys, n in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if line := difference(old.defs[n], new.defs[n], (start, *map(key_name, keys))):
            return line
    return ""


def difference(a: Any, b: Any, path: Path) -> str:
    """One line about the first place where two descriptions differ; empty if there is none."""
    if a == b:
        return ""
    at = show_path(path)
    if a[0] != b[0] or a[0] not in (OBJECT, VARIABLE, TREE):
        return f"{at}: {_describe(a)} became {_describe(b)}"
    if (a.form != b.form) if a[0] == TREE else (a.type is not b.type):
        return f"{at}: {_describe(a)} became {_describe(b)}"
    if a[0] == VARIABLE:
        return f"{at}: another {a.type.__name__}, or one with other metadata"
    for what, old, new in (("", a.keys, b.keys), ("setting ", *_names(a, b))):
        if set(old) != set(new):
            gone, came = sorted(map(str, {*old} - {*new})), sorted(map(str, {*new} - {*old}))
            return f"{at}: {what}{', '.join([f'{x!r} is gone' for x in gone] + [f'{x!r} is new' for x in came])}"
    for key, x, y in zip(a.keys, a.children, b.children):
        if line := difference(x, y, (*path, key)):
            return line
    if a[0] == OBJECT and a.settings != b.settings:
        old, new = (dict(zip(d.settings.names, d.settings.values)) for d in (a, b))
        name = next((name for name in old if old[name] != new[name]), "")
        return f"{at}: the setting {name!r} was {old.get(name)!r} and became {new.get(name)!r}"
    return f"{at}: another {_describe(a)}"


def _names(a: Any, b: Any) -> tuple[Sequence[str], Sequence[str]]:
    return (a.settings.names, b.settings.names) if a[0] == OBJECT else ((), ())


def _describe(d: Any) -> str:
    if d is PLAIN or d[0] == LEAF:
        return "an array"
    if d[0] == REF:
        return f"a reference to object {d.index}"
    if d[0] == STATIC:
        return f"the setting {d.setting.values[0]!r}"
    kind = d.form if d[0] == TREE else getattr(d, "type", None)
    return getattr(kind, "__name__", str(kind))


def type_difference(paths: Iterable[Path], old: Iterable[Any], new: Iterable[Any], *,
                    weak: bool = False) -> tuple[str, str, str] | None:  # fmt: skip
    """`(place, type, other type)` of the first pair of values that JAX cannot take for one another.

    Args:
        weak: a weakly typed old value may take the dtype of the new one.
    """
    for path, x, y in zip(paths, old, new):
        a, b = jax.tree.map(jax.typeof, x), jax.tree.map(jax.typeof, y)
        if jax.tree.structure(a) != jax.tree.structure(b):
            return place(path), f"{jax.tree.structure(a)}", f"{jax.tree.structure(b)}"
        for old_type, new_type in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
            free = weak and getattr(old_type, "weak_type", False)
            if getattr(old_type, "shape", 0) != getattr(new_type, "shape", 0) or (
                not free and getattr(old_type, "dtype", 0) != getattr(new_type, "dtype", 0)
            ):
                return place(path), old_type.str_short(), new_type.str_short()
    return None
