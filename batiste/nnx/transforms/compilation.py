# SPDX-License-Identifier: Apache-2.0
"""Compiled functions, under Flax's name."""

from batiste.transforms.cached import jit_partial  # noqa: F401
from batiste.transforms.compile import JitWrapped, StateSharding, jit  # noqa: F401
from batiste.transforms.mesh import shard_map  # noqa: F401
