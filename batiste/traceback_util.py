# SPDX-License-Identifier: Apache-2.0
"""Which frames an error shows: those of the library are left out, as JAX leaves out its own, unless asked for.

JAX's setting `jax_traceback_filtering` says whether frames are left out at all.
"""

from __future__ import annotations

from pathlib import Path

from batiste.graph.config import config
from batiste.graph.jaxcompat import api_boundary, hidden_paths

__all__ = [
    "api_boundary",
    "config",
    "hide_flax_in_tracebacks",
    "register_exclusion",
    "show_flax_in_tracebacks",
]

_flax_exclusions = [str(Path(__file__).parent)]
_hidden = False


def register_exclusion(path: str) -> None:
    """Counts a file, or all files of a directory, among those of the library."""
    _flax_exclusions.append(path)
    if _hidden:
        hidden_paths.append(path)


def hide_flax_in_tracebacks() -> None:
    """Leaves out the library's frames."""
    global _hidden
    if not _hidden:
        hidden_paths.extend(_flax_exclusions)
    _hidden = True


def show_flax_in_tracebacks() -> None:
    """Shows the library's frames."""
    global _hidden
    if _hidden:
        hidden_paths[:] = [path for path in hidden_paths if path not in _flax_exclusions]
    _hidden = False


if config.flax_filter_frames:
    hide_flax_in_tracebacks()
