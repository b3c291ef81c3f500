# SPDX-License-Identifier: Apache-2.0
"""What travels between devices in a compiled program."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (?P<type>.+?) (?P<op>{'|'.join(OPERATIONS)})(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation between devices: its kind, and the shapes that each device holds of its result."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def collectives(compiled: Any) -> list[Collective]:
    """The operations between devices in a compiled program, or in its text; one inside a loop counts once."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    found = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            shapes = [tuple(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(match["type"])]
            found.append(Collective(match["op"], tuple(shapes)))
    return found


def count_collectives(compiled: Any) -> Counter[str]:
    """How many operations between devices of each kind a compiled program has.

    >>> count_collectives("%a = f32[8]{0} all-reduce(%b), channel_id=1")
    Counter({'all-reduce': 1})
    """
    return Counter(c.kind for c in collectives(compiled))
