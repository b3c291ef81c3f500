# SPDX-License-Identifier: Apache-2.0
"""Packages that batiste can use but does not require, loaded when first used."""

from __future__ import annotations

import importlib
from typing import Any


def need(name: str, extra: str) -> Any:
    """The module called `name`, imported now; `extra` is the part of batiste's dependencies that brings it.

    >>> need("math", extra="display").gcd(12, 18)
    6

    Raises:
        ImportError: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is there, and one of its own dependencies is not
        raise ImportError(
            f"This needs the package {package!r}, which is not installed.\n  fix: pip install 'batiste[{extra}]'",
            name=name,
        ) from error
