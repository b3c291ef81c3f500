# SPDX-License-Identifier: Apache-2.0
"""Meshes, by the names and sizes of their axes."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from batiste.graph.errors import ArgumentError

ORDER = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(*, explicit: bool = False, devices: Any = None, **sizes: int) -> Mesh:
    """A mesh with these axes, those that speak most innermost; one size may be -1, for all devices that are left.

    Args:
        explicit: shardings become a part of the types of arrays; otherwise the compiler propagates them.

    >>> make_mesh(tensor=2, data=-1).axis_names
    ('data', 'tensor')

    Raises:
        ArgumentError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    names = sorted(sizes, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = [len(devices) // known if sizes[name] == -1 else sizes[name] for name in names]
    if math.prod(shape) != len(devices):
        raise ArgumentError(f"a mesh of {dict(zip(names, shape))} does not hold {len(devices)} devices",
                            fix="let one size be -1, or pass devices=")  # fmt: skip
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(shape), tuple(names), axis_types=(kind,) * len(names), devices=devices)
