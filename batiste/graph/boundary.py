# SPDX-License-Identifier: Apache-2.0
"""The Boundary: how live objects cross any JAX transform.

       outside                                     inside the trace
       enter(args, prefix)                         run(groups)
         objects -> values, by label                 values -> copies of the objects
                                                     out = f(*copies)
       leave(groups, note)                           changed values and new leaves, by label
         values -> the same objects, out

A *label* (an axis, a sharding, Carry, a role) says how a leaf passes. Leaves are sorted into one group per label, so
the prefix argument of every JAX transform is simply the tuple of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec, Sharding

from .captured import note_read, recorders
from .errors import ArgumentError, CapturedError
from .filters import to_predicates
from .flatten import Flat, Walk, duplicate_error, is_graph_node
from .jaxcompat import Tracer, current_trace, is_ref, key_name
from .metadata import frozen_metadata
from .modes import graph_mode, graph_updates_mode
from .pytree import Pytree
from .states import State, create_path_filters
from .structure import ARRAY_REF, LEAF, VARIABLE, Path, show_path, walk_defs
from .unflatten import UNCHANGED, Build
from .variable import Variable
from .walk import data_items


class Mode(NamedTuple):
    """How the objects of a call are understood.

    Args:
        graph: may one object stand at several places?
        updates: do structural changes travel, and may inputs be returned?
        name: of the function, for error messages.
    """

    graph: bool
    updates: bool
    name: str

    @classmethod
    def of(cls, name: str, graph: bool | None, graph_updates: bool | None) -> Mode:
        return cls(graph_mode(graph), graph_updates_mode(graph_updates), name)

    @property
    def live(self) -> bool:
        """Objects keep their identity across the boundary."""
        return self.graph and self.updates


_roots: dict[type, bool] = {}


def is_root(x: Any) -> bool:
    """Whether the walk of graph objects begins at `x`, a node of an argument tree."""
    cls = type(x)
    known = _roots.get(cls)
    if known is None:  # asked once per type: this is on the way of every jitted call
        if issubclass(cls, Tracer):
            return is_graph_node(x)  # of what it stands for
        known = _roots[cls] = is_graph_node(x)
    return known


# ---------------------------------------------------------------- rules: labels by filter
class Rule:
    """A label that depends on the path and the Variable: `rule(path, x)`. Its `labels` are all it can give."""

    labels: tuple

    def __call__(self, path: Path, x: Any) -> Any:
        raise NotImplementedError


class Rules(Rule):
    """Labels by filter, the first that matches: the base of StateAxes, StateSharding and the like.

    Stands in a prefix wherever one label may stand.
    """

    def __init__(self, pairs: dict[Any, Any] | Iterable[tuple[Any, Any]]):
        if isinstance(pairs, State):  # a State of labels: each speaks of its own path
            pairs = create_path_filters(pairs)
        pairs = list(pairs.items() if hasattr(pairs, "items") else pairs)  # type: ignore[union-attr]
        self.filters = tuple(f for f, _ in pairs)
        self.labels = tuple(label for _, label in pairs)
        self.predicates = to_predicates(self.filters)

    def __call__(self, path: Path, x: Any) -> Any:
        for predicate, label in zip(self.predicates, self.labels):
            if predicate(path, x):
                return label
        raise ArgumentError("No filter matched leaf", at=show_path(path), got=f"{type(x).__name__} and {self}",
                            fix="end the mapping with `...`")  # fmt: skip

    def keys(self):
        return self.filters

    def values(self):
        return self.labels

    map_prefix = __call__

    def items(self):
        return zip(self.filters, self.labels)

    def __eq__(self, other):
        return type(self) is type(other) and self.filters == other.filters and self.labels == other.labels

    def __hash__(self):
        return hash((type(self), self.filters, self.labels))

    def __repr__(self):
        return f"{type(self).__name__}({dict(self.items())})"


class Shaped(Rule):
    """Labels that stand in an object of the same structure, as `nnx.prefix` makes it; one may cover a whole part."""

    def __init__(self, root: Any):
        self.by_path = dict(_labels_of(root, (), set()))
        self.labels = tuple(dict.fromkeys(self.by_path.values()))

    def __call__(self, path: Path, x: Any) -> Any:
        for length in range(len(path), -1, -1):
            if path[:length] in self.by_path:
                return self.by_path[path[:length]]
        raise ArgumentError(
            "the prefix has no label for a leaf", at="/".join(map(str, path)), fix="make it with nnx.prefix"
        )

    def __eq__(self, other):
        return isinstance(other, Shaped) and self.by_path == other.by_path

    def __hash__(self):
        return hash(tuple(self.by_path.items()))


def _labels_of(x: Any, path: Path, open_: set[int]) -> Iterator[tuple[Path, Any]]:
    """The pairs (path, label) below `x`, an object that holds labels in the place of its leaves."""
    if isinstance(x, Variable):
        yield path, x.get_raw_value()
        return
    items = None if x is None or isinstance(x, (Rule, Sharding, PartitionSpec)) else data_items(x)
    if items is None:
        yield path, x
    elif id(x) not in open_:
        open_.add(id(x))
        for key, value in items:
            yield from _labels_of(value, (*path, key), open_)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (Rule, Sharding, PartitionSpec, Pytree, Variable))


def labels_in(prefix: Any) -> list[Any]:
    """All labels that a prefix can give."""
    found: list[Any] = []
    for spec in jax.tree.leaves(prefix, is_leaf=_is_spec):
        found += spec.labels if isinstance(spec, Rule) else Shaped(spec).labels if is_root(spec) else [spec]
    return found


def broadcast(prefix: Any, tree: Any, name: str, is_leaf: Callable[[Any], bool] = is_root) -> list[Any]:
    """What the prefix says of each leaf (plain leaf or root object) of `tree`: a label, or a rule that gives one."""
    if not isinstance(prefix, (tuple, list, dict)):
        spec = Shaped(prefix) if is_root(prefix) else prefix
        return [spec] * len(jax.tree.leaves(tree, is_leaf=is_leaf))
    if isinstance(prefix, list) and isinstance(tree, tuple):
        prefix = tuple(prefix)
    specs, structure = jax.tree.flatten(prefix, is_leaf=_is_spec)
    try:
        parts = structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{name} does not fit the structure it speaks of", got=repr(prefix),
                            expected=f"a prefix of {jax.tree.structure(tree, is_leaf=is_root)}",
                            fix="give one entry per part, or one for all of them") from error  # fmt: skip
    found: list[Any] = []
    for spec, part in zip(specs, parts):
        count = len(jax.tree.leaves(part, is_leaf=is_leaf))
        found += [Shaped(spec) if is_root(spec) else spec] * count
    return found


# ---------------------------------------------------------------- a tree of arguments, walked
class Walked(NamedTuple):
    """An argument tree: its plain structure, and one description per leaf (a plain value or a root object)."""

    treedef: Any
    defs: tuple


PLAIN = (LEAF,)  # describes a plain value of an argument tree


def positions_inside(defs: Sequence[Any]) -> set[int]:
    """The positions of leaves that lie inside root objects, not beside them."""
    found, n = set(), 0
    for d in defs:
        parts = (part for _, part in walk_defs(d)) if d is not PLAIN else ()
        count = sum(part[0] in (LEAF, VARIABLE, ARRAY_REF) for part in parts)
        found |= set(range(n, n + count))
        n += 1 if d is PLAIN else count
    return found


def walk_tree(walk: Walk, tree: Any, specs: Sequence[Any], start: Path = ()) -> Walked:
    """Goes on with `walk` over the roots and plain leaves of `tree`; `specs` says how each of them is labelled."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_root)
    defs = []
    for (keys, x), spec in zip(pairs, specs):
        path = (*start, *map(key_name, keys))
        aim(walk, spec, path)
        if is_root(x):
            defs.append(walk.whole(x, path))
        else:
            walk.plain.append(len(walk.leaves))
            walk.leaf(x, path)
            defs.append(PLAIN)
    return Walked(treedef, tuple(defs))


def aim(walk: Walk, spec: Any, path: Path) -> None:
    """What comes next is labelled by `spec`, whose rules see paths from here on."""
    walk.rule = spec if isinstance(spec, Rule) else None
    walk.label, walk.start = spec, len(path)


def build_all(walked: Walked, build: Build) -> list[Any]:
    """The leaves of the tree again, root objects included."""
    return [next(build.leaves) if d is PLAIN else build.value(d) for d in walked.defs]


# ---------------------------------------------------------------- the note
@jax.tree_util.register_static
class Note:
    """What one trace of the function found out. It rides on the output tree: a cached program brings its own."""

    __slots__ = ("changed", "metadata", "args", "out", "sources", "labels", "plain")

    def __init__(self, changed, metadata, args, out, sources, labels):
        self.changed: tuple[int, ...] = changed  # positions of the entry leaves whose values come back
        self.metadata: tuple = metadata  # (position, metadata) of Variables whose metadata changed
        self.args: Walked | None = args  # the arguments' structure, if it changed
        self.out: Walked = out
        self.sources: tuple = sources  # per leaf behind the changed ones: SENT, KEPT or an entry position
        self.labels: tuple = labels  # of all that comes back, in order
        self.plain = args is None and not metadata and all(d is PLAIN for d in out.defs)

    def __eq__(self, other):
        return self is other or (
            isinstance(other, Note) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)
        )

    def __hash__(self):
        return hash((self.changed, self.labels))


SENT, KEPT = "sent", "kept"


# ---------------------------------------------------------------- inside
class Crossing:
    """The static half of a passage: how the arguments were built, and what to do with them inside the trace.

    It holds no live object, so a compiled program may keep it.
    """

    def __init__(self, f: Callable, mode: Mode, walked: Walked, flat: Flat, specs: Sequence[Any], out_prefix: Any,
                 labels: Iterable[Any], keep: Callable[[Any], bool] | None):  # fmt: skip
        self.f, self.mode, self.walked, self.specs = f, mode, walked, specs
        self.out_prefix, self.keep = out_prefix, keep
        self.leaf_labels, self.paths = tuple(flat.labels), flat.paths
        self.numbers = [flat.numbers.get(id(x)) for x in flat.leaves]
        new = [
            label for spec in specs if isinstance(spec, Rule) for label in spec.labels
        ]  # what is set inside may get them
        self.labels: tuple = tuple(dict.fromkeys([*labels, *flat.labels, *new, *labels_in(out_prefix)]))
        variable = flat.variables
        self.order = tuple([i for i in part if variable[i]] + [i for i in part if not variable[i]]
                           for part in order(self.labels, flat.labels))  # fmt: skip
        self.note: Note | None = None
        self.sent: list[Path] = []  # the paths of what came back last, in order: for error messages

    def key(self) -> Any:
        """Two crossings with equal keys run the same program."""
        return self.walked, self.leaf_labels

    def run(self, groups: Sequence[Sequence[Any]]) -> tuple[list[Any], ...]:
        """Calls the function on copies of the objects; returns what must travel back, by label."""
        before = self.ungroup(groups)
        args, opened = self.open(before)
        return self.close(before, opened, self.f(*args) if isinstance(args, tuple) else self.f(args))

    def ungroup(self, groups: Sequence[Sequence[Any]]) -> list[Any]:
        """The entry leaves in order, from one list per label."""
        values: list[Any] = [None] * len(self.numbers)
        for positions, part in zip(self.order, groups):
            for i, x in zip(positions, part):
                values[i] = x
        return values

    def open(self, before: list[Any]) -> tuple[Any, Opened]:
        """The arguments as copies around these values."""
        build = Build(before, None, False)
        leaves = build_all(self.walked, build)
        return jax.tree.unflatten(self.walked.treedef, leaves), Opened(leaves, build.objects)

    def close(self, before: list[Any], opened: Opened, out: Any) -> tuple[list[Any], ...]:
        """Finds what the function changed and made; writes the note."""
        objects = opened.objects
        known = {id(x): i for i, x in objects.items()}
        inner = [None if i is None else objects[i] for i in self.numbers]
        changed = tuple(
            n for n, x in enumerate(inner)
            if isinstance(x, Variable) and not is_graph_node(before[n])
            and (x._raw_value is not before[n] or (self.keep is not None and self.keep(self.leaf_labels[n])))
        )  # fmt: skip
        walk = Walk(self.mode.graph, known=known, what=self.mode.name)
        args, metadata = (
            (self.walk_again(walk, opened.leaves), ()) if self.mode.live else (None, self.new_metadata(objects))
        )
        behind = len(walk.leaves)
        walked = walk_tree(walk, out, broadcast(self.out_prefix, out, "out_axes"), ("out",))
        if not self.mode.live:
            self.refuse_aliases(walk, known)
        values: list[Any] = [inner[n]._raw_value for n in changed]  # type: ignore[union-attr]
        labels, sources = [self.leaf_labels[n] for n in changed], []
        self.sent = [self.paths[n] for n in changed]
        positions = {path: n for n, path in enumerate(self.paths)}
        for n, (x, path, label) in enumerate(zip(walk.leaves, walk.paths, walk.labels)):
            at = positions.get(path) if n < behind else None
            if id(x) in known and is_graph_node(x):
                sources.append(KEPT)
            elif at is not None and before[at] is x and not (self.keep and self.keep(label)):
                sources.append(at)
            else:
                sources.append(SENT)
                values.append(self.value_of_new(x, path))
                labels.append(label)
                self.sent.append(path)
        if args is not None and args == self.walked and SENT not in sources[:behind]:
            args, sources = None, sources[behind:]
        self.note = Note(changed, metadata, args, walked, tuple(sources), tuple(labels))
        return group(self.labels, values, labels)

    def value_of_new(self, x: Any, path: Path) -> Any:
        """What is sent of a new leaf: a `jax.Ref` or a hijax box stays inside, its value travels."""
        if not isinstance(x, Variable):
            return x[...] if is_ref(x) else x
        if x._trace_state != current_trace():
            raise CapturedError(
                f"Cannot return captured Variable of type {x.type.__name__} from nnx.{self.mode.name}: "
                "Cannot extract graph node from different trace level",
                at=show_path(path),
                fix="pass the object to the function as an argument",
            )
        return jax.tree.map(lambda y: y[...] if is_ref(y) else y, x.get_raw_value())

    def walk_again(self, walk: Walk, leaves: list[Any]) -> Walked:
        """The structure of the arguments after the call; plain values cannot have changed, and are passed over."""
        tree = jax.tree.unflatten(self.walked.treedef, range(len(leaves)))
        paths = [tuple(map(key_name, keys)) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        defs: list[Any] = []
        for x, d, spec, path in zip(leaves, self.walked.defs, self.specs, paths):
            aim(walk, spec, path)
            defs.append(PLAIN if d is PLAIN else walk.value(x, path))
        return Walked(self.walked.treedef, tuple(defs))

    def new_metadata(self, objects: dict[int, Any]) -> tuple:
        """The metadata of Variables that carry other ones than they came in with."""
        found = []
        for d in self.walked.defs:
            for _, part in walk_defs(d):
                if part[0] == VARIABLE and frozen_metadata(objects[part.index]) != part.metadata:
                    found.append((self.numbers.index(part.index), frozen_metadata(objects[part.index])))
        return tuple(found)

    def refuse_aliases(self, walk: Walk, known: dict[int, int]) -> None:
        """Without graph updates an input may not be handed out again."""
        for key, (index, _, path) in walk.seen.items():
            x = walk.objects[index]
            if key in known and isinstance(x, Variable):
                at = self.paths[self.numbers.index(index)]
                raise duplicate_error(x, [at, path], self.mode.name)


class Opened(NamedTuple):
    """The copies inside the trace."""

    leaves: list[Any]
    objects: dict[int, Any]


# ---------------------------------------------------------------- outside
class Boundary:
    """The passage of one call through one transform.

    Args:
        f: the user's function.
        mode: how objects are understood.
        out_prefix: the labels of its result.
        keep: which of the Variables come back although they did not change: a predicate on their label.
    """

    def __init__(self, f: Callable, mode: Mode, out_prefix: Any = None, keep: Callable[[Any], bool] | None = None):
        self.f, self.mode, self.out_prefix, self.keep = f, mode, out_prefix, keep

    def enter(self, args: Any, prefix: Any = None, name: str = "in_axes", labels: Iterable[Any] = (),
              specs: Sequence[Any] | None = None) -> tuple[list[Any], ...]:  # fmt: skip
        """Objects -> values, one list per label. `labels` come first, in this order, also when nothing bears them."""
        specs = broadcast(prefix, args, name) if specs is None else specs
        walk = Walk(self.mode.graph, what=self.mode.name)
        walked = walk_tree(walk, args, specs)
        self.flat = walk.finish(None)
        self.crossing = Crossing(self.f, self.mode, walked, self.flat, specs, self.out_prefix, labels, self.keep)
        self.run = self.crossing.run
        return self.values()

    @property
    def labels(self) -> tuple:
        return self.crossing.labels

    def values(self) -> tuple[list[Any], ...]:
        """The present values of the entry leaves, by label."""
        if recorders:
            for x, is_variable in zip(self.flat.leaves, self.flat.variables):
                if is_variable:
                    note_read(x)
        values = self.flat.values()
        return tuple([values[i] for i in positions] for positions in self.crossing.order)

    def leave(self, groups: Sequence[Sequence[Any]], note: Note | None = None) -> Any:
        """Values -> the same objects, and the function's result."""
        note = note or self.crossing.note
        assert note is not None
        return write_back(note, ungroup(self.labels, groups, note.labels), self.flat.leaves, self.flat.objects)

    def leave_aside(self, groups: Sequence[Sequence[Any]], note: Note | None = None) -> Any:
        """Like `leave`, but writes into copies of the objects: what came back are no values."""
        note = note or self.crossing.note
        assert note is not None
        values = self.flat.values()
        objects = self.crossing.open(values)[1].objects
        leaves = [x if n is None else objects[n] for x, n in zip(values, self.crossing.numbers)]
        return write_back(note, ungroup(self.labels, groups, note.labels), leaves, objects)


def write_back(note: Note, values: Sequence[Any], leaves: Sequence[Any], objects: Mapping[int, Any]) -> Any:
    """Writes what came back into the live `leaves` and `objects`; returns the function's result."""
    came = iter(values)
    for i in note.changed:
        leaves[i].set_raw_value(next(came))
    for i, metadata in note.metadata:
        leaves[i]._set_metadata(dict(metadata.items))
    rest = [next(came) if s is SENT else UNCHANGED if s is KEPT else leaves[s] for s in note.sources]
    if note.plain:
        return jax.tree.unflatten(note.out.treedef, rest)
    build = Build(rest, objects, False)
    if note.args is not None:
        for d in note.args.defs:
            if d is not PLAIN:
                build.value(d)
    return jax.tree.unflatten(note.out.treedef, build_all(note.out, build))


# ---------------------------------------------------------------- groups
def order(labels: Sequence[Any], of: Sequence[Any]) -> tuple[list[int], ...]:
    """For each label the positions of the leaves that bear it."""
    found: dict[Any, list[int]] = {label: [] for label in labels}
    for position, label in enumerate(of):
        found[label].append(position)
    return tuple(found.values())


def group(labels: Sequence[Any], values: Sequence[Any], of: Sequence[Any]) -> tuple[list[Any], ...]:
    """Values sorted into one list per label."""
    return tuple([values[i] for i in positions] for positions in order(labels, of))


def ungroup(labels: Sequence[Any], groups: Sequence[Sequence[Any]], of: Sequence[Any]) -> list[Any]:
    """The inverse of `group`."""
    sources = {label: iter(values) for label, values in zip(labels, groups)}
    return [next(sources[label]) for label in of]
