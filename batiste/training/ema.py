# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages of a model's Variables."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from batiste.graph import Pytree, Variable, data, merge, split, state, to_flat_state
from batiste.graph.errors import FilterError

from .match import match, path_text

__all__ = ["EMA"]

A = TypeVar("A")


class EMA(Pytree):
    """average ← decay · average + (1 - decay) · new, for each Variable

    Values that are not floating point (counts, random keys) have no average: the newest is kept.

    Args:
        params: the object whose Variables are averaged; their values now are the first average.
        decay: the weight of the past.
        only: a filter that says which Variables are averaged.
        graph: whether parts of the object may be shared; None takes the default.

    Attributes:
        params: the State of averages, Variables of their own.
    """

    def __init__(self, params: Any, decay: float, *, only: Any = ..., graph: bool | None = None):
        self.graph = graph
        self.decay = decay
        self.filter = only
        self.params = data(_copy_of_variables(state(params, only, graph=graph)))

    def update(self, updates: Any) -> None:
        """Moves the averages towards the values of `updates`: a module, a State or a nested dict.

        Raises:
            StructureError: the averages and the new values do not fit; the message names the paths.
        """
        for variable, value in zip(self._variables().values(), self._matching(updates, "The new values")):
            variable.set_value(jax.tree.map(self._average, variable.get_value(), value))

    def _variables(self) -> dict[Any, Variable]:
        return dict(to_flat_state(self.params))

    def _matching(self, given: Any, what: str) -> list[Any]:
        averages = {path: v.get_value() for path, v in self._variables().items()}
        return match(
            given, averages, self.filter, self.graph, what=what, fix="pass the model that the EMA was made for"
        )

    def _average(self, old: Any, new: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
            return new
        return (self.decay * old + (1 - self.decay) * new).astype(old.dtype)

    def apply_to(self, model: A) -> A:
        """A model with the structure of `model` that shares the averages with this EMA, and the rest with `model`.

        Raises:
            StructureError: the averages are not those of a model of this structure.
        """
        self._matching(model, "The values of the model")
        graphdef, _, rest = split(model, self.filter, ..., graph=self.graph)  # type: ignore[misc]
        return merge(graphdef, self.params, rest)


def _copy_of_variables(averages: Any) -> Any:
    for path, x in to_flat_state(averages):
        if not isinstance(x, Variable):
            raise FilterError(
                "EMA only supports Variable leaves", at=path_text(path), got=type(x).__name__, fix="pass only=nnx.Param"
            )
    return jax.tree.map(lambda v: v.copy(), averages, is_leaf=lambda x: isinstance(x, Variable))
