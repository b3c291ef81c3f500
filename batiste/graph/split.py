# SPDX-License-Identifier: Apache-2.0
"""The functional API: an object is cut into a GraphDef and States by filters, put together again, updated in place."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from .errors import ArgumentError, StructureError
from .filters import Filter, to_predicates
from .fitting import check_fit, check_known
from .flatten import Flat, flatten_graph
from .jaxcompat import key_name
from .modes import graph_mode
from .pytree import ARRAYS, Pytree
from .states import FlatState, State, _not_exhaustive, _sort_out, from_flat_state, key_order
from .structure import GraphDef, show_path
from .unflatten import unflatten_graph
from .variable import Param, Variable
from .walk import iter_graph

A = TypeVar("A")
M = TypeVar("M")


def flatten_node(node: Any, graph: bool | None) -> Flat:
    """The traversal that the functions of this file start from."""
    return flatten_graph(node, graph=graph_mode(graph))


def _nest(pairs: Iterable[tuple[tuple, Any]]) -> Any:
    """A State of pairs; the root's own leaf stands for itself."""
    pairs = list(pairs)
    if len(pairs) == 1 and pairs[0][0] == ():
        return pairs[0][1]
    return from_flat_state(pairs)


def split(node: Any, *filters: Filter, graph: bool | None = None):
    """Cuts an object into `(graphdef, state)`, or with filters into `(graphdef, *states)`, one State per filter.

    Every leaf goes to the first filter that matches it. `merge` is the inverse.

    Raises:
        StructureError: a leaf is matched by no filter; end the list with `...`.
    """
    flat = flatten_node(node, graph)
    flat.graphdef.leaf_types = [getattr(x, "aval", None) for x in flat.values()]
    return flat.graphdef, *cut(zip(flat.paths, flat.leaves), filters)


def cut(
    pairs: Iterable[tuple[tuple, Any]], filters: Sequence[Filter], form: Callable[[list], Any] = _nest
) -> tuple[Any, ...]:
    """`form` of all pairs `(path, leaf)`; with filters, of the pairs that each is the first to match.

    Raises:
        StructureError: a leaf is matched by no filter.
    """
    if not filters:
        return (form(list(pairs)),)
    *found, rest = _sort_out(pairs, filters)
    if rest:
        raise _not_exhaustive(FlatState(rest, sort=True))
    return tuple(map(form, found))


def state(node: Any, *filters: Filter, graph: bool | None = None):
    """The State of an object, or one State per filter; what no filter matches is left out."""
    flat = flatten_node(node, graph)
    pairs = zip(flat.paths, flat.leaves)
    if not filters:
        return _nest(pairs)
    found = [_nest(p) for p in _sort_out(pairs, filters)[:-1]]
    return found[0] if len(found) == 1 else tuple(found)


variables = state


def graphdef(node: Any, /, *, graph: bool | None = None) -> GraphDef:
    """The static half of an object."""
    return flatten_node(node, graph).graphdef


def merge(graphdef_or_graphstate, /, *states: Any, copy: bool = False, recreate_variables: bool = True):
    """Rebuilds an object from its GraphDef and States (or nested dicts of plain values), together complete.

    Variables in the States become part of the new object as they are; `copy=True` makes new ones. Plain values get new
    Variables around them, unless `recreate_variables` is False.

    An array of another shape or kind than was split off is taken, with a `StateMismatchWarning`.

    Raises:
        StructureError: a leaf is missing or left over; the message names its path.
    """
    if isinstance(graphdef_or_graphstate, GraphState):
        return _merge_graph_states(graphdef_or_graphstate, *states)
    description: GraphDef = graphdef_or_graphstate
    if not isinstance(description, GraphDef):
        raise ArgumentError("merge needs a GraphDef first", got=type(description).__name__, expected="GraphDef, States",
                            fix="call merge(graphdef, state) with the pair that split returned")  # fmt: skip
    if not states:
        raise TypeError("merge() missing 1 required positional argument: 'state'")
    leaves = leaves_of(description, states)
    for path, old, new in zip(description.paths, description.leaf_types or (), leaves):
        new = new._raw_value if isinstance(new, Variable) else new
        if hasattr(new, "dtype"):  # labels may be merged too, one per leaf
            check_fit(old, new, path, "leaf")
    return unflatten_graph(description.root, leaves, copy=copy, recreate=recreate_variables)[0]


def leaves_of(description: GraphDef, states: Iterable[Any]) -> list[Any]:
    """The leaves of a structure, in order, from States that cover it."""
    given: dict[tuple, Any] = {}
    for part in states:
        given.update(flat_pairs(part))
    paths = description.paths
    if len(paths) != len(given) or any(path not in given for path in paths):
        missing = [show_path(p) for p in paths if p not in given]
        extra = [show_path(p) for p in given if p not in set(paths)]
        raise StructureError(
            f"Incorrect number of leaves, expected {len(paths)} leaves, but got {len(given)}"
            + (f"; missing: {', '.join(missing[:8])}" if missing else "")
            + (f"; unknown: {', '.join(extra[:8])}" if extra else ""),
            fix="pass all the States that split returned with this GraphDef",
        )  # fmt: skip
    return [given[path] for path in paths]


def flat_pairs(part: Any) -> Iterator[tuple[tuple, Any]]:
    """The `(path, leaf)` pairs of a State, a nested mapping, a FlatState or a tree of them."""
    if isinstance(part, FlatState):
        yield from part
    elif isinstance(part, (State, dict)):
        yield from _pairs_below(part._mapping if isinstance(part, State) else part, ())
    elif isinstance(part, Mapping):
        yield from _pairs_below(part, ())
    elif isinstance(part, Variable) or not jax.tree_util.all_leaves([part]):
        if isinstance(part, Variable):
            yield (), part
            return
        for path, x in jax.tree_util.tree_flatten_with_path(part, is_leaf=lambda x: isinstance(x, Variable))[0]:
            yield tuple(map(key_name, path)), x
    else:
        yield (), part


def _pairs_below(x: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    for key, value in x.items():
        if isinstance(value, State):
            value = value._mapping
        if isinstance(value, Mapping):
            yield from _pairs_below(value, (*path, key))
        else:
            yield (*path, key), value


# ---------------------------------------------------------------- update
def update(node: Any, state: Any, /, *states: Any) -> None:
    """Writes the values of States (or nested dicts, or a module of the same structure) into an object, in place.

    A value of another shape or kind, and a parameter that the object did not have, are written, with a
    `StateMismatchWarning`.
    """
    for part in (state, *states):
        if isinstance(part, (Pytree, Variable)) and not isinstance(part, State):
            part = flatten_graph(part)
            pairs: Iterable[tuple[tuple, Any]] = zip(part.paths, part.leaves)
        else:
            pairs = flat_pairs(part)
        for path, value in pairs:
            _update_at(node, path, value, path)


def _update_at(at: Any, path: tuple, value: Any, whole: tuple) -> None:
    while path:
        key, *rest = path
        if isinstance(at, Variable):
            if tuple(path) == ("value",):
                break
            raise StructureError(
                f"cannot update below the {type(at).__name__}", at=show_path(whole), fix="pass its value"
            )
        part = _child(at, key)
        if part is None and rest and _takes_new_parts(at):
            part = {}
            setattr(at, key, part)
        if not rest and not isinstance(part, (Variable, Pytree)):
            if part is not None:
                check_fit(part, value, whole, "array")
            elif isinstance(at, Pytree) and isinstance(value, (Param, *ARRAYS)) and not _takes_new_parts(at):
                check_known(vars(at), str(key), show_path(whole[:-1]), type(at).__name__)
            _set_child(at, key, value, whole)
            return
        at, path = part, tuple(rest)
    if isinstance(at, Variable):
        new = value._raw_value if isinstance(value, Variable) else value
        check_fit(at._raw_value, new, whole, type(at).__name__)
        if isinstance(value, Variable):
            at.update_from_state(value)
        else:
            at.set_raw_value(value) if not at.ref else at.set_value(value)
    else:
        raise StructureError(f"cannot write a value over the {type(at).__name__}", at=show_path(whole),
                             got=type(value).__name__, expected="a nested State")  # fmt: skip


def _takes_new_parts(at: Any) -> bool:
    """Whether it is an object that makes its parts late."""
    return getattr(at, "_takes_new_parts", False)


def _child(at: Any, key: Any) -> Any:
    if isinstance(at, Pytree):
        return at.__dict__.get(str(key) if at._pytree__has_int_keys else key)
    if isinstance(at, Mapping):
        return at.get(key)
    if isinstance(at, (list, tuple)):
        return at[key] if isinstance(key, int) and key < len(at) else getattr(at, str(key), None)
    return getattr(at, str(key), None)


def _set_child(at: Any, key: Any, value: Any, whole: tuple) -> None:
    if isinstance(at, Pytree):
        setattr(at, str(key), value)
    elif isinstance(at, (MutableMapping, list)):
        at[key] = value  # type: ignore[index]
    else:
        raise StructureError(f"cannot set {key!r} of the immutable {type(at).__name__}", at=show_path(whole),
                             fix="use a list, a dict, or a Variable")  # fmt: skip


# ---------------------------------------------------------------- pop and clone
def pop(node: Any, *filters: Filter):
    """Takes the Variables and arrays that the filters match out of an object; returns them as a State (one per filter).

    Raises:
        ArgumentError: no filter was given.
    """
    if not filters:
        raise ArgumentError("Expected at least one filter", fix="pop(node, nnx.Intermediate)")
    predicates = to_predicates(filters)
    found: list[list[tuple[tuple, Any]]] = [[] for _ in filters]
    done: set[int] = set()

    def visit(x: Any, path: tuple) -> None:
        if id(x) in done:
            return
        done.add(id(x))
        if isinstance(x, Pytree):
            items = [
                (int(k) if x._pytree__has_int_keys and k.isdigit() else k, v) for k, v in sorted(x.__dict__.items())
            ]
        elif isinstance(x, (dict, State)):
            items = [(k, x[k]) for k in sorted(x, key=key_order)]
        elif isinstance(x, (list, tuple)):
            items = list(enumerate(x))
        else:
            return
        for key, value in items:
            here = (*path, key)
            if isinstance(value, (Variable, *ARRAYS)):
                if isinstance(value, Variable) and id(value) in done:
                    continue
                for index, predicate in enumerate(predicates):
                    if predicate(here, value):
                        done.add(id(value))
                        found[index].append((here, value))
                        _delete_child(x, key, here)
                        break
            else:
                visit(value, here)

    visit(node, ())
    states = tuple(from_flat_state(pairs) for pairs in found)
    return states[0] if len(states) == 1 else states


def _delete_child(at: Any, key: Any, path: tuple) -> None:
    if isinstance(at, Pytree):
        delattr(at, str(key))
    elif isinstance(at, (dict, State)):
        del at[key]
    else:
        raise StructureError(
            f"cannot take a Variable out of a {type(at).__name__}", at=show_path(path), fix="use a List or a dict"
        )


def clone(node: A, variables: bool = True, *, arrays: bool = False, graph: bool | None = None) -> A:
    """A copy of an object; with `variables=False` it shares the Variables, with `arrays=True` arrays are copied too."""
    description, parts = split(node, graph=graph)
    if arrays:
        parts = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, parts)
    return merge(description, parts, copy=variables)


# ---------------------------------------------------------------- methods of an object that is cut
class ApplyCaller:
    """Stands for an object that is cut, or for a part of it: attributes and items lead on, a call runs it there.

    A call returns `(result, (graphdef, state))`, with the object as the call left it.
    """

    def __init__(self, graphdef: GraphDef, states: tuple[Any, ...], graph: bool | None = None,
                 steps: tuple[Callable[[Any], Any], ...] = ()):  # fmt: skip
        self._cut, self._steps = (graphdef, states, graph), steps

    def __getattr__(self, name: str) -> ApplyCaller:
        return ApplyCaller(*self._cut, (*self._steps, operator.attrgetter(name)))

    def __getitem__(self, key: Any) -> ApplyCaller:
        return ApplyCaller(*self._cut, (*self._steps, operator.itemgetter(key)))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[GraphDef, Any]]:
        description, states, graph = self._cut
        node = target = merge(description, *states)
        for step in self._steps:
            target = step(target)
        out = target(*args, **kwargs)
        return out, split(node, graph=graph)

    def __repr__(self) -> str:
        return "ApplyCaller(call it, or lead on by attribute or item)"


def call(graphdef_state: tuple[GraphDef, Any], /) -> ApplyCaller:
    """Runs methods of an object that is cut: `out, (graphdef, state) = call((graphdef, state)).method(*args)`.

    >>> from batiste.graph import Dict, Variable
    >>> cut = split(Dict(a=Variable(1.0)))
    >>> out, cut = call(cut)["a"].get_value()
    >>> out
    1.0
    """
    description, *states = graphdef_state
    return ApplyCaller(description, tuple(states))


def _apply(self: GraphDef, state: Any, *states: Any, graph: bool | None = None) -> ApplyCaller:
    """`graphdef.apply(state).method(*args)` is `call((graphdef, state)).method(*args)`."""
    return ApplyCaller(self, (state, *states), graph)


GraphDef.apply = _apply  # type: ignore[attr-defined]


# ---------------------------------------------------------------- a State with its GraphDef
class GraphState(MutableMapping, Generic[A]):
    """A State bundled with its GraphDef, so that `merge` needs nothing else."""

    def __init__(self, _graphdef: GraphDef, _state: Any):
        self._graphdef, self._state = _graphdef, _state

    def __getitem__(self, key):
        return self._state[key]

    def __setitem__(self, key, value):
        self._state[key] = value

    def __delitem__(self, key):
        del self._state[key]

    def __iter__(self):
        return iter(self._state)

    def __len__(self):
        return len(self._state)

    def __getattr__(self, name):
        if name == "_state" or name not in self._state:
            raise AttributeError(f"No attribute '{name}' in GraphState")
        return self._state[name]

    def __repr__(self):
        return f"GraphState(\n  _graphdef={self._graphdef},\n  _state={self._state}\n)"


def _graph_state_with_keys(x: GraphState):
    """The children are those of the State, so that paths are the same in both."""
    keys = sorted(x._state, key=key_order)
    return [(jax.tree_util.DictKey(k), x._state[k]) for k in keys], (x._graphdef, tuple(keys))


jax.tree_util.register_pytree_with_keys(
    GraphState,
    _graph_state_with_keys,
    lambda aux, children: GraphState(aux[0], State(dict(zip(aux[1], children)), _copy=False)),
)


def unpack(node: Any, *filters: Filter, graph: bool | None = None):
    """Like `split`, but every State brings the GraphDef: one GraphState, or one per filter."""
    description, *states = split(node, *filters, graph=graph)
    found = tuple(GraphState(description, s) for s in states)
    return found[0] if len(found) == 1 else found


def _merge_graph_states(first: GraphState, *others: GraphState):
    for other in others:
        if not isinstance(other, GraphState):
            raise StructureError(
                "Expected GraphState object", got=type(other).__name__, fix="merge the GraphStates of one unpack call"
            )
        if other._graphdef != first._graphdef:
            raise StructureError(
                "GraphDef must be the same for all GraphState objects", fix="merge the GraphStates of one unpack call"
            )
    return merge(first._graphdef, first._state, *(o._state for o in others))


def deep_copy(node: Pytree, memo: dict[int, Any]) -> Pytree:
    """`copy.deepcopy` of a graph object: sharing stays sharing, functions are not copied."""
    new = clone(node, arrays=True, graph=True)
    for _, x in iter_graph(new, graph=True):
        if isinstance(x, Pytree):
            for name, value in x.__dict__.items():
                if type(value) in (list, dict, set) and not x._pytree__nodes.get(name):
                    vars(x)[name] = copy.deepcopy(value, memo)
    return new


Pytree.__deepcopy__ = deep_copy  # type: ignore[attr-defined]  # here, since it needs the traversal
