# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms of functions of scopes, under Flax's path."""

from batiste.linen.lift import (
    checkpoint,
    cond,
    custom_vjp,
    fold_rngs,
    jit,
    jvp,
    map_variables,
    remat,
    remat_scan,
    scan,
    swap_collection,
    switch,
    value_and_grad,
    vjp,
    vmap,
    while_loop,
)

__all__ = [
    "checkpoint",
    "cond",
    "custom_vjp",
    "fold_rngs",
    "jit",
    "jvp",
    "map_variables",
    "remat",
    "remat_scan",
    "scan",
    "swap_collection",
    "switch",
    "value_and_grad",
    "vjp",
    "vmap",
    "while_loop",
]
