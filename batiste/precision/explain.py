# SPDX-License-Identifier: Apache-2.0
"""What a policy does to a model: a table of its parts, before anything is run."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from batiste.graph import Dict, List, Param, Pytree, Variable, iter_graph
from batiste.graph.structure import show_path
from batiste.graph.text import table

from .policy import Path, Policy, fitting, moments_apart
from .policy import policy as named


class Row(NamedTuple):
    """One part of a model.

    Args:
        stored: the dtypes of its own parameters.
        computes: in which dtype it takes them, and computes if it is a layer.
        result: the dtype that it hands on, where a setting says so.
        rule: the pattern that keeps it wide, `product` if its products are replaced, or nothing.
    """

    path: str
    type: str
    stored: str
    computes: str
    result: str
    rule: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The rows of a model; printed, a table."""

    rows: tuple[Row, ...]

    def __getitem__(self, path: str) -> Row:
        return next(row for row in self.rows if row.path == path)

    def __str__(self) -> str:
        head = ("part", "type", "stored", "computes", "result", "rule")
        return table([head, *((row.path or ".", *row[1:]) for row in self.rows)])


def explain_precision(model: Any, policy: Policy | str) -> Explanation:
    """What a policy does to each part of a model that has parameters or a `dtype`. Nothing is computed.

    Args:
        model: an object, abstract or not.

    >>> from batiste import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    >>> print(explain_precision(model, "bfloat16"))
    part      type       stored   computes  result    rule
    -------------------------------------------------------
    layers/0  Linear     float32  bfloat16  bfloat16
    layers/1  LayerNorm  float32  float32   bfloat16  *Norm
    """
    policy = named(policy) if isinstance(policy, str) else policy
    kept = fitting(model, policy.keep)
    rows = [_row(path, x, policy, kept.get(path, "")) for path, x in iter_graph(model) if isinstance(x, Pytree)]
    return Explanation(tuple(row for row in rows if row is not None))


def _row(path: Path, part: Any, policy: Policy, rule: str) -> Row | None:
    own = {str(leaf.dtype) for x in _own(part) for leaf in jax.tree.leaves(x.get_value())}
    if isinstance(part, (List, Dict)) or not (own or "dtype" in vars(part)):
        return None
    computes = str(policy.accumulate if rule else policy.compute)
    result = "" if "dtype" not in vars(part) else str(policy.compute) if moments_apart(part) else computes
    if not rule and policy.replaces(part):
        rule = "product"
    return Row(show_path(path) if path else "", type(part).__name__, ", ".join(sorted(own)), computes, result, rule)


def _own(part: Any) -> list[Variable]:
    return [x for x in vars(part).values() if isinstance(x, Param)]
