# SPDX-License-Identifier: Apache-2.0
"""Identities that are unique in a process: two ids are never equal to another, not even to a copy."""

from __future__ import annotations

import dataclasses
import itertools

_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class UUID:
    """A number that no other id of this process has."""

    rawid: int

    def __copy__(self) -> UUID:
        return uuid()  # a copy is another thing

    def __deepcopy__(self, memo) -> UUID:
        return uuid()

    def __repr__(self):
        return f"UUID({self.rawid})"


def uuid() -> UUID:
    """A new id.

    >>> uuid() == uuid()
    False
    """
    return UUID(next(_numbers))
