# SPDX-License-Identifier: Apache-2.0
"""Updates that would be lost: a Variable written inside a foreign JAX transform, on a copy that never comes back."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from .callers import user_place
from .errors import BatisteWarning


class LostUpdateWarning(BatisteWarning):
    """A Variable was written inside a foreign transform and never came back."""


class Home:
    """Where a Variable stood that came into a foreign JAX transform as a pytree, and whether it went back.

    There a write changes a copy: unless the copy is returned, the update is lost. Its end then warns.
    """

    __slots__ = ("name", "parent", "finalizer", "__weakref__")

    def __init__(self, name: str):
        self.name, self.parent, self.finalizer = name, None, None

    def path(self) -> str:
        names, home = [], self
        while home is not None:
            names.append(home.name)
            home = home.parent
        return "/".join(str(n) for n in reversed(names))

    def delivered(self) -> None:
        if self.finalizer is not None:
            self.finalizer.detach()
            self.finalizer = None


def written_far_from_home(variable: Any) -> None:
    """Begins to watch a copy that is written: if it ends before it is delivered, the update is lost."""
    home = variable._home
    if home.finalizer is None:
        home.finalizer = weakref.finalize(variable, _warn_lost, type(variable).__name__, home.path(), user_place())
        home.finalizer.atexit = False


def _warn_lost(kind: str, path: str, place: str) -> None:
    warnings.warn(
        f"an update of the {kind} at '{path}' was lost: it was written inside a plain JAX transform that got the "
        "module as a pytree and did not return it.\n  Fix: return the module (or its state) from the function, "
        "or use the transform of the same name in batiste.nnx, which writes updates back."
        + (f"\n  In: {place}" if place else ""),
        LostUpdateWarning,
        stacklevel=2,
    )
