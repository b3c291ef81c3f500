# SPDX-License-Identifier: Apache-2.0
"""Pytrees and objects, under Flax's name."""

from batiste.graph.pytree import *  # noqa: F403
