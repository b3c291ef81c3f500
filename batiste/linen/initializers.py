# SPDX-License-Identifier: Apache-2.0
"""Initialisers, under the name that they have in the functional face."""

from batiste.nn.initializers import *  # noqa: F403
from batiste.nn.initializers import __all__ as __all__
