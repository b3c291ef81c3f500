# SPDX-License-Identifier: Apache-2.0
"""Sharding of Variables, under Flax's name."""

from batiste.sharding.names import *  # noqa: F403
