# SPDX-License-Identifier: Apache-2.0
"""The functions that depend on a mode, with `graph=True, graph_updates=True` fixed whatever the defaults are."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from batiste import nnx

_NAMES: list[str] = [
    "backup_keys",
    "cached_partial",
    "checkify",
    "clone",
    "cond",
    "custom_vjp",
    "eval_shape",
    "flatten",
    "fori_loop",
    "fork_rngs",
    "get_abstract_model",
    "grad",
    "graphdef",
    "iter_children",
    "iter_graph",
    "iter_modules",
    "jit",
    "jvp",
    "pmap",
    "recursive_map",
    "remat",
    "reseed",
    "scan",
    "shard_map",
    "split",
    "split_rngs",
    "state",
    "switch",
    "value_and_grad",
    "view",
    "view_info",
    "vjp",
    "vmap",
    "while_loop",
]

__all__ = _NAMES  # type: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'batiste.nnx.compat' has no attribute {name!r}")
    function = getattr(nnx, name)
    fixed = {mode: True for mode in ("graph", "graph_updates") if mode in inspect.signature(function).parameters}
    globals()[name] = functools.partial(function, **fixed)
    return globals()[name]


def __dir__() -> list[str]:
    return _NAMES
