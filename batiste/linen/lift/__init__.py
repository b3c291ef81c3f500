# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms: JAX's transforms of functions whose first argument is a scope, or a tree of scopes."""

from .batching import vmap
from .branches import cond, switch
from .derivatives import custom_vjp, jvp, value_and_grad, vjp
from .loops import broadcast, remat_scan, scan, while_loop
from .programs import checkpoint, jit, remat
from .variables import fold_rngs, map_variables, swap_collection
