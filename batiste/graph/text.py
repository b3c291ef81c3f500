# SPDX-License-Identifier: Apache-2.0
"""Tables and sizes as plain text, for all that reports on a model."""

from __future__ import annotations

import math
from collections.abc import Iterable

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(size: float) -> str:
    """A number of bytes for people.

    >>> size_text(1536)
    '1.5 KiB'
    """
    power = min(len(UNITS) - 1, int(math.log(size, 1024)) if size >= 1 else 0)
    return f"{size / 1024**power:.3g} {UNITS[power]}"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of cells in columns; the first row is the head."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join((lines[0], "-" * max(map(len, lines)), *lines[1:]))
