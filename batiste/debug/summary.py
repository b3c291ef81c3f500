# SPDX-License-Identifier: Apache-2.0
"""A table of a model: the path, type, inputs and outputs of each part, its Variables by kind, and what a call costs.

The model is called once, on shapes alone, while the methods of its classes report their calls; nothing of it changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from batiste.graph import (
    Dict,
    List,
    Pytree,
    RngStream,
    Variable,
    as_pure,
    iter_graph,
    merge,
    split,
)
from batiste.graph.errors import ArgumentError
from batiste.graph.represent import sizes_by_kind
from batiste.graph.watch import watching

from .cost import flops, marked, region
from .table import NO_OPTIONS, Line, Style, draw, escape, outline

__all__ = ["CallInfo", "filter_rng_streams", "tabulate"]

Path = tuple[Any, ...]
COLUMNS = ("path", "type", "inputs", "outputs")


@dataclass(frozen=True)
class CallInfo:
    """One row: a call of an object. Texts carry rich's markup."""

    call_order: int
    object_id: int
    type: type
    path: Path
    inputs_repr: str
    outputs: str
    flops: int | None = None
    vjp_flops: int | None = None


def filter_rng_streams(row: CallInfo) -> bool:
    """The default choice of rows: all but random streams."""
    return not issubclass(row.type, RngStream)


def tabulate(
    obj: Any,
    *input_args: Any,
    depth: int | None = None,
    method: str = "__call__",
    row_filter: Callable[[CallInfo], bool] = filter_rng_streams,
    table_kwargs: Mapping[str, Any] = NO_OPTIONS,
    column_kwargs: Mapping[str, Any] = NO_OPTIONS,
    console_kwargs: Mapping[str, Any] = NO_OPTIONS,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **input_kwargs: Any,
) -> str:
    """A table of an object: one row per part that a call of it reaches, as text.

    Args:
        obj: a module; an object that is not callable, such as an optimizer, is listed without inputs and outputs.
        input_args, input_kwargs: the arguments of the call; `jax.ShapeDtypeStruct`s will do.
        depth: how many levels of parts are shown; None shows all.
        method: the method that is called.
        row_filter: keeps the rows for which it is True; by default all but random streams.
        table_kwargs, column_kwargs, console_kwargs: options of rich's `Table`, `Table.add_column` and `Console`.
        compute_flops: adds a column with the floating-point operations of each part's call, by XLA's cost analysis.
        compute_vjp_flops: adds a column with those of the call and its gradient.

    Raises:
        ArgumentError: the object has no such method.
    """
    columns = list(COLUMNS) + ["flops"] * compute_flops + ["vjp_flops"] * compute_vjp_flops
    parts = {path: x for path, x in iter_graph(obj, graph=True) if isinstance(x, Pytree)}
    if callable(getattr(obj, method, None)):
        calls = _calls(obj, method, input_args, input_kwargs, columns)
    elif method != "__call__" or input_args or input_kwargs:
        raise ArgumentError(
            f"{type(obj).__name__} has no method {method!r} to call",
            fix="pass method=, or no arguments to list its parts",
        )
    else:
        calls = _listed(parts)
    rows = [
        (call, parts[path])
        for path, call in calls
        if path in parts and (depth is None or len(path) <= depth) and row_filter(call)
    ]
    return _render(obj, columns, rows, Style(table_kwargs, column_kwargs, console_kwargs))


def _listed(parts: Mapping[Path, Any]) -> Iterator[tuple[Path, CallInfo]]:
    """A row for each part but containers, parents first, without a call."""
    paths = [path for path, part in parts.items() if not path or not isinstance(part, (List, Dict))]
    for order, path in enumerate(sorted(paths, key=lambda path: tuple(map(str, path)))):
        yield path, CallInfo(order, id(parts[path]), type(parts[path]), path, "", "")


# ---------------------------------------------------------------- calling the model, watched

Row = tuple[Path, str, str]  # a part's path, the method, and its inputs as text


@dataclass
class _Call:
    """The first call of a row; `tags` mark this one and all that follow."""

    order: int
    part: Any
    outputs: str = ""
    tags: list[str] = field(default_factory=list)


def _calls(
    obj: Any, method: str, args: tuple, kwargs: dict[str, Any], columns: list[str]
) -> Iterator[tuple[Path, CallInfo]]:
    """The calls of each part that differ in method or inputs, with the part's path, in their order."""
    graphdef, leaves = split((obj, args, kwargs), graph=True)
    seen: dict[Row, _Call] = {}
    count = itertools.count()

    def watched(values: Any) -> None:
        copy, args, kwargs = merge(graphdef, values)
        parts = {id(x): (path, x) for path, x in iter_graph(copy, graph=True) if isinstance(x, Pytree)}

        def report(part: Any, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            if id(part) not in parts:
                return function(part, *args, **kwargs)
            row = (parts[id(part)][0], name, _inputs_text(args, kwargs))
            new = row not in seen
            call = seen.setdefault(row, _Call(len(seen), part))
            call.tags.append(f"call_{next(count)}")
            output = marked(call.tags[-1], lambda: function(part, *args, **kwargs), is_leaf=_is_object)
            if new:
                call.outputs = "" if output is None else outline(output)
            return output

        with watching({type(x) for _, x in parts.values()}, report):
            getattr(copy, method)(*args, **kwargs)

    jaxpr = jax.make_jaxpr(watched)(as_pure(leaves)).jaxpr
    for (path, name, inputs), call in seen.items():
        part = (
            next(filter(None, (region(jaxpr, tag) for tag in call.tags)), None) if len(columns) > len(COLUMNS) else None
        )
        yield (
            path,
            CallInfo(
                call_order=call.order,
                object_id=id(call.part),
                type=type(call.part),
                path=path if name == "__call__" else (*path, name),
                inputs_repr=inputs,
                outputs=call.outputs,
                flops=_flops(part, False) if "flops" in columns else None,
                vjp_flops=_flops(part, True) if "vjp_flops" in columns else None,
            ),
        )


def _flops(part: Any, backward: bool) -> int:
    return 0 if part is None else flops(part, backward)


def _is_object(x: Any) -> bool:
    return isinstance(x, (Pytree, Variable))


# ---------------------------------------------------------------- texts


def _inputs_text(args: tuple, kwargs: dict[str, Any]) -> str:
    if len(args) == 1 and not kwargs:
        return outline(args[0])
    return "\n".join(outline(x) for x in (list(args), kwargs) if x)


# ---------------------------------------------------------------- the table


def _own_variables(part: Any) -> dict[str, dict[str, Variable]]:
    """The Variables of a part itself, and of lists and dicts in it, by kind and then by path."""
    owners: set[Path] = set()
    found: list[tuple[Path, Variable]] = []
    for path, x in iter_graph(part, graph=True):
        if isinstance(x, Variable):
            if x.get_value() is not None:
                found.append((path, x))
        elif path and isinstance(x, Pytree) and not isinstance(x, (List, Dict)):
            owners.add(path)
    own: dict[str, dict[str, Variable]] = {}
    for path, x in found:
        if not any(path[:n] in owners for n in range(1, len(path))):
            own.setdefault(x.__batiste_repr__().kind or "", {})["/".join(map(str, path))] = x
    return own


def _render(obj: Any, columns: list[str], rows: list[tuple[CallInfo, Any]], style: Style) -> str:
    lines = []
    for call, part in rows:
        cells = [escape("/".join(map(str, call.path))), call.type.__name__, call.inputs_repr, call.outputs]
        cells += [str(getattr(call, column)) for column in columns[len(COLUMNS) :]]
        lines.append(Line(cells, _own_variables(part), sizes_by_kind(part)))
    totals = dict(sorted(sizes_by_kind(obj).items()))
    return draw(f"{type(obj).__name__} Summary", columns, lines, totals, style)
