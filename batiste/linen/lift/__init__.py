# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms: JAX's transforms of functions whose first argument is a scope, or a tree of scopes."""

from .batching import vmap
from .loops import broadcast, remat_scan, scan, while_loop
from .programs import checkpoint, jit, remat
