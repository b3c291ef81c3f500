# SPDX-License-Identifier: Apache-2.0
"""Weights alone as safetensors, the format that programs of all frameworks read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from batiste.checkpoint.errors import CorruptError, NotFoundError
from batiste.checkpoint.files import Fs, write_all, write_sealed
from batiste.checkpoint.leaves import SCALARS, Leaves, nested
from batiste.checkpoint.match import Choice, Rename, matched
from batiste.checkpoint.saving import FS, placed
from batiste.checkpoint.sealed import Entry
from batiste.graph import Param, State
from batiste.graph.errors import ArgumentError
from batiste.graph.flatten import is_graph_node
from batiste.graph.optional import need


def save_weights(path: str | os.PathLike[str], model: Any, *, only: Any = Param, fs: Fs = FS) -> None:
    """Writes the parameters of a model (or the arrays of a pytree) to a safetensors file, named `layers/0/kernel`.

    Args:
        only: the filter that chooses Variables of a module.

    Raises:
        SaveError: the operating system refused something.
    """
    arrays = {}
    for name, value in _weights(model, only).values.items():
        if isinstance(value, SCALARS) and not isinstance(value, np.generic):
            raise ArgumentError("Safetensors hold arrays only", at=name, got=type(value).__name__, fix="leave it out")
        arrays[name] = np.ascontiguousarray(value)
    content = need("safetensors.numpy", extra="checkpoint").save(arrays)
    write_sealed(fs, Path(path), lambda file: write_all(fs, file, memoryview(content)))


def load_weights(
    path: str | os.PathLike[str], into: Any = None, *, only: Any = Param, rename: Rename = None, ignore: Choice = (),
    partial: Choice = False, cast: Choice = False,
) -> Any:  # fmt: skip
    """Reads a safetensors file into a model's parameters, with the options of `load`; without `into`, nested dicts.

    Raises:
        NotFoundError, CorruptError, MismatchError: as `load`. A safetensors file has no checksum: flipped bits pass.
    """
    path, safetensors = Path(path), need("safetensors", extra="checkpoint")
    if not path.exists():
        raise NotFoundError("There is no file", at=str(path), fix="look at the path")
    try:
        arrays = need("safetensors.numpy", extra="checkpoint").load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptError(f"This is no safetensors file ({error!s:.200})", at=str(path)) from error
    if into is None:
        return nested(arrays)
    leaves = _weights(into, only)
    entries = {name: Entry(name, array.dtype, array.shape) for name, array in arrays.items()}
    fits = matched(entries, leaves.values, path, rename, ignore, partial, cast)
    new = {name: placed(arrays[entry.name], entry, leaves.values[name]) for name, entry in fits.items()}
    restored = leaves.restored({**leaves.values, **new})
    return into if is_graph_node(into) else restored


def _weights(model: Any, only: Any) -> Leaves:
    return Leaves(model, only) if is_graph_node(model) and not isinstance(model, State) else Leaves(model)
