# SPDX-License-Identifier: Apache-2.0
"""Every module of Flax can be imported from batiste by the same path, with the public names that Flax defines there."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import types
import typing
import warnings
from typing import Any

import flax
import pytest

# The packages whose names are Flax's interface; each name is defined in some module below them.
PUBLIC = ("flax.linen", "flax.nnx", "flax.nnx.bridge", "flax.core")
GAPS = {
    "flax.experimental": "announces that nnx has moved, and gives it under its old name",
    "flax.nnx.deprecations": "a decorator for names that Flax will drop",
    "flax.testing": "TensorBoard logs of Flax's own benchmarks",
}


def paths(package: types.ModuleType) -> list[str]:
    """The dotted paths of all modules below, but for private ones and Flax's own scaffolding for its documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [m.name for m in pkgutil.walk_packages(package.__path__, "flax.", onerror=lambda name: None)]
    return sorted(path for path in found if not any(part.startswith("_") for part in path.split(".")))


NOT_INSTALLED = {"flax.metrics.tensorboard": ["SummaryWriter"]}  # the names of a module that needs TensorFlow
PATHS = [path for path in paths(flax) if not path.startswith((*GAPS, *NOT_INSTALLED))]


def ours(path: str) -> Any:
    return importlib.import_module("batiste" + path.removeprefix("flax"))


def public_values() -> set[int]:
    values = [value for path in PUBLIC for name, value in vars(importlib.import_module(path)).items() if name[0] != "_"]
    return {id(value) for value in values if not isinstance(value, types.ModuleType | typing.TypeVar)}


INTERFACE = public_values()


@pytest.mark.parametrize("path", PATHS)
def test_the_path_gives_the_public_names_that_are_defined_there(path: str) -> None:
    module, theirs = ours(path), importlib.import_module(path)
    defined = [
        name
        for name, value in vars(theirs).items()
        if id(value) in INTERFACE and getattr(value, "__module__", None) in (path, None) and name[0] != "_"
    ]
    assert [name for name in defined if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", NOT_INSTALLED)
def test_what_flax_cannot_import_here_can_be_imported_from_batiste(path: str) -> None:
    assert all(callable(getattr(ours(path), name)) for name in NOT_INSTALLED[path])


@pytest.mark.parametrize("path", GAPS)
def test_what_is_left_out_on_purpose_is_left_out(path: str) -> None:
    assert importlib.util.find_spec("batiste" + path.removeprefix("flax")) is None
