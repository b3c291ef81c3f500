# SPDX-License-Identifier: Apache-2.0
"""Whose line it was: the user's code that led to an error or a warning, and the transforms that it runs inside of."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep
_TRANSFORMS = os.path.join(_OURS, "transforms", "")
_FAMILIES = {  # where the functions of JAX stand that call the user's -> what users call them by
    os.path.join(_JAX, "_src", "lax", "control_flow", ""): "jax.lax.",
    **{os.path.join(_JAX, "_src", f"{name}.py"): "jax." for name in ("api", "pjit", "ad_checkpoint", "shard_map")},
}
_OTHERWISE = {"cpp_pjit": "jit"}  # functions of JAX whose own names say something else


def user_place() -> str:
    """`function (file:line)` of the innermost code that is the user's, and the transforms around it; "" if none is."""
    frame, _ = _user_frame()
    if frame is None or frame.f_code.co_filename.startswith("<"):  # typed at a prompt: no file to look into
        return ""
    place = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
    around = list(_transforms_around(frame))
    return f"{place}, inside {' > '.join(reversed(around))}" if around else place


def warn(text: str, kind: type[Warning]) -> None:
    """Warns at the user's line, so that each line of a program hears of a matter once."""
    _, distance = _user_frame()
    warnings.warn(text, kind, stacklevel=1 + distance)


def _user_frame() -> tuple[FrameType | None, int]:
    """The user's innermost frame, and how many frames it is above the function that asks."""
    frame, distance = sys._getframe(1), 0
    while frame is not None and not _is_users(frame):
        frame, distance = frame.f_back, distance + 1
    return frame, distance


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.startswith((_OURS, _JAX, "<frozen")):
        return False
    return not file.startswith(_PYTHON) or "site-packages" in file


def _transforms_around(frame: FrameType) -> Iterator[str]:
    """The transforms that the user's frame runs inside of, innermost first.

    Where the library calls JAX it is the library's transform that the user knows; else JAX's outermost function.
    """
    ours, theirs, outer = [], "", frame.f_back
    while outer is not None:
        if _is_users(outer):
            yield from ours or filter(None, [theirs])
            ours, theirs = [], ""
        elif (name := _own_transform(outer)) and name not in ours[-1:]:
            ours.append(name)
        theirs = _jax_transform(outer) or theirs
        outer = outer.f_back


def _own_transform(frame: FrameType) -> str:
    """The transform of batiste that a frame belongs to, or ""."""
    if not frame.f_code.co_filename.startswith(_TRANSFORMS):
        return ""
    names = frame.f_locals
    holder = names.get("self")
    mode: Any = names.get("mode") or getattr(getattr(holder, "crossing", holder), "mode", None)
    return f"nnx.{mode.name}" if hasattr(mode, "name") else ""


def _jax_transform(frame: FrameType) -> str:
    """The transform of JAX that a frame belongs to, or ""."""
    file = frame.f_code.co_filename
    family = next((family for start, family in _FAMILIES.items() if file.startswith(start)), None)
    if family is None:
        return ""
    name = frame.f_code.co_qualname.split(".")[0].strip("_")
    return family + _OTHERWISE.get(name, name)
