# SPDX-License-Identifier: Apache-2.0
"""Boxes of lifted transforms: inside, the boxes around variables do not speak of the mapped axis."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from batiste.graph import Variable

from ..boxes import AxisMetadata, is_axis_metadata, map_axis_meta
from .call import below

AxisOf = Callable[[str], Any]


def _boxed(scopes: Any, axis_of: AxisOf) -> Iterator[tuple[Variable, int]]:
    """The Variables with boxes of collections with an axis."""
    for scope in below(scopes):
        for col, cells in scope.cells.items():
            axis = axis_of(col)
            for x in cells.values() if isinstance(axis, int) else ():
                value = x.get_raw_value()
                if not isinstance(value, jax.Array) and any(
                    map(is_axis_metadata, jax.tree.leaves(value, is_leaf=is_axis_metadata))
                ):
                    yield x, axis


def _change(scopes: Any, axis_of: AxisOf, change: Callable[[int, AxisMetadata], AxisMetadata]) -> None:
    for x, axis in _boxed(scopes, axis_of):
        x.set_raw_value(map_axis_meta(functools.partial(change, axis), x.get_raw_value()))


@contextlib.contextmanager
def within_axes(scopes: Any, axis_of: AxisOf, params: dict[Any, Any]) -> Iterator[None]:
    """While it lasts, boxes speak of their values without the axis of their collection."""
    _change(scopes, axis_of, lambda axis, box: box.remove_axis(axis, params))
    try:
        yield
    finally:
        _change(scopes, axis_of, lambda axis, box: box.add_axis(axis, params))
