# SPDX-License-Identifier: Apache-2.0
"""The graph functions, under an older name of Flax's file."""

from .graphlib import *  # noqa: F403
