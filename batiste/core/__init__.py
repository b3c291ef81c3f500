# SPDX-License-Identifier: Apache-2.0
"""The functional core's names, under Flax's path; those that need the functional face are loaded when first used."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from .frozen_dict import FrozenDict, copy, freeze, pop, pretty_repr, unfreeze

_HOMES = {
    "batiste.linen.boxes": "AxisMetadata map_axis_meta unbox",
    "batiste.core.scope": "DenyList Scope Variable apply bind init lazy_init",
    "batiste.core.lift": "custom_vjp jit jvp remat remat_scan scan vjp vmap while_loop",
    "batiste.core.axes_scan": "broadcast",
    "batiste.core.tracers": "check_trace_level current_trace",
    "jax": "Array",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__))

__all__ = ["FrozenDict", "copy", "freeze", "pop", "pretty_repr", "unfreeze", *_HOME_OF]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"batiste.core.{name}")
    else:
        raise AttributeError(f"module 'batiste.core' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_MODULES})
