# SPDX-License-Identifier: Apache-2.0
"""Whose line it was: the user's code that led to an error or a warning, and the transforms that it runs inside of."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from types import FrameType

import jax

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep
_TRANSFORMS = {  # where the functions stand that call the user's -> what users call them by
    os.path.join(_OURS, "transforms", ""): "nnx.",
    os.path.join(_JAX, "_src", "lax", "control_flow", ""): "jax.lax.",
    **{os.path.join(_JAX, "_src", f"{name}.py"): "jax." for name in ("api", "pjit", "ad_checkpoint", "shard_map")},
}
_OTHERWISE = {"cpp_pjit": "jit"}  # functions of JAX whose own names say something else


def user_place() -> str:
    """`function (file:line)` of the innermost code that is the user's, and the transforms around it; "" if none is."""
    frame, _ = _user_frame()
    if frame is None:
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
    """The transforms that the user's frame runs inside of, innermost first: the user called them, and they the user."""
    name, outer = "", frame.f_back  # name: of the outermost transform since the last frame of the user
    while outer is not None:
        if _is_users(outer):
            if name:
                yield name
            name = ""
        else:
            name = _transform_name(outer) or name
        outer = outer.f_back


def _transform_name(frame: FrameType) -> str:
    """What users call the transform that a frame of the library belongs to; "" for other frames."""
    file = frame.f_code.co_filename
    family = next((family for start, family in _TRANSFORMS.items() if file.startswith(start)), None)
    if family is None:
        return ""
    names = frame.f_locals
    mode = names.get("mode", getattr(names.get("self"), "mode", None))
    name = getattr(mode, "name", None) or frame.f_code.co_qualname.split(".")[0].strip("_")
    return family + _OTHERWISE.get(name, name)
