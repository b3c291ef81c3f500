# SPDX-License-Identifier: Apache-2.0
"""Whether the entries of a checkpoint fit what they are loaded into: all differences at once."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.checkpoint.errors import MismatchError
from batiste.checkpoint.leaves import SCALARS, is_key_array
from batiste.checkpoint.sealed import Entry
from batiste.graph.errors import ArgumentError
from batiste.graph.text import table

Rename = Mapping[str, str] | Callable[[str], str] | None
Choice = bool | str | Iterable[str]
ROWS = 200
FIXES = {  # of differences that no word allows
    "shape": "load into a model of the shapes in the file",
    "kind": "load keys into keys of their kind, text into text, complex numbers into such",
}


def matched(
    entries: Mapping[str, Entry], wanted: Mapping[str, Any], path: Any, rename: Rename, ignore: Choice, partial: Choice,
    cast: Choice,
) -> dict[str, Entry]:  # fmt: skip
    """The entry for each wanted name.

    Raises:
        MismatchError: entries are missing, left over, or of another shape or dtype: a table of all of them.
    """
    renamed = _renamed(entries, rename)
    fits, rows, fixes = {}, [], {}
    for name, like in wanted.items():
        entry = renamed.get(name)
        if entry is None:
            if not _chosen(name, partial):
                rows.append((name, "missing", "-", described(like)))
                fixes["partial=[...] keeps what the model has"] = None
            continue
        fits[name] = entry
        problem = _difference(entry, like)
        if problem in FIXES or (problem and not _chosen(name, cast)):
            rows.append((name, problem, described(entry), described(like)))
            fixes[FIXES.get(problem, "cast=[...] converts")] = None
    for name in renamed.keys() - wanted.keys():
        if not _chosen(name, ignore):
            rows.append((name, "unexpected", described(renamed[name]), "-"))
            fixes["ignore=[...] leaves entries out"] = None
    if any(row[1] == "missing" for row in rows) and any(row[1] == "unexpected" for row in rows):
        fixes["rename={'in the file': 'in the model'} maps names"] = None
    if rows:
        raise _mismatch(sorted(rows), path, list(fixes))
    if wanted and not fits:
        rows = [("(all)", "missing", "-", f"{len(wanted)} entries")]
        raise _mismatch(rows, path, ["batiste.checkpoint.peek(path) shows what is there"])
    return fits


def _mismatch(rows: list[tuple[str, str, str, str]], path: Any, fixes: list[str]) -> MismatchError:
    shown = table([("entry", "problem", "in the file", "expected"), *rows[:ROWS]])
    more = f"\n... and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
    count = "1 entry does not fit" if len(rows) == 1 else f"{len(rows)} entries do not fit"
    return MismatchError(f"{count} the checkpoint {os.fspath(path)}:\n{shown}{more}\n", fix="; ".join(fixes))


def _renamed(entries: Mapping[str, Entry], rename: Rename) -> dict[str, Entry]:
    if rename is None:
        return dict(entries)
    result: dict[str, Entry] = {}
    used = set()
    for name, entry in entries.items():
        new = rename(name) if callable(rename) else name
        for old, to in () if callable(rename) else rename.items():
            if name == old or name.startswith(old + "/"):
                new = "/".join(filter(None, (to, name[len(old) + 1 :])))
                used.add(old)
        if new in result:
            raise ArgumentError("rename gives two entries one name", got=new, fix="leave one of them out")
        result[new] = entry
    if not callable(rename) and (idle := sorted(set(rename) - used)):
        raise ArgumentError("rename names what the checkpoint does not have", got=idle, expected=list(entries)[:20])
    return result


def _chosen(name: str, choice: Choice) -> bool:
    if isinstance(choice, bool):
        return choice
    patterns = [choice] if isinstance(choice, str) else choice
    return any(fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + "/") for pattern in patterns)


def _difference(entry: Entry, like: Any) -> str:
    """`shape`, `kind`, `dtype`, or nothing."""
    if isinstance(like, SCALARS) and not isinstance(like, np.generic):
        if entry.impl is not None:
            return "kind"
        if entry.shape:
            return "shape"
        if entry.dtype is None:
            return "" if type(entry.scalar) is type(like) else "dtype" if _converts(entry.scalar, like) else "kind"
        if isinstance(like, str) or (not isinstance(like, complex) and entry.dtype.kind == "c"):
            return "kind"
        kinds = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating, complex: jnp.complexfloating}
        return "" if type(like) in kinds and jnp.issubdtype(entry.dtype, kinds[type(like)]) else "dtype"
    if entry.dtype is None:
        if isinstance(entry.scalar, str) or is_key_array(like):
            return "kind"
        if like.shape:
            return "shape"
        return "" if _holds(like.dtype, entry.scalar) else "dtype"
    if (entry.impl is not None) != is_key_array(like):
        return "kind"
    if entry.impl is not None:
        return "kind" if impl_of(like) != entry.impl else "" if entry.shape[:-1] == like.shape else "shape"
    if entry.shape != like.shape:
        return "shape"
    real = entry.dtype.kind == "c" and np.dtype(like.dtype).kind != "c"
    return "" if entry.dtype == like.dtype else "kind" if real else "dtype"


def _converts(scalar: Any, like: Any) -> bool:
    """Whether a Python number can become one of another type without an error."""
    if (
        isinstance(scalar, str)
        or isinstance(like, str)
        or (isinstance(scalar, complex) and not isinstance(like, complex))
    ):
        return False
    return not (isinstance(like, int) and isinstance(scalar, float)) or math.isfinite(scalar)


def _holds(dtype: Any, scalar: Any) -> bool:
    """Whether an array of the dtype can hold a Python number and is of its sort."""
    sorts = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating, complex: jnp.complexfloating}
    if not jnp.issubdtype(dtype, sorts[type(scalar)]):
        return False
    if type(scalar) is int:
        return jnp.iinfo(dtype).min <= scalar <= jnp.iinfo(dtype).max
    with np.errstate(all="ignore"):
        return scalar != scalar or np.asarray(scalar).astype(dtype).item() == scalar


def impl_of(key: Any) -> str:
    """The kind of a random key, or of the shape of one."""
    return str(jax.random.key_impl(key)) if isinstance(key, jax.Array) else str(key.dtype)[len("key<") : -1]


def described(x: Any) -> str:
    """What stands for a leaf in a table.

    >>> described(Entry("a", np.dtype("float32"), (2, 3)))
    'float32[2,3]'
    """
    if isinstance(x, Entry):
        if x.dtype is None:
            return type(x.scalar).__name__
        return f"key<{x.impl}>[{','.join(map(str, x.shape[:-1]))}]" if x.impl else _sized(x.dtype, x.shape)
    if isinstance(x, SCALARS) and not isinstance(x, np.generic):
        return type(x).__name__
    return f"key<{impl_of(x)}>[{','.join(map(str, x.shape))}]" if is_key_array(x) else _sized(x.dtype, x.shape)


def _sized(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"
