# SPDX-License-Identifier: Apache-2.0
"""Memory that two processes share: arrays are laid into it by one and seen by the other, without a name on any disk."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from batiste.graph.optional import need

ALIGN = 64  # bytes at which XLA takes an array as it is
Layout = dict[str, tuple[str, list[int], int]]  # name -> dtype, shape, offset


class Region:
    """A file of memory, as large as what was put into it so far.

    >>> region = Region(nameless())
    >>> layout, end = region.put({"x": np.arange(3)})
    >>> region.get(layout)["x"].tolist(), end
    ([0, 1, 2], 64)
    >>> region.close()
    """

    def __init__(self, file: int):
        self.file = file
        self._map: mmap.mmap | None = None

    def put(self, arrays: Mapping[str, Any], start: int = 0) -> tuple[Layout, int]:
        """Copies arrays in, from `start` on; where they lie, and the end of the last."""
        layout: Layout = {}
        end = start
        for name, x in arrays.items():
            layout[name] = (x.dtype.name, list(x.shape), end)
            end += -(-x.nbytes // ALIGN) * ALIGN
        if end > os.fstat(self.file).st_size:
            os.ftruncate(self.file, end)
        for name, view in self.get(layout).items():
            view[...] = arrays[name]
        return layout, end

    def get(self, layout: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What lies there: views, which the next `put` of whoever has the turn changes.

        Raises:
            ValueError, TypeError: there is nothing of this kind.
        """
        found = {}
        for name, (dtype, shape, offset) in layout.items():
            kind = np.dtype(getattr(jnp, dtype, dtype))
            whole = self._seen(offset + kind.itemsize * math.prod(shape))
            found[name] = np.ndarray(shape, kind, whole, offset) if whole else np.zeros(shape, kind)
        return found

    def _seen(self, size: int) -> mmap.mmap | None:
        if size and (self._map is None or len(self._map) < size):
            self._map = mmap.mmap(self.file, os.fstat(self.file).st_size)  # the old one lives as long as its views
        return self._map

    def close(self) -> None:
        """The memory is free once no process has it open and no view is left."""
        self._map = None
        os.close(self.file)


def nameless() -> int:
    """A file of memory (where there is none, of disk) that is gone with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("batiste", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl = need("fcntl", extra="serve")  # which other systems do not have
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # to read what was cut off would end the process
        return file
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
