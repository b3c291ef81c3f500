# SPDX-License-Identifier: Apache-2.0
"""Traces and branches, under Flax's name."""

from batiste.transforms.branches import cond, switch  # noqa: F401
from batiste.transforms.trace import checkify, eval_shape, make_jaxpr  # noqa: F401
