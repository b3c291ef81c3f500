# SPDX-License-Identifier: Apache-2.0
"""A table of a module: the path, type, inputs and outputs of each call, its variables, and what the calls cost.

The module is initialised on shapes alone while an interceptor notes every call. Costs come from a second trace, of
`apply`, so that they hold nothing of the initialisers.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from batiste.debug.cost import flops, marked, region
from batiste.debug.table import NO_OPTIONS, Line, Style, draw, escape, outline
from batiste.graph.represent import Size

from .boxes import AxisMetadata, is_axis_metadata, unbox
from .calls import ALL_BUT_INTERMEDIATES
from .context import InterceptorContext, intercept_methods

if TYPE_CHECKING:
    from .module import Module

Path = tuple[str, ...]
Tree = dict[str, Any]
COLUMNS = ("path", "module", "inputs", "outputs")


@dataclasses.dataclass
class Row:
    """One call of a method.

    Args:
        module_copy: the module, unbound.
        module_variables: by collection, the variables of the module itself.
        counted_variables: by collection, those whose sizes stand in this row: also of parts that have no row.
        vjp_flops: the cost of the call and its gradient.
    """

    path: Path
    module_copy: Module
    method: str
    inputs: Any
    outputs: Any
    module_variables: dict[str, Tree]
    counted_variables: dict[str, Tree]
    flops: int = 0
    vjp_flops: int = 0

    def size_and_bytes(self, collections: Iterable[str]) -> dict[str, tuple[int, int]]:
        """By collection, the number of elements and of bytes that stand in this row."""
        sizes = {col: Size.of(self.counted_variables.get(col, {})) for col in collections}
        return {col: (size.elements, size.bytes) for col, size in sizes.items()}


class Table(list[Row]):
    """The rows of a module, and the collections that it has variables in."""

    def __init__(self, module: Module, collections: Iterable[str], rows: Iterable[Row]):
        super().__init__(rows)
        self.module = module
        self.collections = list(collections)


def tabulate(
    module: Module,
    rngs: Any,
    depth: int | None = None,
    show_repeated: bool = False,
    mutable: Any = ALL_BUT_INTERMEDIATES,
    console_kwargs: Mapping[str, Any] | None = None,
    table_kwargs: Mapping[str, Any] = NO_OPTIONS,
    column_kwargs: Mapping[str, Any] = NO_OPTIONS,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **kwargs: Any,
) -> Callable[..., str]:
    """`f(*args)`, which gives a table of the calls that `module.init(rngs, *args)` makes, as text.

    Args:
        depth: how many levels of submodules are shown; None shows all. What is hidden counts in the row above it.
        show_repeated: a module that is called again has another row.
        console_kwargs, table_kwargs, column_kwargs: options of rich's `Console`, `Table` and `Table.add_column`.
        compute_flops: adds a column with the floating-point operations of each call, by XLA's cost analysis.
        compute_vjp_flops: adds a column with those of the call and its gradient.
        kwargs: of `init`, such as `method`, and of the method that is called.
    """
    table_of = _get_module_table(module, depth, show_repeated, compute_flops, compute_vjp_flops)
    columns = list(COLUMNS) + ["flops"] * compute_flops + ["vjp_flops"] * compute_vjp_flops

    def text(*args: Any, **call_kwargs: Any) -> str:
        table = table_of(rngs, *args, **{"mutable": mutable, **kwargs, **call_kwargs})
        lines = [_line(row, columns[len(COLUMNS) :]) for row in table]
        totals = {col: sum((line.sizes[col] for line in lines), Size()) for col in table.collections}
        style = Style(table_kwargs, column_kwargs, console_kwargs or {})
        return f"\n{draw(f'{type(module).__name__} Summary', columns, lines, totals, style)}\n"

    return text


def _line(row: Row, costs: Iterable[str]) -> Line:
    name = type(row.module_copy).__name__
    called = name if row.method == "__call__" else f"{name} ({row.method})"
    cells = [escape("/".join(row.path)), called, outline(row.inputs) if row.inputs != () else "", outline(row.outputs)]
    sizes = collections.defaultdict(Size, {col: Size.of(tree) for col, tree in row.counted_variables.items()})
    return Line([*cells, *(str(getattr(row, cost)) for cost in costs)], row.module_variables, sizes)


def _get_module_table(
    module: Module, depth: int | None, show_repeated: bool, compute_flops: bool, compute_vjp_flops: bool
) -> Callable[..., Table]:
    """`f(rngs, *args, **kwargs)`, which gives a row for each call that `module.init` makes. As `tabulate`."""

    def table_of(rngs: Any, *args: Any, mutable: Any = ALL_BUT_INTERMEDIATES, **kwargs: Any) -> Table:
        calls, variables = _initialised(module, rngs, args, kwargs, mutable)
        paths = {call.path for call in calls}
        shown = {path for path in paths if depth is None or len(path) <= depth}
        seen: set[Path] = set()
        rows: dict[int, Row] = {}
        for number, call in enumerate(calls):
            if call.path in shown and (show_repeated or call.path not in seen):
                first = call.path not in seen
                own = _variables_at(call.path, variables, paths) if first else {}
                counted = _variables_at(call.path, variables, shown) if first else {}
                rows[number] = Row(call.path, call.module, call.method, call.inputs, call.outputs, own, counted)
                seen.add(call.path)
        if compute_flops or compute_vjp_flops:
            parts = _parts(module, variables, rngs, args, kwargs, calls)
            for number, row in rows.items():
                if (part := parts.get(number)) is not None:
                    row.flops = flops(part) if compute_flops else 0
                    if compute_vjp_flops:  # each gradient is added into its place
                        trained = _variables_at(row.path, variables, {row.path}).get("params", {})
                        row.vjp_flops = flops(part, backward=True) + Size.of(trained).elements
        return Table(module, sorted(variables), rows.values())

    return table_of


# ---------------------------------------------------------------- calling the module, watched


@dataclasses.dataclass
class _Call:
    path: Path
    module: Module
    method: str
    inputs: Any
    outputs: Any = None

    @property
    def kind(self) -> tuple[Path, str]:
        return self.path, self.method


def _initialised(
    module: Module, rngs: Any, args: tuple, kwargs: Tree, mutable: Any
) -> tuple[list[_Call], dict[str, Tree]]:
    """The calls that `init` makes, in their order, and the shapes of the variables."""
    calls: list[_Call] = []
    made: dict[str, Tree] = {}

    def note(next_fun: Callable, args: tuple, kwargs: Tree, context: InterceptorContext) -> Any:
        if context.method_name == "setup":
            return next_fun(*args, **kwargs)
        module = context.module
        copy = module.clone(_reset_names=True)
        call = _Call(module.path, copy, context.method_name, _abstract(_one_or_all(args, kwargs)))
        calls.append(call)
        output = next_fun(*args, **kwargs)
        call.outputs = _abstract(output)
        return output

    def init(args: tuple, kwargs: Tree) -> None:
        variables = module.init(rngs, *args, mutable=mutable, **kwargs)
        made.update(_abstract(variables, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)))

    with intercept_methods(note):
        _traced(init, args, kwargs)
    return calls, made


def _one_or_all(args: tuple, kwargs: Tree) -> Any:
    """The arguments as a table shows them: a single one by itself."""
    inputs = (*args, kwargs) if kwargs else args
    return inputs[0] if len(inputs) == 1 else inputs


def _abstract(tree: Any, types: Any = jax.Array) -> Any:
    """`tree` with shape and dtype in place of each leaf of these types."""

    def shape_of(x: Any) -> Any:
        return jax.ShapeDtypeStruct(jax.typeof(x).shape, jax.typeof(x).dtype) if isinstance(x, types) else x

    return jax.tree.map(shape_of, tree)


def _traced(f: Callable[..., Any], *args: Any) -> Any:
    """The jaxpr of `f(*args)`, where arrays of which the shape is known only are its inputs."""
    leaves, structure = jax.tree.flatten(args)
    is_input = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]

    def of_inputs(*inputs: Any) -> None:
        rest = iter(inputs)
        f(*jax.tree.unflatten(structure, [next(rest) if given else x for given, x in zip(is_input, leaves)]))

    return jax.make_jaxpr(of_inputs)(*(x for given, x in zip(is_input, leaves) if given)).jaxpr


def _parts(
    module: Module, variables: dict[str, Tree], rngs: Any, args: tuple, kwargs: Tree, calls: list[_Call]
) -> dict[int, Any]:
    """The traced computation of each call, by its number, where `apply` makes the same call as `init`."""
    tags: dict[tuple[Path, str], list[str]] = collections.defaultdict(list)
    numbers = iter(range(1 << 30))

    def mark(next_fun: Callable, args: tuple, kwargs: Tree, context: InterceptorContext) -> Any:
        if context.method_name == "setup":
            return next_fun(*args, **kwargs)
        tag = f"call_{next(numbers)}"
        tags[context.module.path, context.method_name].append(tag)
        return marked(tag, lambda: next_fun(*args, **kwargs), is_leaf=is_axis_metadata)

    def apply(variables: dict[str, Tree], args: tuple, kwargs: Tree) -> None:
        module.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)

    with intercept_methods(mark):
        jaxpr = _traced(apply, variables, args, kwargs)
    parts = {kind: iter([region(jaxpr, tag) for tag in tagged]) for kind, tagged in tags.items()}
    return {number: next(parts.get(call.kind, iter(())), None) for number, call in enumerate(calls)}


# ---------------------------------------------------------------- variables of a path


def _variables_at(path: Path, variables: dict[str, Tree], rows: set[Path]) -> dict[str, Tree]:
    """By collection, the variables below a path but those that are below another path of `rows`."""
    below = {row[len(path) :] for row in rows if len(row) > len(path) and row[: len(path)] == path}
    trees = ((col, _pruned(_subtree(tree, path), below)) for col, tree in variables.items())
    return {col: tree for col, tree in trees if tree}


def _subtree(tree: Any, path: Path) -> Mapping[str, Any]:
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
    return tree


def _pruned(tree: Mapping[str, Any], without: set[Path]) -> Tree:
    return dict(_kept(tree, without))


def _kept(tree: Mapping[str, Any], without: set[Path]) -> Iterator[tuple[str, Any]]:
    for key, value in sorted(tree.items()):
        if (key,) in without:
            continue
        inner = {path[1:] for path in without if path[0] == key}
        kept = _pruned(value, inner) if inner and isinstance(value, Mapping) else value
        if not isinstance(kept, Mapping) or kept:
            yield key, kept


@outline.register(AxisMetadata)
def _box(box: Any) -> str:
    names = getattr(box, "names", None)
    axes = f" [dim]P[/dim]{escape(str(tuple(names)).replace(chr(39), ''))}" if names is not None else ""
    return outline(unbox(box)) + axes
