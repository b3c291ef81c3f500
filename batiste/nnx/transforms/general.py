# SPDX-License-Identifier: Apache-2.0
"""Lifting transforms by hand, under Flax's name."""

from batiste.transforms.compile import refuse_bound_method  # noqa: F401
from batiste.transforms.halves import merge_inputs, split_inputs  # noqa: F401
