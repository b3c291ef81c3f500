# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other programs wrote: folders of Orbax, msgpack files of Flax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from batiste.checkpoint.errors import CorruptError
from batiste.checkpoint.leaves import SCALARS, is_key_array
from batiste.checkpoint.match import impl_of
from batiste.checkpoint.sealed import DTYPES, HEAD, Entry
from batiste.graph.optional import need
from batiste.graph.text import size_text
from batiste.serialization import msgpack_restore

TREE = "_METADATA"  # in every folder of Orbax that holds a tree


def is_sealed(path: Path) -> bool:
    """Whether a file is, or once was, one of ours."""
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(8) == HEAD[:8] or path.suffix == ".ckpt"


class Foreign:
    """The entries of a foreign checkpoint, by name; it is read whole, and has no seal that could be checked.

    Raises:
        CorruptError: it is neither Orbax's nor Flax's, or they cannot read it.
    """

    about: dict[str, Any]

    def __init__(self, path: Path, max_bytes: int | None = None):
        self.about = {"step": None, "healthy": None, "metrics": {}, "versions": {}}
        try:
            tree = _orbax(path, max_bytes) if path.is_dir() else _msgpack(path, max_bytes)
        except (CorruptError, ImportError):
            raise
        except Exception as error:  # they raise whatever their parts raise
            raise _refusal(path, f"{type(error).__name__}: {error!s:.300}") from error
        self._values: dict[str, Any] = {}
        for keys, leaf in jax.tree_util.tree_flatten_with_path(_without_boxes(tree))[0]:
            self._values[jax.tree_util.keystr(keys, simple=True, separator="/") or "value"] = leaf
        self.entries = {name: _entry(path, name, value) for name, value in self._values.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._values = {}

    def read(self, entry: Entry, boxes: object = None) -> Any:
        """The value of an entry: a host array (of a random key: its bits), or a Python value; whatever is wanted."""
        value = self._values[entry.name]
        return np.asarray(jax.random.key_data(value) if entry.impl else value) if entry.dtype else entry.scalar

    def verify(self) -> None:
        """Nothing: there is no checksum to compare with."""


def _entry(path: Path, name: str, value: Any) -> Entry:
    if is_key_array(value):
        words: Any = jax.random.key_data(value)
        return Entry(name, np.dtype(words.dtype), words.shape, impl=impl_of(value))
    if isinstance(value, SCALARS) and not isinstance(value, np.generic):
        return Entry(name, scalar=value)
    dtype = getattr(value, "dtype", None)
    if dtype is None or np.dtype(dtype).name not in DTYPES:
        raise _refusal(path, f"the entry {name!r:.200} is a {type(value).__name__}")
    return Entry(name, np.dtype(dtype), tuple(value.shape))


def _refusal(path: Path, why: str) -> CorruptError:
    return CorruptError(
        f"This is no checkpoint that can be read ({why})",
        at=str(path),
        expected="a file of batiste.checkpoint.save, a folder of Orbax, or msgpack bytes of Flax",
    )


def _without_boxes(tree: Any) -> Any:
    """Variables that were saved as a dict with nothing but a value are that value."""
    if not isinstance(tree, dict):
        return tree
    return _without_boxes(tree["value"]) if set(tree) == {"value"} else {k: _without_boxes(x) for k, x in tree.items()}


def _msgpack(path: Path, max_bytes: int | None) -> Any:
    if max_bytes is not None and (size := path.stat().st_size) > max_bytes:
        raise _refusal(path, f"it has {size_text(size)}, more than max_bytes")
    return msgpack_restore(path.read_bytes())


def _orbax(path: Path, max_bytes: int | None) -> Any:
    if (path / TREE).is_file():
        return _orbax_tree(path, max_bytes)
    items = sorted(folder for folder in path.iterdir() if (folder / TREE).is_file())
    if not items:
        raise _refusal(path, "a folder that Orbax did not write, or a folder of several steps")
    trees = {folder.name: _orbax_tree(folder, max_bytes) for folder in items}
    return trees if len(trees) > 1 else trees[items[0].name]


def _orbax_tree(path: Path, max_bytes: int | None) -> Any:
    orbax = need("orbax.checkpoint", extra="checkpoint")
    reader = orbax.PyTreeCheckpointer()
    found = reader.metadata(path.absolute())
    found = getattr(found, "item_metadata", found)
    tree = getattr(found, "tree", found)
    declared = [x for x in jax.tree.leaves(tree) if getattr(x, "shape", None) is not None and x.dtype is not None]
    total = sum(int(np.prod(x.shape)) * getattr(x.dtype, "itemsize", 8) for x in declared)
    if max_bytes is not None and total > max_bytes:
        raise _refusal(path, f"it holds {size_text(total)}, more than max_bytes")
    keys = _random_keys(path)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> Any:
        """Arrays come to the host, wherever they were when they were saved; random keys know their kind on a device."""
        if type(leaf).__name__ != "ArrayMetadata":
            return orbax.RestoreArgs()
        if leaf.name in keys:
            return orbax.ArrayRestoreArgs(restore_type=jax.Array, sharding=one)
        return orbax.RestoreArgs(restore_type=np.ndarray)

    return reader.restore(path.absolute(), restore_args=jax.tree.map(target, tree))


def _random_keys(path: Path) -> set[str]:
    """The names of the arrays that are typed random keys, which Orbax notes beside the arrays."""
    notes = [json.loads(file.read_text())["array_metadatas"] for file in sorted(path.glob("array_metadatas/process_*"))]
    arrays = [note["array_metadata"] for listed in notes for note in listed]
    return {array["param_name"] for array in arrays if (array.get("ext_metadata") or {}).get("random_key_impl")}
