# SPDX-License-Identifier: Apache-2.0
"""Maps and loops, under Flax's name."""

from batiste.transforms.axes import Carry, StateAxes, transform_metadata  # noqa: F401
from batiste.transforms.batching import pmap, vmap  # noqa: F401
from batiste.transforms.loops import fori_loop, scan, while_loop  # noqa: F401
