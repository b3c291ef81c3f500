# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms of functions of scopes, under Flax's path."""

from batiste.linen.lift import checkpoint, jit, remat, remat_scan, scan, vmap, while_loop

__all__ = ["checkpoint", "jit", "remat", "remat_scan", "scan", "vmap", "while_loop"]
