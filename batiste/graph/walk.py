# SPDX-License-Identifier: Apache-2.0
"""Walks over a model: iterate, map, find, and change settings or metadata everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from . import errors
from .errors import AliasError, StructureError
from .filters import Filter, to_predicate
from .flatten import duplicate_error, flatten_graph, is_graph_node, iter_parts, no_tree_error
from .jaxcompat import key_name, one_level
from .modes import graph_mode
from .pytree import Pytree, sorted_names
from .states import State, key_order
from .structure import show_path
from .unflatten import unflatten_graph
from .variable import Variable

A = TypeVar("A")
Path = tuple[Any, ...]


# ---------------------------------------------------------------- children
def node_items(x: Any) -> list[tuple[Any, Any]] | None:
    """The `(key, value)` pairs of a graph object or pytree node, settings included; None for a leaf."""
    if isinstance(x, Variable):
        return None
    if isinstance(x, Pytree):
        int_keys = x._pytree__has_int_keys
        return [(int(k) if int_keys and k.isdigit() else k, x.__dict__[k]) for k in sorted_names(x)]
    if isinstance(x, (dict, State)):
        mapping = x._mapping if isinstance(x, State) else x
        return [(k, mapping[k]) for k in sorted(mapping, key=key_order)]
    if type(x) in (list, tuple):
        return list(enumerate(x))
    if x is None or isinstance(x, (str, int, float, jax.Array)):
        return None
    level = one_level(x)
    return None if level is None else [(key_name(path[-1]), child) for path, child in level[0]]


def data_items(x: Any) -> list[tuple[Any, Any]] | None:
    """Like `node_items`, for a tree: the data of an object alone."""
    items = node_items(x)
    if isinstance(x, Pytree) and type(x)._pytree__is_pytree:
        nodes = x._pytree__nodes
        items = [(k, v) for k, v in items or () if nodes.get(str(k))]
    return items


def _items(x: Any, path: Path, graph: bool, what: str) -> list[tuple[Any, Any]] | None:
    """What is directly inside an object of a graph, or of a tree."""
    if graph:
        return node_items(x)
    if isinstance(x, Pytree) and not type(x)._pytree__is_pytree:
        raise no_tree_error(x, path, what)
    return data_items(x)


def iter_graph(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Path, Any]]:
    """All `(path, value)` of an object, children first; an object or container that is shared comes once.

    Raises:
        AliasError: with `graph=False`, a Variable that is found at two paths, or a cycle.
    """
    as_graph = graph_mode(graph)
    seen: dict[int, Path] = {}
    open_: set[int] = set()

    above: list[tuple[Any, Path, Iterator[tuple[Any, Any]]]] = []  # what is being gone through; no calls in each other

    def enter(x: Any, path: Path) -> None:
        items = _items(x, path, as_graph, "iter_graph")
        once = (
            is_graph_node(x) or items is not None
            if as_graph
            else id(x) in open_ or (is_graph_node(x) and items is None)
        )
        if once and id(x) in seen:
            if as_graph:
                return
            raise duplicate_error(x, [seen[id(x)], path], "")
        seen[id(x)] = path
        open_.add(id(x))
        above.append((x, path, iter(items or ())))

    def visit() -> Iterator[tuple[Path, Any]]:
        enter(node, ())
        while above:
            x, path, parts = above[-1]
            part = next(parts, None)
            if part is not None:
                enter(part[1], (*path, part[0]))
                continue
            above.pop()
            open_.discard(id(x))
            yield path, x

    return visit()


def iter_children(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Any, Any]]:
    """The direct children of an object that are modules, Variables or Refs, as `(key, child)`.

    Raises:
        StructureError: it is a leaf.
    """
    as_graph = graph_mode(graph)
    items = _items(node, (), as_graph, "iter_children")
    if items is None:
        raise StructureError(f"Expected a {'graph' if as_graph else 'pytree'} node, got {type(node).__name__}",
                             fix="pass a module or a container")  # fmt: skip
    return ((key, value) for key, value in items if is_graph_node(value))


# ---------------------------------------------------------------- maps
def recursive_map(f: Callable[[Path, Any], Any], node: Any, /, *, graph: bool | None = None) -> Any:
    """Rebuilds an object, children first, with `f(path, x)` in the place of every node and leaf."""
    return rebuilt(f, node, graph_mode(graph))


def rebuilt(f: Callable[[Path, Any], Any], node: Any, as_graph: bool, once: bool = True) -> Any:
    """As `recursive_map`; with `once=False`, `f` is asked for a shared Variable on each path to it."""
    done: dict[int, tuple[Any, Path]] = {}

    def visit(x: Any, path: Path) -> Any:
        if is_graph_node(x) and id(x) in done and (once or not isinstance(x, Variable)):
            if not as_graph:
                raise duplicate_error(x, [done[id(x)][1], path], "")
            return done[id(x)][0]
        new = x
        if isinstance(x, Pytree):
            new = x.__copy__()
            done[id(x)] = new, path
            items = data_items(x) if as_graph else _items(x, path, False, "recursive_map")
            for key, value in items or ():
                vars(new)[str(key)] = visit(value, (*path, key))
        elif not is_graph_node(x) and (items := node_items(x)) is not None:
            children = [visit(value, (*path, key)) for key, value in items]
            if any(a is not b for a, (_, b) in zip(children, items)):
                new = _rebuild(x, [key for key, _ in items], children)
        result = f(path, new)
        if is_graph_node(x):
            done[id(x)] = result, path
        return result

    return visit(node, ())


def _rebuild(x: Any, keys: list[Any], children: list[Any]) -> Any:
    if isinstance(x, (dict, State)):
        return type(x)(dict(zip(keys, children)))
    if type(x) in (list, tuple):
        return type(x)(children)
    return jax.tree.unflatten(one_level(x)[1], children)  # type: ignore[index]


def map(
    f: Callable[[Path, Any], Any], node: Any, /, *, graph: bool | None = None, recreate_variables: bool = True
) -> Any:
    """A new object with `f(path, leaf)` in the place of each leaf: a Variable, or a bare array.

    Args:
        recreate_variables: a plain value that comes for a Variable gets a new Variable around it.
    """
    flat = flatten_graph(node, graph=graph_mode(graph))
    leaves = [f(path, x) for path, x in zip(flat.paths, flat.leaves)]
    return unflatten_graph(flat.graphdef.root, leaves, recreate=recreate_variables)[0]


def as_pure(tree: Any) -> Any:
    """The tree with every Variable replaced by its value."""
    return jax.tree.map(
        lambda x: x.get_value() if isinstance(x, Variable) else x, tree, is_leaf=lambda x: isinstance(x, Variable)
    )


def pure(tree: Any) -> Any:
    """Deprecated name of `as_pure`."""
    warnings.warn("'pure' is deprecated, use 'as_pure' instead.", DeprecationWarning, stacklevel=2)
    return as_pure(tree)


# ---------------------------------------------------------------- finding and changing
def find_duplicates(node: Any, /, *, only: Filter = ...) -> list[list[Path]]:
    """The groups of paths that lead to one and the same object, for the objects that `only` matches."""
    predicate = to_predicate(only)
    paths: dict[int, list[Path]] = {}
    keep: list[Any] = []  # temporaries must not share an id

    def visit(x: Any, path: Path) -> None:
        if is_graph_node(x):
            known = id(x) in paths
            if predicate(path, x):
                paths.setdefault(id(x), []).append(path)
            elif known:
                return
            if known or id(x) in entered:
                return
            entered.add(id(x))
        keep.append(x)
        for key, value in data_items(x) or ():
            visit(value, (*path, key))

    entered: set[int] = set()
    visit(node, ())
    return [group for group in paths.values() if len(group) > 1]


def set_metadata(node: Any, /, *, only: Filter = Variable, **metadata: Any) -> None:
    """Sets metadata on the Variables of an object that `only` matches, in place."""
    predicate = to_predicate(only)
    for path, x in iter_graph(node, graph=True):
        if isinstance(x, Variable) and predicate(path, x):
            x.set_metadata(**metadata)


def with_vars(node: A, /, *, hijax: bool | None = None, ref: bool | None = None, mutable: bool | None = None,
              only: Filter = ..., allow_duplicates: bool = False) -> A:  # fmt: skip
    """An object whose Variables are backed in another way; those that `only` leaves out, or that are so already, stay.

    Args:
        hijax, ref: the backing; None leaves it as it is.
        mutable: False makes hijax Variables values, which cannot be written and can be differentiated.
        allow_duplicates: a Variable that is changed may stand at several places.

    >>> import jax.numpy as jnp
    >>> with_vars({"w": Variable(jnp.ones(2))}, ref=True)["w"].ref
    True

    Raises:
        AliasError: a Variable to be changed stands at several places.
    """
    changes = {name: x for name, x in (("hijax", hijax), ("ref", ref), ("mutable", mutable)) if x is not None}
    predicate = to_predicate(only)

    def differs(path: Path, x: Any) -> bool:
        return (
            isinstance(x, Variable)
            and predicate(path, x)
            and any(x.get_metadata(k, k == "mutable") != v for k, v in changes.items())
        )

    if not allow_duplicates and (groups := find_duplicates(node, only=differs)):
        places = "\n".join("  ---\n" + "\n".join(f"  {show_path(path)}" for path in group) for group in groups)
        raise AliasError(
            f"Found duplicate at paths:\n{places}\n  ---\n",
            fix="pass allow_duplicates=True, or exclude them with `only`",
        )
    return map(lambda path, x: x.replace(**changes) if differs(path, x) else x, node, graph=True)


def vars_as(node: A, /, *, hijax: bool | None = None, ref: bool | None = None, mutable: bool | None = None,
            only: Filter = ..., allow_duplicates: bool = False) -> A:  # fmt: skip
    """Deprecated name of `with_vars`."""
    warnings.warn("'vars_as' is deprecated, use 'with_vars' instead.", DeprecationWarning, stacklevel=2)
    return with_vars(node, hijax=hijax, ref=ref, mutable=mutable, only=only, allow_duplicates=allow_duplicates)


# ---------------------------------------------------------------- where a module is, for error messages
def _locate(candidates: list[Any], target: Any) -> str | None:
    """The path from the first of the candidates that reaches `target`, or None."""
    for root in candidates:
        if not isinstance(root, Pytree) or root is target:
            continue
        done = {id(root)}
        todo: list[tuple[Path, Pytree]] = [((), root)]
        while todo:
            path, x = todo.pop()
            for name, value in x.__dict__.items():
                for keys, part in iter_parts(value):
                    here = (*path, name, *keys)
                    if part is target:
                        return "/".join(str(k) for k in here)
                    if isinstance(part, Pytree) and id(part) not in done:
                        done.add(id(part))
                        todo.append((here, part))
    return None


errors._locators.append(_locate)
