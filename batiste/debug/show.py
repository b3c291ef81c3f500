# SPDX-License-Identifier: Apache-2.0
"""Shows objects in a notebook, or prints them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from batiste.graph.optional import need

__all__ = ["display"]


def in_ipython() -> bool:
    """Whether the program runs in IPython: a notebook or its shell."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def display(*args: Any) -> None:
    """Shows each object with treescope, where that is installed and the program runs in IPython; else prints it."""
    if in_ipython() and importlib.util.find_spec("treescope"):
        show = need("treescope", extra="display").display
    else:
        show = print
    for x in args:
        show(x)
