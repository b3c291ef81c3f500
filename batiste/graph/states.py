# SPDX-License-Identifier: Apache-2.0
"""State: `path -> Variable or array`, with a nested view, and the functions that cut and join States by filters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from .epoch import structure_changed
from .errors import StructureError
from .filters import Filter, Path, PathIn, to_predicates
from .represent import Layout, Nested, represent, treescope_form
from .variable import Variable

K = TypeVar("K")
V = TypeVar("V")


def key_order(key: Any):
    """Sorts keys of mixed types: numbers first by value, then text."""
    return (0, key, "") if isinstance(key, int) else (1, 0, str(key))


def path_order(path: Path):
    return tuple(map(key_order, path))


# ---------------------------------------------------------------- nested mappings
class _EmptyNode:
    """Stands for an empty mapping in a flattened one."""

    def __repr__(self):
        return "_EmptyNode()"


empty_node = _EmptyNode()


def flatten_to_sequence(
    xs: Mapping, /, *, is_leaf: Callable[[Path, Any], bool] | None = None
) -> list[tuple[Path, Any]]:
    """The `(path, value)` pairs of a nested mapping, in sorted order; empty mappings vanish."""
    found: list[tuple[Path, Any]] = []

    def visit(x, path):
        if not isinstance(x, Mapping) or (is_leaf and is_leaf(path, x)):
            found.append((path, x))
            return
        for key in sorted(x, key=key_order):
            visit(x[key], (*path, key))

    visit(xs, ())
    return found


def flatten_mapping(
    xs: Mapping,
    /,
    *,
    keep_empty_nodes: bool = False,
    is_leaf: Callable[[Path, Any], bool] | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """Nested mapping to `{path: value}`, or to `{joined path: value}` with `sep`.

    >>> flatten_mapping({"a": {"b": 1}}, sep="/")
    {'a/b': 1}
    """
    if not isinstance(xs, Mapping):
        raise TypeError(f"expected Mapping; got {type(xs).__qualname__}")
    flat: dict[Any, Any] = {}

    def put(path, x):
        flat[path if sep is None else sep.join(map(str, path))] = x

    def visit(x, path):
        if not isinstance(x, Mapping) or (is_leaf and is_leaf(path, x)):
            put(path, x)
            return
        if keep_empty_nodes and not x and path:
            put(path, empty_node)
        for key in x:
            visit(x[key], (*path, key))

    visit(xs, ())
    return flat


def unflatten_mapping(xs: Mapping | Iterable[tuple[Any, Any]], /, *, sep: str | None = None) -> dict[Any, Any]:
    """The inverse of `flatten_mapping`.

    >>> unflatten_mapping({("a", "b"): 1})
    {'a': {'b': 1}}
    """
    nested: dict[Any, Any] = {}
    pairs: Iterable[tuple[Any, Any]] = xs.items() if isinstance(xs, Mapping) else xs
    for path, value in pairs:
        keys: Any = path if sep is None else path.split(sep)  # type: ignore[attr-defined]
        at = nested
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = {} if value is empty_node else value
    return nested


# ---------------------------------------------------------------- FlatState
class FlatState(Sequence[tuple[Path, V]], Generic[V]):
    """A sequence of `(path, value)` pairs, sorted by path."""

    __slots__ = ("_paths", "_leaves")

    def __init__(self, items: Iterable[tuple[Path, V]], /, *, sort: bool):
        pairs = list(items)
        if sort:
            pairs.sort(key=lambda pair: path_order(pair[0]))
        self._paths = tuple(path for path, _ in pairs)
        self._leaves = [leaf for _, leaf in pairs]

    @classmethod
    def from_sorted_keys_values(cls, paths: tuple[Path, ...], leaves: list[V], /) -> FlatState[V]:
        new = object.__new__(cls)
        new._paths, new._leaves = tuple(paths), list(leaves)
        return new

    @property
    def paths(self) -> tuple[Path, ...]:
        return self._paths

    @property
    def leaves(self) -> list[V]:
        return self._leaves

    def __getitem__(self, index):  # type: ignore[override]
        return self._paths[index], self._leaves[index]

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[tuple[Path, V]]:
        return iter(zip(self._paths, self._leaves))

    def __eq__(self, other):
        return isinstance(other, FlatState) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __batiste_repr__(self) -> Layout:
        return Layout("FlatState", list(enumerate(self)), ("([", "])"), "")

    def __repr__(self) -> str:
        return represent(self)

    def to_nested_state(self) -> State:
        return from_flat_state(self)

    def split(self, *filters: Filter):
        """One FlatState per filter; every pair goes to the first that matches."""
        *found, rest = _sort_out(self, filters)
        if rest:
            raise _not_exhaustive(FlatState(rest, sort=False))
        found = tuple(FlatState(pairs, sort=False) for pairs in found)
        return found[0] if len(found) == 1 else found

    def filter(self, *filters: Filter):
        """Like `split`, without the need to cover everything."""
        found = tuple(FlatState(pairs, sort=False) for pairs in _sort_out(self, filters)[:-1])
        return found[0] if len(found) == 1 else found

    @staticmethod
    def merge(flat_state, *flat_states) -> FlatState:
        pairs: dict[Path, Any] = {}
        for state in (flat_state, *flat_states):
            pairs.update(state)
        return FlatState(pairs.items(), sort=True)


jax.tree_util.register_pytree_with_keys(
    FlatState,
    lambda s: ([(jax.tree_util.DictKey(path), leaf) for path, leaf in s], s._paths),
    lambda paths, leaves: FlatState.from_sorted_keys_values(paths, list(leaves)),
    lambda s: (s._leaves, s._paths),
)


def _sort_out(pairs: Iterable[tuple[Path, Any]], filters: Sequence[Filter]) -> list[list[tuple[Path, Any]]]:
    """One list of pairs per filter, and one more of what no filter matched."""
    predicates = to_predicates(filters)
    found: list[list[tuple[Path, Any]]] = [[] for _ in range(len(predicates) + 1)]
    for path, value in pairs:
        for index, predicate in enumerate(predicates):
            if predicate(path, value):
                found[index].append((path, value))
                break
        else:
            found[-1].append((path, value))
    return found


def _not_exhaustive(rest) -> StructureError:
    return StructureError(
        f"Non-exhaustive filters, got a non-empty remainder: {rest}",
        fix="end the filters with `...`, which takes the rest",
    )


# ---------------------------------------------------------------- State
class State(MutableMapping[K, V]):
    """A nested mapping `path -> Variable or array`; `state["a"]["b"]` and `state.a.b` are the same.

    Args:
        mapping: a nested mapping, or pairs.
        _copy: False takes the outer mapping as it is.
    """

    __slots__ = ("_mapping", "__weakref__")

    def __init__(self, mapping: Mapping | Iterable[tuple[Any, Any]], /, *, _copy: bool = True):
        if isinstance(mapping, State):
            mapping = mapping._mapping
        object.__setattr__(self, "_mapping", dict(mapping) if _copy or not isinstance(mapping, dict) else mapping)

    @property
    def raw_mapping(self) -> Mapping:
        return self._mapping

    def __getitem__(self, key: K) -> Any:
        value = self._mapping[key]
        return type(self)(value, _copy=False) if type(value) is dict else value

    def __setitem__(self, key: K, value: Any) -> None:
        structure_changed()  # a plan may rest on this State
        self._mapping[key] = value._mapping if isinstance(value, State) else value

    def __delitem__(self, key: K) -> None:
        structure_changed()
        del self._mapping[key]

    def __getattr__(self, name: str) -> Any:
        if name == "_mapping" or name not in self._mapping:
            raise AttributeError(f"No attribute '{name}' in State")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value  # type: ignore[index]

    def __delattr__(self, name: str) -> None:
        del self[name]  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[K]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __contains__(self, key) -> bool:
        return key in self._mapping

    def __eq__(self, other):
        return isinstance(other, Mapping) and self._mapping == (other._mapping if isinstance(other, State) else other)

    __hash__ = None  # type: ignore[assignment]

    def __batiste_repr__(self) -> Layout:
        items = [(k, Nested(v) if isinstance(v, dict) else v) for k, v in self._mapping.items()]
        return Layout(type(self).__name__, items, ("({", "})"), ": ")

    def __repr__(self) -> str:
        return represent(self)

    def __treescope_repr__(self, path, subtree_renderer):
        return treescope_form(self, path, subtree_renderer)

    def __or__(self, other: Mapping) -> State:
        return merge_state(self, other) if other else self

    def __sub__(self, other: State) -> State:
        _deprecated("diff")
        return diff(self, other)

    def __getstate__(self):
        return self._mapping

    def __setstate__(self, mapping):
        object.__setattr__(self, "_mapping", mapping)

    def __deepcopy__(self, memo):
        return jax.tree.map(lambda x: x, self)

    # The older spelling of the functions below.
    def flat_state(self) -> FlatState:
        _deprecated("to_flat_state")
        return to_flat_state(self)

    @classmethod
    def from_flat_path(cls, flat_state: Mapping[Path, V] | Iterable[tuple[Path, V]], /) -> State:
        _deprecated("from_flat_state")
        return from_flat_state(flat_state, cls=cls)

    def map(self, f: Callable[[Path, V], V]) -> State:
        _deprecated("map_state")
        return map_state(f, self)

    def split(self, first: Filter, /, *filters: Filter):
        _deprecated("split_state")
        return split_state(self, first, *filters)

    def filter(self, first: Filter, /, *filters: Filter):
        _deprecated("filter_state")
        return filter_state(self, first, *filters)

    @classmethod
    def merge(cls, state: Mapping, /, *states: Mapping) -> State:
        _deprecated("merge_state")
        return merge_state(state, *states, cls=cls)

    def to_pure_dict(self, extract_fn: Callable | None = None) -> dict[str, Any]:
        _deprecated("to_pure_dict")
        return to_pure_dict(self, extract_fn)

    def replace_by_pure_dict(self, pure_dict: dict[str, Any], replace_fn: Callable | None = None) -> None:
        _deprecated("replace_by_pure_dict")
        replace_by_pure_dict(self, pure_dict, replace_fn)


def _deprecated(name: str) -> None:
    warnings.warn(f"`State` is on its way to become the built-in dict; use the function `nnx.{name}` instead.",
                  DeprecationWarning, stacklevel=3)  # fmt: skip


def _state_flatten(state: State):
    mapping = state._mapping
    keys = tuple(sorted(mapping, key=key_order))
    return [mapping[k] for k in keys], keys


def _state_flatten_with_keys(state: State):
    children, keys = _state_flatten(state)
    return [(jax.tree_util.DictKey(k), c) for k, c in zip(keys, children)], keys


def _register(cls):
    jax.tree_util.register_pytree_with_keys(
        cls,
        _state_flatten_with_keys,
        lambda keys, children: cls(dict(zip(keys, children)), _copy=False),
        _state_flatten,
    )


_register(State)
State.__init_subclass__ = classmethod(lambda cls, **kw: _register(cls))  # type: ignore[assignment]


# ---------------------------------------------------------------- functions on States
def to_flat_state(state: Mapping) -> FlatState:
    """The `(path, value)` pairs of a nested State, sorted by path."""
    if isinstance(state, State):
        state = state._mapping
    pairs = flatten_to_sequence(state)
    return FlatState.from_sorted_keys_values(tuple(p for p, _ in pairs), [x for _, x in pairs])


def from_flat_state(flat_state, *, cls: Any = State):
    """The nested State of `(path, value)` pairs or a mapping of paths."""
    return cls(unflatten_mapping(flat_state))


def map_state(f: Callable[[Path, Any], Any], state):
    """Maps `f(path, value)` over a State."""
    return from_flat_state([(path, f(path, x)) for path, x in to_flat_state(state)], cls=type(state))


def split_state(state, first: Filter, /, *filters: Filter):
    """One State per filter; every value goes to the first filter that matches it.

    Raises:
        StructureError: something was matched by none.
    """
    *found, rest = _sort_out(to_flat_state(state), (first, *filters))
    if rest:
        raise _not_exhaustive(from_flat_state(rest, cls=type(state)))
    states = tuple(from_flat_state(pairs, cls=type(state)) for pairs in found)
    return states[0] if len(states) == 1 else states


def filter_state(state, first: Filter, /, *filters: Filter):
    """The parts of a State that the filters select; the rest is left out."""
    found = _sort_out(to_flat_state(state), (first, *filters))[:-1]
    states = tuple(from_flat_state(pairs, cls=type(state)) for pairs in found)
    return states[0] if len(states) == 1 else states


def merge_state(state, /, *states, cls: Any = State):
    """The union of States; where they overlap, the last wins."""
    if not states:
        return state if isinstance(state, cls) else cls(state)
    pairs: dict[Path, Any] = {}
    for part in (state, *states):
        pairs.update(to_flat_state(part))
    return from_flat_state(pairs, cls=cls)


def diff(state, other):
    """What `state` has at paths that `other` lacks."""
    gone = set(to_flat_state(other).paths)
    return from_flat_state([(p, x) for p, x in to_flat_state(state) if p not in gone], cls=type(state))


def to_pure_dict(state, extract_fn: Callable[[Any], Any] | None = None) -> dict[Any, Any]:
    """The nested dict of the plain values in a State."""
    extract = extract_fn or (lambda x: x.get_value() if isinstance(x, Variable) else x)
    return unflatten_mapping([(path, extract(x)) for path, x in to_flat_state(state)])


def replace_by_pure_dict(state, pure_dict: Mapping, replace_fn: Callable[[Any, Any], Any] | None = None) -> None:
    """Writes the values of a nested dict into a State, in place; digit strings count as the integers they spell.

    Raises:
        StructureError: the dict has a path that the State lacks.
    """
    replace = replace_fn or (lambda x, value: x.replace(value) if isinstance(x, Variable) else value)
    mine = dict(to_flat_state(state))
    for path, value in flatten_mapping(pure_dict).items():
        if path not in mine:
            path = tuple(int(k) if isinstance(k, str) and k.isdigit() else k for k in path)
        if path not in mine:
            raise StructureError("key in pure_dict not available in state", got=path, expected=f"one of {list(mine)}")
        at: Any = state
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = replace(mine[path], value)


def restore_int_paths(pure_dict: Mapping) -> dict[Any, Any]:
    """Turns keys that are digit strings back into integers, as after a checkpoint.

    >>> restore_int_paths({"layers": {"0": 1}})
    {'layers': {0: 1}}
    """
    as_key = lambda k: int(k) if isinstance(k, str) and k.isdigit() else k
    return unflatten_mapping({tuple(map(as_key, path)): x for path, x in flatten_mapping(pure_dict).items()})


def create_path_filters(state) -> dict[Any, Any]:
    """For every value in a State the filters that match its path and nothing else, by value."""
    groups: dict[Any, set[Path]] = {}
    for path, value in to_flat_state(state):
        groups.setdefault(value.get_value() if isinstance(value, Variable) else value, set()).add(path)
    return {PathIn(*paths): value for value, paths in groups.items()}
