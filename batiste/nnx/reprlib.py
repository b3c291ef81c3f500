# SPDX-License-Identifier: Apache-2.0
"""Readable texts of objects, under Flax's name."""

from batiste.graph.represent import *  # noqa: F403
