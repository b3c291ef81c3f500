# SPDX-License-Identifier: Apache-2.0
"""Linear maps and convolutions, under Flax's name."""

from batiste.nn.conv import *  # noqa: F403
from batiste.nn.linear import *  # noqa: F403
from batiste.typing import (  # noqa: F401
    ConvGeneralDilatedT,
    DotGeneralT,
    Dtype,
    EinsumT,
    LaxPadding,
    PrecisionLike,
    PromoteDtypeFn,
    Shape,
)
