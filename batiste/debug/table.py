# SPDX-License-Identifier: Apache-2.0
"""Draws tables of models: what was called with what, beside the Variables of each part, kind by kind.

Both faces fill `Line`s; this file decides how they look. A type that is not shown as its `str` registers with
`outline`, and need not know of tables.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from batiste.graph import Pytree, State, Variable
from batiste.graph.optional import need
from batiste.graph.represent import Size

from .show import in_ipython

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
EXTRA = "display"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table.

    Args:
        cells: the texts of the first columns, in markup.
        listed: by kind, what is listed by name.
        sizes: by kind, the size that stands below.
    """

    cells: list[str]
    listed: Mapping[str, Any]
    sizes: Mapping[str, Size]


@dataclasses.dataclass(frozen=True)
class Style:
    """Options of rich's `Table`, `Table.add_column` and `Console`."""

    table: Mapping[str, Any]
    column: Mapping[str, Any]
    console: Mapping[str, Any]


def draw(title: str, columns: list[str], lines: Iterable[Line], totals: Mapping[str, Size], style: Style) -> str:
    """A table with the columns that `cells` fill, and one more for each kind of `totals`."""
    table = need("rich.table", extra=EXTRA).Table(
        **{"title": title, "show_header": True, "show_lines": True, "show_footer": True, **style.table}
    )
    total = need("rich.text", extra=EXTRA).Text("Total", justify="right")
    for column in columns[:-1]:
        table.add_column(column, **style.column)
    table.add_column(columns[-1], **{"footer": total, **style.column})
    for kind, size in totals.items():
        table.add_column(kind, **{"footer": f"[bold]{size_text(size)}[/bold]", **style.column})
    for line in lines:
        table.add_row(*line.cells, *(_listing(line, kind) for kind in totals))
    table.caption_style = "bold"
    table.caption = f"\nTotal Parameters: {size_text(sum(totals.values(), Size()))}"
    console = need("rich.console", extra=EXTRA).Console(
        **{"force_terminal": True, "force_jupyter": in_ipython(), **style.console}
    )
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _listing(line: Line, kind: str) -> str:
    listed = outline(line.listed[kind]) + "\n\n" if line.listed.get(kind) else ""
    return listed + (f"[bold]{size_text(line.sizes[kind])}[/bold]" if line.sizes.get(kind) else "")


def size_text(size: Size) -> str:
    """36 [dim](144 B)[/dim]"""
    elements, rest = str(size).split(" ", 1)
    return f"{elements} [dim]{rest}[/dim]"


# ---------------------------------------------------------------- values as outlines


def escape(text: str) -> str:
    """A text whose brackets are no markup."""
    return need("rich.markup", extra=EXTRA).escape(text)


@functools.singledispatch
def outline(x: Any) -> str:
    """A value as an outline: arrays as `dtype[shape]`, one line each, nested containers indented.

    >>> print(outline({"x": np.ones((2, 3), "int8"), "more": [1, None]}))
    x: [dim]int8[/dim][2,3]
    more:
    - 1
    - None
    """
    if isinstance(x, jax.Array):  # tracers and hijax Variables are instances, but of no subclass
        return _array(x)
    if isinstance(x, Variable):
        return _variable(x)
    if inspect.isroutine(x) or isinstance(x, type):
        return str(getattr(x, "__name__", type(x).__name__))
    if dataclasses.is_dataclass(x) and not jax.tree_util.all_leaves([x]):
        return _mapping({field.name: getattr(x, field.name) for field in dataclasses.fields(x)})
    return escape(str(x))


@outline.register(np.ndarray)
@outline.register(np.generic)
@outline.register(jax.ShapeDtypeStruct)
def _array(x: Any) -> str:
    return f"[dim]{x.dtype}[/dim][{','.join(map(str, x.shape))}]"


@outline.register(Mapping)
def _mapping(x: Mapping) -> str:
    return "\n".join(_entry(key, value) for key, value in x.items()) or "{}"


@outline.register(State)
def _state(x: State) -> str:
    return _mapping(dict(x))


@outline.register(list)
@outline.register(tuple)
def _sequence(x: Any) -> str:
    return "\n".join("- " + outline(value).replace("\n", "\n  ") for value in x) or escape(str(x))


@outline.register(Pytree)
def _object(x: Pytree) -> str:
    return str(getattr(x, "__name__", type(x).__name__))


def _variable(x: Variable) -> str:
    (_, value), *metadata = x.__batiste_repr__().items
    return outline(dict(sorted([*metadata, ("value", value)]))) if metadata else outline(value)


def _entry(key: Any, value: Any) -> str:
    name, text = escape(str(key.value if isinstance(key, enum.Enum) else key)), outline(value)
    if isinstance(value, (list, tuple)) and value:
        return f"{name}:\n{text}"
    if "\n" in text or (isinstance(value, (Mapping, State)) and value):
        return f"{name}:\n  " + text.replace("\n", "\n  ")
    return f"{name}: {text}"
