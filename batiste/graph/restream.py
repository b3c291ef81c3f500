# SPDX-License-Identifier: Apache-2.0
"""Changing the random streams inside a model: splitting them for vmap, forking, reseeding, and putting them back.

With `graph` and `graph_updates` on, the streams are changed where they are, and `SplitBackups` undoes it; otherwise a
copy of the model is returned, with new streams and the same Variables for all else. Without a node the functions are
decorators, for all arguments of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp

from .errors import ArgumentError, RngError
from .filters import Filter, Path, Predicate, to_predicate
from .modes import graph_mode, graph_updates_mode
from .rng import RngStream, Shape, by_filter
from .variable import MISSING
from .walk import iter_graph, recursive_map

F = TypeVar("F", bound=Callable[..., Any])
StreamBackup = tuple[RngStream, jax.Array] | tuple[RngStream, jax.Array, jax.Array]
Policy = Literal["scalars_only", "match_shape"] | Callable[[Path, jax.Array, tuple[int, ...]], jax.Array]
Derive = Callable[[Path, RngStream], RngStream | None]


class SplitBackups(Iterable[StreamBackup]):
    """The keys and counts of streams as they were; as a context manager it puts them back at the end."""

    def __init__(self, backups: list[StreamBackup]):
        self.backups = backups

    def __iter__(self) -> Iterator[StreamBackup]:
        return iter(self.backups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        restore_rngs(self)

    def __repr__(self) -> str:
        return f"SplitBackups({self.backups!r})"


def backup_keys(node: Any, /, *, graph: bool | None = None) -> list[StreamBackup]:
    """The streams of `node` with their present keys, for `restore_rngs`."""
    return [(stream, stream.key.get_value()) for _, stream in _streams(node, graph)]


def restore_rngs(backups: Iterable[StreamBackup], /) -> None:
    """Gives streams the keys back, and the counts, that `backups` holds.

    >>> from batiste.graph import Rngs
    >>> rngs = Rngs(0)
    >>> backups = split_rngs(rngs, splits=5)
    >>> rngs.default.key.shape
    (5,)
    >>> restore_rngs(backups)
    >>> rngs.default.key.shape
    ()
    """
    for stream, key, *count in backups:
        stream.key.set_value(key)
        if count:
            stream.count.set_value(count[0])


def split_rngs(node: Any = MISSING, /, *, splits: Shape, only: Filter = ..., squeeze: bool = False,
               graph: bool | None = None, graph_updates: bool | None = None) -> Any:  # fmt: skip
    """Splits the streams in `node` to keys of shape `splits`, so that each index of a mapped axis has its own.

    Args:
        only: a filter for the streams; it must match their key and their count.
        squeeze: with `splits=1`, keep scalar keys.

    Returns:
        `SplitBackups`, or a changed copy, or (without `node`) a decorator; see the top of the file.

    >>> from batiste.graph import Rngs
    >>> rngs = Rngs(params=0, dropout=1)
    >>> with split_rngs(rngs, splits=(2, 5), only="params"):
    ...     rngs.params.key.shape, rngs.dropout.key.shape
    ((2, 5), ())
    >>> rngs.params.key.shape
    ()

    Raises:
        ArgumentError: `squeeze` with other splits than 1.
        RngError: a stream is split already.
    """
    if squeeze and splits != 1:
        raise ArgumentError("squeeze=True is only supported for splits=1", got=f"splits={splits}",
                            fix="leave out squeeze")  # fmt: skip
    selects = to_predicate(only)

    def derive(path: Path, stream: RngStream) -> RngStream | None:
        if not _both(selects, path, stream):
            return None
        new = stream.split(splits)
        return RngStream(new.key.get_value()[0], tag=new.tag) if squeeze else new

    return _change(node, derive, graph, graph_updates)


def fork_rngs(node: Any = MISSING, /, *, split: Mapping[Filter, Shape | None] | Shape | None = None,
              graph: bool | None = None, graph_updates: bool | None = None) -> Any:  # fmt: skip
    """Gives the streams in `node` keys of their own, drawn from themselves.

    Args:
        split: deprecated; the shape to split a new key to, also by filter. A mapping forks only what it matches.

    Returns:
        `SplitBackups`, or a changed copy, or (without `node`) a decorator; see the top of the file.

    >>> from batiste.graph import Rngs
    >>> rngs = Rngs(0)
    >>> with fork_rngs(rngs):
    ...     inside = rngs()
    >>> bool(inside == rngs())
    False
    """
    rules = by_filter(split)

    def derive(path: Path, stream: RngStream) -> RngStream | None:
        for _, selects, k in rules:
            if _both(selects, path, stream):
                return stream.fork(split=k)
        return None

    return _change(node, derive, graph, graph_updates)


def with_rngs(node: Any = MISSING, /, *, split: Mapping[Filter, Shape] | Shape | None = None,
              fork: Filter | Sequence[Filter] | None = None, broadcast: Mapping[Filter, Shape] | Shape | None = None,
              only: Filter = True, graph: bool | None = None, graph_updates: bool | None = None) -> Any:  # fmt: skip
    """A copy of `node` whose streams are split, broadcast or forked, by filters; the others stay as they are.

    Args:
        split, broadcast: a shape for all streams, or a mapping from filters to shapes; the first match counts.
        fork: a filter or several.
        only: a filter for the streams that are looked at.

    Returns:
        The copy, or (without `node`) a decorator that copies all arguments of a call.

    >>> from batiste.graph import Not, Rngs
    >>> rngs = with_rngs(Rngs(params=0, dropout=1), split={"params": 4}, fork=Not("params"), graph_updates=False)
    >>> rngs.params.key.shape, rngs.dropout.key.shape
    ((4,), ())

    Raises:
        ArgumentError: one stream is named by two rules.
        NotImplementedError: `graph` and `graph_updates` are both on.
    """
    if graph_mode(graph) and graph_updates_mode(graph_updates):
        raise NotImplementedError(
            "graph=True and graph_updates=True is not supported for `with_rngs`: it returns a copy.\n"
            "  Fix: pass graph_updates=False, or change the streams in place with split_rngs or fork_rngs."
        )
    shaped = {"split": (split, RngStream.split), "broadcast": (broadcast, RngStream.broadcast)}
    rules: list[tuple[str, Filter, Predicate, Callable[[RngStream], RngStream]]] = []
    for name, (shapes, change) in shaped.items():
        rules += [(name, f, m, partial(change, k=k)) for f, m, k in by_filter({} if shapes is None else shapes)]
    for f in fork if isinstance(fork, (list, tuple)) else [fork]:
        rules.append(("fork", f, to_predicate(f), RngStream.fork))
    selects = to_predicate(only)

    def derive(path: Path, stream: RngStream) -> RngStream | None:
        if not selects(path, stream):
            return None
        found = [(name, f, change) for name, f, matches, change in rules if matches(path, stream)]
        by_name: dict[str, Filter] = {}
        for name, f, _ in found:
            if f is not ... and f is not True:
                by_name.setdefault(name, f)
        if len(by_name) > 1:
            raise ArgumentError(
                f"RngStream at path {path} matches multiple rules: "
                + ", ".join(f"{name} matches filter {f!r}" for name, f in by_name.items()),
                fix="name each stream in one of split, broadcast and fork",
            )
        return found[0][2](stream) if found else None

    return _change(node, derive, graph, False)


def reseed(node: Any, /, *, graph: bool | None = None, policy: Policy = "scalars_only", **stream_keys: Any) -> None:
    """Gives the streams in `node` with these tags new keys, one after the other from a stream of the given key.

    Args:
        policy: `scalars_only` refuses streams that are split, `match_shape` splits the new key to their shape, and
            a function `(path, new scalar key, shape) -> key` decides itself.
        stream_keys: seeds or keys by tag.

    >>> from batiste.graph import Rngs
    >>> rngs = Rngs(dropout=0)
    >>> reseed(rngs, dropout=42)
    >>> bool(rngs.dropout.key[...] == jax.random.fold_in(jax.random.key(42), 0))
    True

    Raises:
        ArgumentError: there is no such policy.
        RngError: a key is none, or a stream is split and the policy allows only scalar keys.
    """
    new_key = _POLICIES.get(policy) if isinstance(policy, str) else policy
    if not callable(new_key):
        raise ArgumentError('policy must be "scalars_only", "match_shape" or a callable', got=repr(policy))
    sources = {tag: RngStream(key, tag=tag) for tag, key in stream_keys.items()}
    streams = [(path, stream) for path, stream in _streams(node, graph) if stream.tag in sources]
    keys = [new_key(path, sources[stream.tag](), stream.key.shape) for path, stream in streams]
    for (_, stream), key in zip(streams, keys):
        stream.key.set_value(key)
        stream.count.set_value(jnp.zeros(key.shape, jnp.uint32))


# ---------------------------------------------------------------- the parts
def _streams(node: Any, graph: bool | None) -> list[tuple[Path, RngStream]]:
    return [(path, x) for path, x in iter_graph(node, graph=graph) if isinstance(x, RngStream)]


def _both(selects: Callable[[Path, Any], bool], path: Path, stream: RngStream) -> bool:
    """Whether a filter on Variables selects a stream: its key and its count."""
    return selects((*path, "key"), stream.key) and selects((*path, "count"), stream.count)


def _change(node: Any, derive: Derive, graph: bool | None, graph_updates: bool | None) -> Any:
    if node is MISSING:
        return partial(_decorate, derive, graph, graph_updates)
    if graph_mode(graph) and graph_updates_mode(graph_updates):
        return _in_place(node, derive, graph)
    new = lambda path, x: (derive(path, x) or x) if isinstance(x, RngStream) else x
    return recursive_map(new, node, graph=graph)


def _in_place(node: Any, derive: Derive, graph: bool | None) -> SplitBackups:
    """All new keys are drawn before the first is written: an error leaves every stream with its own."""
    changes = [(stream, new) for path, stream in _streams(node, graph) if (new := derive(path, stream)) is not None]
    backups = SplitBackups([(stream, stream.key.get_value(), stream.count.get_value()) for stream, _ in changes])
    for stream, new in changes:
        stream.key.set_value(new.key.get_value())
        stream.count.set_value(new.count.get_value())
    return backups


def _decorate(derive: Derive, graph: bool | None, graph_updates: bool | None, f: F) -> F:
    @wraps(f)
    def with_changed_streams(*args: Any, **kwargs: Any) -> Any:
        changed = _change((args, kwargs), derive, graph, graph_updates)
        if isinstance(changed, SplitBackups):
            with changed:
                return f(*args, **kwargs)
        args, kwargs = changed
        return f(*args, **kwargs)

    return with_changed_streams  # type: ignore[return-value]


def _scalars_only(path: Path, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if shape:
        raise RngError(
            f"Cannot reseed stream at path {path} because it has a non-scalar key", got=f"a key with shape {shape}",
            fix='set policy="match_shape" if all its keys differ, else give a function as policy',
        )  # fmt: skip
    return key


def _match_shape(path: Path, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, shape) if shape else key


_POLICIES = {"scalars_only": _scalars_only, "match_shape": _match_shape}
