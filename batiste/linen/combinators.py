# SPDX-License-Identifier: Apache-2.0
"""Modules made of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from batiste.core.frozen_dict import FrozenDict
from batiste.graph.errors import ArgumentError

from .module import Module, compact


class Sequential(Module):
    """y = fₙ(… f₂(f₁(x)))

    A layer that returns a tuple or a dict gives the next one several arguments, or named ones.
    """

    layers: Sequence[Callable[..., Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            raise ArgumentError(
                "'layers' must be a sequence", got=type(self.layers).__name__, fix="pass a list of layers"
            )
        super().__post_init__()

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layers:
            raise ArgumentError("Empty Sequential module", at=str(self.path), fix="pass at least one layer")
        y = self.layers[0](*args, **kwargs)
        for layer in self.layers[1:]:
            if isinstance(y, tuple):
                y = layer(*y)
            elif isinstance(y, (dict, FrozenDict)):
                y = layer(**y)
            else:
                y = layer(y)
        return y
