# SPDX-License-Identifier: Apache-2.0
"""A table of a model: the path, type, inputs and outputs of each part, its Variables by kind, and what a call costs.

The model is called once, on shapes alone, while the methods of its classes report their calls; nothing of it changes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph import (
    Dict,
    List,
    Module,
    Object,
    Pytree,
    RngStream,
    State,
    Variable,
    as_pure,
    iter_graph,
    merge,
    split,
)
from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need
from batiste.graph.represent import Size, sizes_by_kind

from .show import in_ipython

__all__ = ["CallInfo", "filter_rng_streams", "tabulate"]

Path = tuple[Any, ...]
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
BASES = (Pytree, Object, Module, List, Dict)  # their methods are those of all models, and are not reported
EXTRA = "display"


@dataclass(frozen=True)
class CallInfo:
    """One row: the first call of an object. Texts carry rich's markup."""

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
    parts = {path: x for path, x in iter_graph(obj, graph=True) if isinstance(x, Pytree)}
    if callable(getattr(obj, method, None)):
        calls = _calls(obj, method, input_args, input_kwargs, compute_flops, compute_vjp_flops)
    elif method != "__call__" or input_args or input_kwargs:
        raise ArgumentError(
            f"{type(obj).__name__} has no method {method!r} to call",
            fix="pass method=, or no arguments to list its parts",
        )
    else:
        calls = {
            path: CallInfo(i, id(parts[path]), type(parts[path]), path, "", "") for i, path in enumerate(_listed(parts))
        }
    rows = [
        (call, parts[path])
        for path, call in calls.items()
        if path in parts and (depth is None or len(path) <= depth) and row_filter(call)
    ]
    columns = ["path", "type", "inputs", "outputs"] + ["flops"] * compute_flops + ["vjp_flops"] * compute_vjp_flops
    return _render(obj, columns, rows, table_kwargs, column_kwargs, console_kwargs)


def _listed(parts: Mapping[Path, Any]) -> list[Path]:
    """The paths of all parts but containers, parents first."""
    paths = [path for path, part in parts.items() if not path or not isinstance(part, (List, Dict))]
    return sorted(paths, key=lambda path: tuple(map(str, path)))


# ---------------------------------------------------------------- calling the model, watched


@dataclass
class _Call:
    """A call that was seen: of what, and what is needed to repeat it."""

    order: int
    part: Any
    name: str
    repeat: Callable[..., Any] | None
    inputs: str
    outputs: str = ""


def _calls(
    obj: Any, method: str, args: tuple, kwargs: dict[str, Any], flops: bool, vjp_flops: bool
) -> dict[Path, CallInfo]:
    """The first call of each part, by its path, in the order of the calls."""
    graphdef, leaves = _values_of((obj, args, kwargs))
    seen: dict[Path, _Call] = {}

    def watched(leaves):
        copy, args, kwargs = merge(graphdef, leaves)
        paths = {id(x): path for path, x in iter_graph(copy, graph=True) if isinstance(x, Pytree)}

        def report(part: Any, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            path = paths.get(id(part))
            if path is None or path in seen:
                return function(part, *args, **kwargs)
            repeat = _repeatable(function, part, args, kwargs) if flops or vjp_flops else None
            call = seen[path] = _Call(len(seen), part, name, repeat, _inputs_text(args, kwargs))
            output = function(part, *args, **kwargs)
            call.outputs = _outline(output)
            return output

        with _watching({type(x) for _, x in iter_graph(copy, graph=True) if isinstance(x, Pytree)}, report):
            getattr(copy, method)(*args, **kwargs)

    jax.eval_shape(watched, leaves)
    return {
        path: CallInfo(
            call_order=call.order,
            object_id=id(call.part),
            type=type(call.part),
            path=path if call.name == "__call__" else (*path, call.name),
            inputs_repr=call.inputs,
            outputs=call.outputs,
            flops=call.repeat(backward=False) if call.repeat and flops else None,
            vjp_flops=call.repeat(backward=True) if call.repeat and vjp_flops else None,
        )
        for path, call in seen.items()
    }


_patching = threading.Lock()


@contextlib.contextmanager
def _watching(types: set[type], report: Callable) -> Iterator[None]:
    """For a while the public methods of the classes go through `report(self, name, function, args, kwargs)`."""
    originals: list[tuple[type, str, Any]] = []
    with _patching:
        try:
            for cls in {base for t in types for base in t.__mro__}:
                for name, function in list(vars(cls).items()):
                    if _is_reported(cls, name, function):
                        originals.append((cls, name, function))
                        setattr(cls, name, _reporting(name, function, report))
            yield
        finally:
            for cls, name, function in originals:
                setattr(cls, name, function)


def _is_reported(cls: type, name: str, function: Any) -> bool:
    if cls in BASES or not issubclass(cls, Pytree) or isinstance(function, (type, staticmethod, classmethod, property)):
        return False
    return callable(function) and hasattr(function, "__get__") and (name == "__call__" or not name.startswith("_"))


def _reporting(name: str, function: Any, report: Callable) -> Callable:
    def method(self, *args, **kwargs):
        return report(self, name, _unbound(function), args, kwargs)

    return functools.update_wrapper(method, function)


def _unbound(function: Any) -> Callable:
    if inspect.isfunction(function):
        return function
    return lambda self, *args, **kwargs: function.__get__(self, type(self))(*args, **kwargs)


# ---------------------------------------------------------------- what a call costs


def _repeatable(function: Callable, part: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[..., int]:
    """A function that lowers the call anew, alone, and asks XLA for its cost."""
    graphdef, leaves = _values_of((part, args, kwargs))
    values, treedef = jax.tree.flatten(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), leaves)
    )

    def forward(values: list[Any]) -> list[Any]:
        part, args, kwargs = merge(graphdef, treedef.unflatten(values))
        return [x for x in jax.tree.leaves(function(part, *args, **kwargs)) if hasattr(x, "dtype")]

    def forward_and_backward(values: list[Any]) -> Any:
        chosen = [i for i, x in enumerate(values) if _is_inexact(x)]

        def of_chosen(some):
            replaced = dict(zip(chosen, some))
            return [y for y in forward([replaced.get(i, x) for i, x in enumerate(values)]) if _is_inexact(y)]

        outputs, pullback = jax.vjp(of_chosen, [values[i] for i in chosen])
        return outputs, pullback([jnp.ones_like(x) for x in outputs])

    def repeat(backward: bool) -> int:
        cost = jax.jit(forward_and_backward if backward else forward).lower(values).cost_analysis() or {}
        return int(cost.get("flops", 0))  # type: ignore[union-attr]

    return repeat


def _values_of(x: Any) -> tuple[Any, Any]:
    """The structure of any objects, and the values of their leaves alone."""
    graphdef, leaves = split(x, graph=True)
    return graphdef, as_pure(leaves)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


# ---------------------------------------------------------------- texts


def _inputs_text(args: tuple, kwargs: dict[str, Any]) -> str:
    if len(args) == 1 and not kwargs:
        return _outline(args[0])
    return "\n".join(_outline(x) for x in (list(args), kwargs) if x)


def _outline(x: Any) -> str:
    """A value as an outline: arrays as `dtype[shape]`, one line each, nested containers indented."""
    if isinstance(x, Variable):
        return _variable_text(x)
    if isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return f"[dim]{x.dtype}[/dim][{','.join(map(str, x.shape))}]"
    if isinstance(x, State):
        x = dict(x)
    if isinstance(x, dict) and x:
        return "\n".join(_entry(key, value) for key, value in x.items())
    if isinstance(x, (list, tuple)) and x:
        return "\n".join("- " + _outline(value).replace("\n", "\n  ") for value in x)
    if isinstance(x, Pytree) or inspect.isroutine(x) or isinstance(x, type):
        return str(getattr(x, "__name__", type(x).__name__))
    return "" if x is None else _escape(str(x))


def _entry(key: Any, value: Any) -> str:
    name, text = _escape(str(key)), _outline(value)
    if isinstance(value, (list, tuple)) and value:
        return f"{name}:\n{text}"
    if "\n" in text or (isinstance(value, (dict, State)) and value):
        return f"{name}:\n  " + text.replace("\n", "\n  ")
    return f"{name}: {text}"


def _variable_text(variable: Variable) -> str:
    (_, value), *metadata = variable.__batiste_repr__().items
    return _outline(dict(sorted([*metadata, ("value", value)]))) if metadata else _outline(value)


def _escape(text: str) -> str:
    return need("rich.markup", extra=EXTRA).escape(text)


def _size_text(size: Size) -> str:
    elements, rest = str(size).split(" ", 1)
    return f"{elements} [dim]{rest}[/dim]"


# ---------------------------------------------------------------- the table


def _own_variables(part: Any) -> dict[str, dict[str, Variable]]:
    """The Variables of a part itself, and of lists and dicts in it, by kind and then by path."""
    owners: set[Path] = set()
    found: list[tuple[Path, Variable]] = []
    for path, x in iter_graph(part, graph=True):
        if isinstance(x, Variable):
            if _outline(x):
                found.append((path, x))
        elif path and isinstance(x, Pytree) and not isinstance(x, (List, Dict)):
            owners.add(path)
    own: dict[str, dict[str, Variable]] = {}
    for path, x in found:
        if not any(path[:n] in owners for n in range(1, len(path))):
            own.setdefault(x.__batiste_repr__().kind or "", {})["/".join(map(str, path))] = x
    return own


def _render(
    obj: Any,
    columns: list[str],
    rows: list[tuple[CallInfo, Any]],
    table_kwargs: Mapping[str, Any],
    column_kwargs: Mapping[str, Any],
    console_kwargs: Mapping[str, Any],
) -> str:
    totals = dict(sorted(sizes_by_kind(obj).items()))
    table = need("rich.table", extra=EXTRA).Table(
        **{
            "title": f"{type(obj).__name__} Summary",
            "show_header": True,
            "show_lines": True,
            "show_footer": True,
            **table_kwargs,
        }
    )
    text = need("rich.text", extra=EXTRA).Text
    for column in columns[:-1]:
        table.add_column(column, **column_kwargs)
    table.add_column(columns[-1], **{"footer": text("Total", justify="right"), **column_kwargs})
    for kind, size in totals.items():
        table.add_column(kind, **{"footer": f"[bold]{_size_text(size)}[/bold]", **column_kwargs})
    for call, part in rows:
        sizes, own = sizes_by_kind(part), _own_variables(part)
        costs = {"flops": call.flops, "vjp_flops": call.vjp_flops}
        cells = [_escape("/".join(map(str, call.path))), call.type.__name__, call.inputs_repr, call.outputs]
        cells += [str(costs[column]) for column in columns[4:]]
        for kind in totals:
            listed = _outline(own[kind]) + "\n\n" if kind in own else ""
            cells.append(listed + (f"[bold]{_size_text(sizes[kind])}[/bold]" if kind in sizes else ""))
        table.add_row(*cells)
    table.caption_style = "bold"
    table.caption = f"\nTotal Parameters: {_size_text(sum(totals.values(), Size()))}"
    console = need("rich.console", extra=EXTRA).Console(
        **{"force_terminal": True, "force_jupyter": in_ipython(), **console_kwargs}
    )
    with console.capture() as capture:
        console.print(table)
    return capture.get()
