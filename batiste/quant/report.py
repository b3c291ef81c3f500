# SPDX-License-Identifier: Apache-2.0
"""What quantisation costs, layer by layer: bytes, the error of each weight, and that of each result."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batiste.graph import Pytree, iter_graph
from batiste.graph.errors import ArgumentError
from batiste.graph.jaxcompat import Tracer
from batiste.graph.structure import show_path
from batiste.graph.text import size_text, table
from batiste.graph.watch import watching

from .quantize import weight_of
from .weight import QuantizedWeight


class Row(NamedTuple):
    """One quantised layer.

    Args:
        group: how many values share a scale.
        error: ‖w - ŵ‖ / ‖w‖
        worst: greatest of |w - ŵ| / greatest of |w|
        result: ‖y - ŷ‖ / ‖y‖ of what the layer returns in either model, with the errors of the layers before it; None
            if the models were not run, or the layer runs inside a transform.
    """

    path: str
    type: str
    shape: tuple[int, ...]
    bits: int
    group: int
    before: int
    after: int
    error: float
    worst: float
    result: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a model; printed, a table."""

    rows: tuple[Row, ...]

    def __getitem__(self, path: str) -> Row:
        return next(row for row in self.rows if row.path == path)

    @property
    def before(self) -> int:
        """The bytes of all these weights before."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        return sum(row.after for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "type", "shape", "bits", "group", "before", "after", "error", "worst", "result")
        rows = [(r.path, r.type, str(list(r.shape)), str(r.bits), str(r.group), size_text(r.before), size_text(r.after),
                 _percent(r.error), _percent(r.worst), _percent(r.result)) for r in self.rows]  # fmt: skip
        total = (f"{len(rows)} layers", "", "", "", "", size_text(self.before), size_text(self.after), "", "", "")
        return table([head, *rows, total])


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.3g} %"


def error_report(model: Any, small: Any, *args: Any, **kwargs: Any) -> Report:
    """The bytes and the error of each layer of `small`, which `quantize` has made of `model`

    Args:
        args, kwargs: of a call of the models, which tells the errors of results; without any, only weights are looked
            at. The call is not jitted; what a model writes, its copy writes as well.

    Raises:
        ArgumentError: `small` has no quantised weight, or one that `model` has not.

    >>> from batiste import nnx
    >>> from batiste.quant import quantize
    >>> model = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
    >>> row, = error_report(model, quantize(model, 8), jnp.ones((1, 64))).rows
    >>> row.path, row.bits, row.error < 0.01, row.result < 0.01
    ('<root>', 8, True, True)
    """
    originals = {path: x for path, x in iter_graph(model) if isinstance(x, Pytree)}
    errors = _result_errors(model, small, args, kwargs) if args or kwargs else {}
    rows = []
    for path, layer in iter_graph(small):
        weight = weight_of(layer)
        w = vars(layer).get(weight.name) if weight is not None else None
        if weight is None or not isinstance(w, QuantizedWeight):
            continue
        if path not in originals or vars(originals[path])[weight.name].shape != w.shape:
            raise ArgumentError("the model was not made from this one", at=show_path(path), got=f"a weight {w.shape}",
                                fix="pass the model that was given to quantize")  # fmt: skip
        exact = vars(originals[path])[weight.name][...]
        off = jnp.abs(exact - w[...])
        q = w.get_value().q
        before, after = math.prod(exact.shape) * exact.dtype.itemsize, w.nbytes
        rows.append(Row(show_path(path), type(layer).__name__, w.shape, w.bits, q.shape[-2] * 8 // w.bits, before,
                        after, _relative(exact, w[...]), float(off.max() / jnp.abs(exact).max()),
                        errors.get(path)))  # fmt: skip
    if not rows:
        raise ArgumentError("the model has no quantised weight", got=type(small).__name__,
                            fix="pass quantize(model) as the second argument")  # fmt: skip
    return Report(tuple(rows))


def _relative(exact: Any, other: Any) -> float:
    exact, other = (jnp.asarray(x, jnp.float32) for x in (exact, other))
    return float(jnp.linalg.norm((exact - other).ravel()) / jnp.maximum(jnp.linalg.norm(exact.ravel()), 1e-30))


def _result_errors(model: Any, small: Any, args: tuple, kwargs: dict[str, Any]) -> dict[tuple, float]:
    """By path, the greatest error of what a part returned, over its calls."""
    exact, other = (_results(m, args, kwargs) for m in (model, small))
    errors: dict[tuple, float] = {}
    for path, results in exact.items():
        for a, b in zip(results, other.get(path, ())):
            errors[path] = max(errors.get(path, 0.0), _relative(a, b))
    return errors


def _results(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[tuple, list[Any]]:
    parts = {id(x): (path, x) for path, x in iter_graph(model) if isinstance(x, Pytree)}
    seen: dict[tuple, list[Any]] = collections.defaultdict(list)

    def report(part: Any, name: str, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        y = function(part, *args, **kwargs)
        if id(part) in parts and isinstance(y, jax.Array) and not isinstance(y, Tracer):
            seen[parts[id(part)][0]].append(y)
        return y

    with watching({type(x) for _, x in parts.values()}, report):
        model(*args, **kwargs)
    return seen
