# SPDX-License-Identifier: Apache-2.0
"""Data: batches in an order that a seed decides, read ahead, with a position that is part of a checkpoint.

>>> import numpy as np
>>> loader = Loader({"x": np.arange(6.0), "y": np.arange(6)}, batch=4, last="pad")
>>> batches = prefetch(loader, 2)       # on the device, two ahead
>>> for batch in batches:               # an epoch
...     position = batches.state()      # a small dict, for the checkpoint
>>> batches.restore(position)           # the next iteration goes on behind that batch

Any iterable and any Grain data set is a source as well: `feed(source)` gives it a position.
"""

from __future__ import annotations

from .errors import DataError, DataTimeout, PositionError, SlowDataWarning, WorkerError
from .feed import Feed, Position, feed
from .loader import Loader
from .packing import pack
from .prefetch import prefetch

__all__ = [
    "DataError",
    "DataTimeout",
    "Feed",
    "Loader",
    "Position",
    "PositionError",
    "SlowDataWarning",
    "WorkerError",
    "feed",
    "pack",
    "prefetch",
]
