# SPDX-License-Identifier: Apache-2.0
"""Bound methods and the like, under Flax's name."""

from batiste.transforms.compile import refuse_bound_method  # noqa: F401
