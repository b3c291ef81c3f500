# SPDX-License-Identifier: Apache-2.0
"""Normalisation of activations and of weights, under Flax's name."""

from batiste.nn.norm import *  # noqa: F403
from batiste.nn.reparam import *  # noqa: F403
from batiste.typing import Dtype, PromoteDtypeFn  # noqa: F401
