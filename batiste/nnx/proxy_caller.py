# SPDX-License-Identifier: Apache-2.0
"""Calls of a method of a split object, under Flax's name."""

from batiste.graph.split import ApplyCaller  # noqa: F401
