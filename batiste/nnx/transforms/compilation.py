# SPDX-License-Identifier: Apache-2.0
"""Compiled functions, under Flax's name."""

from batiste.transforms.compile import JitWrapped, StateSharding, jit  # noqa: F401
