# SPDX-License-Identifier: Apache-2.0
"""Passing objects by hand: several objects cut and put together under one numbering, and trees of them as pytrees.

    flatten, unflatten             one object; `RefMap` and `IndexMap` are the numbering, from object to number and back
    split_context, merge_context   several objects that may share parts
    update_context                 the same there and back: what changed inside is written into the objects outside
    to_tree, from_tree             a whole tree of objects to a pytree of `NodeStates`, and back

The transforms of this library do all this through a `Boundary`; these functions are for transforms of one's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import jax

from .boundary import aim, broadcast, is_root, walk_tree
from .errors import ArgumentError
from .filters import Filter
from .flatten import ANY, Flat, Walk, is_graph_node
from .jaxcompat import is_ref
from .modes import graph_mode
from .split import cut, leaves_of
from .states import FlatState, State
from .structure import GraphDef
from .unflatten import UNCHANGED, Build
from .variable import MISSING, Variable

__all__ = [
    "ArrayRefOutput", "IndexMap", "MergeContext", "NodeStates", "RefMap", "SplitContext", "UpdateContext",
    "current_update_context", "default_split_fn", "flatten", "from_tree", "is_tree_node", "merge_context",
    "merge_tree_node", "split_context", "to_tree", "unflatten", "update_context",
]  # fmt: skip


# ---------------------------------------------------------------- the numbering
class IndexMap(dict[int, Any]):
    """number -> object"""

    @classmethod
    def from_refmap(cls, refmap: RefMap) -> IndexMap:
        return cls((number, x) for x, number in refmap.items())


class RefMap(MutableMapping[Any, int]):
    """object -> number; objects are told apart by identity."""

    def __init__(self, mapping: Mapping[Any, int] | Iterable[tuple[Any, int]] | None = None, /):
        self._entries: dict[int, tuple[Any, int]] = {}
        self.update(mapping or ())

    @classmethod
    def from_indexmap(cls, indexmap: Mapping[int, Any]) -> RefMap:
        return cls((x, number) for number, x in indexmap.items())

    def __getitem__(self, x: Any) -> int:
        return self._entries[id(x)][1]

    def __setitem__(self, x: Any, number: int) -> None:
        self._entries[id(x)] = x, number

    def __delitem__(self, x: Any) -> None:
        del self._entries[id(x)]

    def __contains__(self, x: Any) -> bool:
        return id(x) in self._entries

    def __iter__(self) -> Iterator[Any]:
        return (x for x, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"RefMap({list(self._entries.values())})"


# ---------------------------------------------------------------- one object
def _flatten(node: Any, seen: RefMap, outer: RefMap | None, graph: bool | None) -> Flat:
    """Walks `node`: what is in `seen` was met before, what is in `outer` keeps that number; `seen` learns the rest."""
    walk = Walk(graph_mode(graph), known={id(x): number for x, number in (outer or {}).items()})
    walk.seen = {id(x): (number, (ANY, 0), ()) for x, number in seen.items()}
    walk.fresh = sum(outer is None or x not in outer for x in seen)
    aim(walk, ANY, ())
    flat = walk.finish(walk.value(node, ()))
    for number, x in flat.objects.items():
        seen[x] = number
    return flat


def flatten(node: Any, /, *, with_paths: bool = True, ref_index: RefMap | None = None,
            ref_outer_index: RefMap | None = None, graph: bool | None = None) -> tuple[GraphDef, Any]:  # fmt: skip
    """An object as `(graphdef, leaves)`: a FlatState of Variables and arrays, or without paths a list of plain values.

    Args:
        ref_index: objects that were met before, and their numbers; it learns the new ones.
        ref_outer_index: objects that have a number elsewhere, which they keep.
    """
    flat = _flatten(node, RefMap() if ref_index is None else ref_index, ref_outer_index, graph)
    return flat.graphdef, FlatState(zip(flat.paths, flat.leaves), sort=True) if with_paths else flat.values()


def unflatten(graphdef: GraphDef, state: State | FlatState | list[Any], /, *, index_ref: IndexMap | None = None,
              outer_index_outer_ref: IndexMap | None = None, copy_variables: bool = False,
              recreate_variables: bool = True) -> Any:  # fmt: skip
    """The inverse of `flatten`; Variables in the state become part of the object as they are.

    Args:
        index_ref: the objects that `graphdef` takes as met before, by number; it learns the new ones.
        outer_index_outer_ref: objects by number that are rebuilt in place.
    """
    leaves = state if isinstance(state, list) else leaves_of(graphdef, [state])
    if outer_index_outer_ref:
        leaves = [_stored(x) for x in leaves]
    return _unflatten(graphdef, leaves, index_ref, outer_index_outer_ref, copy_variables, recreate_variables)


def _unflatten(graphdef: GraphDef, leaves: list[Any], objects: IndexMap | None, reuse: IndexMap | None,
               copy: bool = False, recreate: bool = True) -> Any:  # fmt: skip
    build = Build(leaves, reuse or {}, copy, recreate)
    if objects is not None:
        build.objects = objects
    return build.value(graphdef.root)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ArrayRefOutput:
    """Stands in a state for a `jax.Ref` that was made inside of a transform, and cannot leave it."""

    value: jax.Array


def _outgoing(x: Any, stands_outside: bool) -> Any:
    """A leaf as it can leave a transform: no Ref, no hijax box. Of one that stands outside, nothing."""
    value = x._raw_value if isinstance(x, Variable) else x
    if not is_graph_node(value):
        return x
    if stands_outside:
        value = UNCHANGED
    elif is_ref(value):
        value = ArrayRefOutput(value[...])
    else:
        value = x.get_raw_value()
    return x.type._new(value, dict(x._var_metadata)) if isinstance(x, Variable) else value


def _stored(x: Any) -> Any:
    """What a leaf of a state brings into an object."""
    value = x._raw_value if isinstance(x, Variable) else x
    return jax.new_ref(value.value) if isinstance(value, ArrayRefOutput) else value


# ---------------------------------------------------------------- several objects
@dataclass
class SplitContext:
    """Cuts objects under one numbering: what they share is cut once."""

    ctxtag: Any
    ref_index: RefMap
    is_inner: bool | None

    def split(self, node: Any, *filters: Filter) -> tuple[Any, ...]:
        """Like `split`."""
        flat = self._walk(node)
        return flat.graphdef, *cut(self._pairs(flat), filters)

    def flatten(self, node: Any, *filters: Filter, with_paths: bool = True) -> tuple[Any, ...]:
        """Like `split`, with FlatStates, or without paths a list of plain values.

        Raises:
            ArgumentError: filters need paths.
        """
        if filters and not with_paths:
            raise ArgumentError("Cannot use filters with with_paths=False", fix="leave one of them out")
        flat = self._walk(node)
        if not with_paths:
            return flat.graphdef, [_stored(x) for _, x in self._pairs(flat)]
        return flat.graphdef, *cut(self._pairs(flat), filters, lambda pairs: FlatState(pairs, sort=True))

    @property
    def _outer(self) -> RefMap | None:
        return current_update_context(self.ctxtag).inner_ref_outer_index if self.is_inner else None

    def _walk(self, node: Any) -> Flat:
        return _flatten(node, self.ref_index, self._outer, None)

    def _pairs(self, flat: Flat) -> list[tuple[Any, Any]]:
        outer = self._outer
        leaves = flat.leaves if outer is None else [_outgoing(x, x in outer) for x in flat.leaves]
        return list(zip(flat.paths, leaves))


@dataclass
class MergeContext:
    """Puts objects together that were cut under one numbering."""

    ctxtag: Any
    index_ref: IndexMap
    is_inner: bool | None

    def merge(self, graphdef: GraphDef, state: Any, /, *states: Any) -> Any:
        """Like `merge`, with new Variables."""
        return self._build(graphdef, leaves_of(graphdef, (state, *states)))

    def unflatten(self, graphdef: GraphDef, flat_state: FlatState | list[Any], /, *flat_states: FlatState) -> Any:
        """Like `merge`, from what `flatten` gave."""
        return self._build(
            graphdef, flat_state if isinstance(flat_state, list) else leaves_of(graphdef, (flat_state, *flat_states))
        )

    def _build(self, graphdef: GraphDef, leaves: list[Any]) -> Any:
        live = self.ctxtag is not None and not self.is_inner
        reuse = current_update_context(self.ctxtag).outer_index_outer_ref if live else None
        return _unflatten(graphdef, [_stored(x) for x in leaves], self.index_ref, reuse)


@contextmanager
def split_context(ctxtag: Any = None) -> Iterator[SplitContext]:
    """`with split_context() as c:` cuts several objects with `c.split`; a tag joins it to an `update_context`."""
    update = None if ctxtag is None else current_update_context(ctxtag)
    context = SplitContext(ctxtag, RefMap(), None if update is None else update.inner_ref_outer_index is not None)
    yield context
    if update is not None:
        update.was_split(context.ref_index)
    vars(context).clear()  # a closed context holds no object


@contextmanager
def merge_context(ctxtag: Any = None, inner: bool | None = None) -> Iterator[MergeContext]:
    """`with merge_context() as c:` puts objects together with `c.merge`.

    Args:
        inner: under a tag, whether this is the merge inside the transform.

    Raises:
        ArgumentError: a tag was given without `inner`.
    """
    if ctxtag is not None and inner is None:
        raise ArgumentError(
            "inner_merge must be specified when using ctxtag", fix="pass inner=True inside the transform, else False"
        )
    update = None if ctxtag is None else current_update_context(ctxtag)
    context = MergeContext(ctxtag, IndexMap(), inner)
    yield context
    if update is not None and inner:
        update.was_merged(context.index_ref)
    vars(context).clear()


# ---------------------------------------------------------------- there and back
@dataclass
class UpdateContext:
    """The objects outside of a transform and their copies inside, by the numbers of the first split."""

    tag: Any
    outer_ref_outer_index: RefMap | None = None
    outer_index_inner_ref: IndexMap | None = None
    outer_index_outer_ref: IndexMap | None = None
    inner_ref_outer_index: RefMap | None = None

    def was_split(self, refmap: RefMap) -> None:
        """Learns the objects outside; or forgets those inside, which were cut to travel back."""
        if self.inner_ref_outer_index is None:
            self.outer_ref_outer_index, self.outer_index_outer_ref = refmap, IndexMap.from_refmap(refmap)
        else:
            self.inner_ref_outer_index = self.outer_index_inner_ref = None

    def was_merged(self, indexmap: IndexMap) -> None:
        """Learns the objects inside."""
        self.inner_ref_outer_index, self.outer_index_inner_ref = RefMap.from_indexmap(indexmap), indexmap


class _Active(threading.local):
    """The update contexts of this thread, innermost last."""

    def __init__(self):
        self.stack: list[UpdateContext] = []


_active = _Active()


class _Updating(ContextDecorator):
    """What `update_context` returns: for a `with`, or as a decorator."""

    def __init__(self, tag: Any):
        self._tag = tag

    def __enter__(self) -> UpdateContext:
        _active.stack.append(UpdateContext(self._tag))
        return _active.stack[-1]

    def __exit__(self, *exception: object) -> None:
        context = _active.stack.pop()
        for name in set(vars(context)) - {"tag"}:
            delattr(context, name)


def update_context(tag: Any) -> _Updating:
    """Opens an `UpdateContext`, for a block or for the calls of the function it decorates.

    Objects go through four steps: split (outside), merge (inside), split (inside), merge (outside). The last writes
    into the objects of the first, structure and settings included:

    >>> from batiste.graph import Module
    >>> m = Module()
    >>> with update_context("example"):
    ...     with split_context("example") as outside:
    ...         parts = outside.split(m)
    ...     with merge_context("example", inner=True) as inside:
    ...         copy = inside.merge(*parts)
    ...     copy.itself = copy
    ...     with split_context("example") as inside:
    ...         parts = inside.split(copy)
    ...     with merge_context("example", inner=False) as outside:
    ...         outside.merge(*parts) is m
    True
    >>> m.itself is m
    True
    """
    return _Updating(tag)


def current_update_context(tag: Any) -> UpdateContext:
    """The innermost open context of this tag.

    Raises:
        ArgumentError: none is open.
    """
    for context in reversed(_active.stack):
        if context.tag == tag:
            return context
    raise ArgumentError(f"No update context found for tag {tag!r}", fix=f"open one with update_context({tag!r})")


# ---------------------------------------------------------------- trees of objects
@dataclass(frozen=True)
class NodeStates:
    """One object as a pytree: its GraphDef, States that together cover it, and metadata for the transform."""

    _graphdef: GraphDef | None
    states: tuple[Any, ...]
    metadata: Any

    @classmethod
    def from_split(cls, graphdef: GraphDef, state: Any, /, *states: Any, metadata: Any = None) -> Self:
        return cls(graphdef, (state, *states), metadata)

    @classmethod
    def from_states(cls, state: Any, *states: Any) -> Self:
        return cls(None, (state, *states), None)

    @classmethod
    def from_prefixes(cls, prefixes: Iterable[Any], /, *, metadata: Any = None) -> Self:
        return cls(None, tuple(prefixes), metadata)

    @property
    def graphdef(self) -> GraphDef:
        if self._graphdef is None:
            raise ArgumentError("No graphdef available", fix="make it with NodeStates.from_split")
        return self._graphdef

    @property
    def state(self) -> Any:
        if len(self.states) != 1:
            raise ArgumentError(f"Expected exactly one GraphDefState, got {len(self.states)}", fix="use .states")
        return self.states[0]

    def replace(self, **updates: Any) -> Self:
        return replace(self, **updates)


jax.tree_util.register_dataclass(NodeStates, ["_graphdef", "states"], ["metadata"])


def default_split_fn(ctx: SplitContext, path: Any, prefix: Any, leaf: Any) -> NodeStates:
    return NodeStates.from_split(*ctx.split(leaf))


def merge_tree_node(ctx: MergeContext, path: Any, prefix: Any, leaf: Any) -> Any:
    if not isinstance(leaf, NodeStates):
        raise ArgumentError(
            "merge_fn can only put NodeStates together", got=type(leaf).__name__, fix="pass a merge_fn of your own"
        )
    return ctx.merge(leaf.graphdef, *leaf.states)


def is_tree_node(x: Any) -> bool:
    return isinstance(x, NodeStates)


def to_tree(tree: Any, /, *, prefix: Any = MISSING,
            split_fn: Callable[[SplitContext, Any, Any, Any], Any] = default_split_fn,
            map_non_graph_nodes: bool = False, ctxtag: Any = None, check_aliasing: bool = True) -> Any:  # fmt: skip
    """The tree with `split_fn(context, path, prefix, x)`, by default a NodeStates, in the place of each object.

    Args:
        prefix: what stands for each leaf is handed to `split_fn`.
        map_non_graph_nodes: call `split_fn` for all other leaves too.
        check_aliasing: refuse one object under two prefixes.

    Raises:
        AliasError: see `check_aliasing`.
    """
    if prefix is not MISSING and check_aliasing:
        walk_tree(Walk(True, what="to_tree"), tree, broadcast(prefix, tree, "prefix"))
    with split_context(ctxtag) as context:
        return _map_leaves(tree, prefix, is_root, lambda *at: split_fn(context, *at), is_root, map_non_graph_nodes)


def from_tree(tree: Any, /, *, prefix: Any = MISSING,
              merge_fn: Callable[[MergeContext, Any, Any, Any], Any] = merge_tree_node,
              is_node_leaf: Callable[[Any], bool] = is_tree_node, is_leaf: Callable[[Any], bool] = is_tree_node,
              map_non_graph_nodes: bool = False, is_inner: bool | None = None, ctxtag: Any = None) -> Any:  # fmt: skip
    """The inverse of `to_tree`: `merge_fn(context, path, prefix, x)` for each leaf that `is_node_leaf` tells."""
    with merge_context(ctxtag, is_inner) as context:
        return _map_leaves(tree, prefix, is_leaf, lambda *at: merge_fn(context, *at), is_node_leaf, map_non_graph_nodes)


def _map_leaves(tree: Any, prefix: Any, is_leaf: Callable[[Any], bool], f: Callable[[Any, Any, Any], Any],
                is_node: Callable[[Any], bool], every: bool) -> Any:  # fmt: skip
    """The tree with `f(path, prefix, x)` in the place of its nodes, or of every leaf."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    specs = broadcast(prefix, tree, "prefix", is_leaf)
    return treedef.unflatten([f(path, spec, x) if every or is_node(x) else x for (path, x), spec in zip(pairs, specs)])
