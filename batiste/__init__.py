# SPDX-License-Identifier: Apache-2.0
"""batiste: neural networks in JAX, two ways to write a model and one small core.

Importing `batiste` alone costs nothing: each part is loaded when its name is first used.

>>> import batiste
>>> batiste.nnx.Linear.__name__
'Linear'
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from batiste.version import __version__

__all__ = ["__version__", "install_as_flax"]


def _parts() -> frozenset[str]:
    return frozenset(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def install_as_flax() -> None:
    """From here on, `import flax` gives batiste; see `batiste.as_flax`."""
    importlib.import_module("batiste.as_flax").install_as_flax()


def __getattr__(name: str) -> Any:
    if name == "config":
        return importlib.import_module("batiste.graph.config").config
    if name.startswith("_") or name not in _parts():
        raise AttributeError(f"module 'batiste' has no attribute {name!r}")
    return importlib.import_module(f"batiste.{name}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | _parts())
