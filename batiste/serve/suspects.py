# SPDX-License-Identifier: Apache-2.0
"""Rows on which an engine died: tried alone once more, and never again if that kills it too."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping

import numpy as np


class Suspects:
    """Rows that were there when an engine died; the last `most` of them.

    Dead in company is nobody's proof. Such a row is tried alone: either it is cleared, or it is refused from then on.

    >>> suspects, row = Suspects(), mark({"x": np.ones(2)})
    >>> suspects.suspect([row])
    >>> row in suspects, suspects.guilty(row)
    (True, False)
    >>> suspects.convict(row)
    >>> suspects.guilty(row)
    True
    """

    def __init__(self, most: int = 4096):
        self.most = most
        self._found: dict[bytes, bool] = {}  # mark -> whether it killed alone; the newest last

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, mark: bytes) -> bool:
        return mark in self._found

    @property
    def convicted(self) -> int:
        """How many rows are not computed any more."""
        return sum(list(self._found.values()))

    def guilty(self, mark: bytes) -> bool:
        return self._found.get(mark, False)

    def suspect(self, marks: Iterable[bytes]) -> None:
        """They were together when it died."""
        for mark in marks:
            self._found[mark] = self._found.pop(mark, False)
        for mark in list(self._found)[: max(len(self._found) - self.most, 0)]:
            del self._found[mark]

    def convict(self, mark: bytes) -> None:
        """It was alone when it died, again."""
        self._found[mark] = True

    def clear(self, mark: bytes) -> None:
        """It was computed alone, and nothing happened."""
        self._found.pop(mark, None)


SALT = secrets.token_bytes(16)  # so that nobody can make two rows with one mark


def mark(row: Mapping[str, np.ndarray]) -> bytes:
    """What a row is known by, whatever company it comes in."""
    found = hashlib.blake2b(digest_size=16, key=SALT)
    for name in sorted(row):
        found.update(f"{name} {row[name].dtype.name} {row[name].shape} ".encode())
        found.update(row[name].tobytes())
    return found.digest()


def marks(arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    """Of each row."""
    rows = len(next(iter(arrays.values())))
    return [mark({name: x[i] for name, x in arrays.items()}) for i in range(rows)]
