# SPDX-License-Identifier: Apache-2.0
"""Attention, under Flax's name."""

from batiste.nn.attend import *  # noqa: F403
from batiste.nn.attention import *  # noqa: F403
from batiste.typing import Dtype, PromoteDtypeFn, Shape  # noqa: F401
