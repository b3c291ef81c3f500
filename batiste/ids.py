# SPDX-License-Identifier: Apache-2.0
"""Identities: numbers that no other thing of this process has, not even a copy."""

from __future__ import annotations

import itertools


class FlaxId:
    """An identity; a copy is another one, a pickled one the same."""

    def __init__(self, rawid: int):
        self.id = rawid

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlaxId) and other.id == self.id

    def __hash__(self) -> int:
        return hash((FlaxId, self.id))

    def __repr__(self) -> str:
        return f"FlaxId({self.id})"

    def __copy__(self) -> FlaxId:
        return uuid()

    def __deepcopy__(self, memo: dict) -> FlaxId:
        return uuid()


class UUIDManager:
    """Gives a new identity at each call, in whatever thread.

    >>> uuid() == uuid()
    False
    """

    def __init__(self):
        self._numbers = itertools.count(1)

    def __call__(self) -> FlaxId:
        return FlaxId(next(self._numbers))


uuid = UUIDManager()
