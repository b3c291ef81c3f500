# SPDX-License-Identifier: Apache-2.0
"""Recurrent cells and layers, under Flax's name."""

from batiste.nn.cells import *  # noqa: F403
from batiste.nn.recurrent import *  # noqa: F403
from batiste.typing import Dtype, PromoteDtypeFn, Shape  # noqa: F401
