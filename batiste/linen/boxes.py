# SPDX-License-Identifier: Apache-2.0
"""Boxes: values that carry axis metadata through the trees of the functional face."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax


class AxisMetadata(abc.ABC):
    """A box around a value; it is a pytree, and transforms tell it which axes they add and remove."""

    @abc.abstractmethod
    def unbox(self) -> Any:
        """The value inside."""

    @abc.abstractmethod
    def replace_boxed(self, val: Any) -> AxisMetadata:
        """The same box around another value."""

    @abc.abstractmethod
    def add_axis(self, index: int, params: Mapping[Any, Any]) -> AxisMetadata:
        """The box after a transform put a new axis at `index`."""

    @abc.abstractmethod
    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> AxisMetadata:
        """The box after a transform took the axis at `index` away."""


def is_axis_metadata(val: Any) -> bool:
    """Whether `val` is a box."""
    return isinstance(val, AxisMetadata)


def map_axis_meta(fn: Callable[[AxisMetadata], Any], tree: Any) -> Any:
    """`tree` with `fn(box)` in place of every box."""
    return jax.tree.map(lambda x: fn(x) if is_axis_metadata(x) else x, tree, is_leaf=is_axis_metadata)


def unbox(tree: Any) -> Any:
    """`tree` with the values in place of their boxes, those inside other boxes too."""
    return map_axis_meta(lambda box: unbox(box.unbox()), tree)


def replace_boxed(tree: Any, updates: Any) -> Any:
    """The boxes of `tree` around the values of `updates`."""

    def replace(box: Any, update: Any) -> Any:
        return box.replace_boxed(replace_boxed(box.unbox(), update)) if is_axis_metadata(box) else update

    return jax.tree.map(replace, tree, updates, is_leaf=is_axis_metadata)
