# SPDX-License-Identifier: Apache-2.0
"""scan, while_loop and fori_loop: a function called again and again on live objects.

One argument, the *carry*, goes round: what an iteration leaves in it, the next one finds. At the end its Variables are
written back into the same objects. What else a loop takes is read (axis None), or cut into slices along an axis.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from batiste.graph.boundary import (
    Boundary,
    Crossing,
    Mode,
    Note,
    Opened,
    Rule,
    Shaped,
    Walked,
    build_all,
    is_root,
    positions_inside,
    walk_tree,
)
from batiste.graph.errors import ArgumentError, CallError, CarryError, StructureError
from batiste.graph.flatten import Walk, is_graph_node
from batiste.graph.lost import LostUpdateWarning
from batiste.graph.rng import RngState
from batiste.graph.unflatten import Build
from batiste.graph.variable import MISSING, Variable

from .axes import NO_METADATA, Carry, bound_to_axes, check_function, check_sizes, without_axis_names
from .compare import place, structure_difference, type_difference

_log = logging.getLogger(__name__)

Take = Callable[[Any], tuple[Any, Any]]  # splits what the function returns into the carry and the rest


# ---------------------------------------------------------------- one iteration
class Turn:
    """One iteration: the static half, which a traced loop may keep.

    Positions speak of the entry leaves:

        carried    those that go round: labelled Carry; without graph updates also Variables with the axis None
        fixed      the others with the axis None
        held       `jax.Ref`s among them: JAX carries these itself, the body closes over them
        lanes      per axis, those that are cut along it
    """

    def __init__(self, crossing: Crossing, at: int | None, held: Mapping[int, Any], take: Take):
        self.crossing, self.at, self.held, self.take = crossing, at, held, take
        self.live = crossing.mode.live
        inside, variables = positions_inside(crossing.walked.defs), [n is not None for n in crossing.numbers]
        carried = [label is Carry or (label is None and not self.live and variables[n])
                   for n, label in enumerate(crossing.leaf_labels)]  # fmt: skip
        still = [n for n, label in enumerate(crossing.leaf_labels) if label is None or label is Carry]
        self.carried = [n for n in still if carried[n] and n not in held]
        self.fixed = [n for n in still if not carried[n] and n not in held]
        self.axes = [label for label in crossing.labels if label is not Carry and label is not None]
        self.lanes = [part for label, part in zip(crossing.labels, crossing.order) if label in self.axes]
        self.variables = [n for n in self.carried if variables[n]]
        self.attributes = [n for n in self.carried if not variables[n] and n in inside]  # bare arrays in objects
        arrays = [n for n in self.carried if not variables[n]]
        self.own = [n for n in arrays if crossing.paths[n][0] == at]  # arrays of the carry argument

    def before(self, carry: Sequence[Any], fixed: Sequence[Any], lanes: Sequence[Sequence[Any]] = ()) -> list[Any]:
        """The entry leaves of this iteration."""
        values: list[Any] = [None] * len(self.crossing.numbers)
        for n, x in self.held.items():
            values[n] = x
        for positions, part in zip((self.carried, self.fixed, *self.lanes), (carry, fixed, *lanes)):
            for n, x in zip(positions, part):
                values[n] = x
        return values

    def go(self, before: list[Any], *extra: Any) -> tuple[list[Any], list[list[Any]]]:
        """Calls the function; returns the next carry, and per axis what it hands out."""
        crossing = self.crossing
        args, opened = crossing.open(before)
        given = None if self.at is None else self.walk(args[self.at])
        carry, rest = self.take(crossing.f(*extra, *args))
        if lost := self.take_back(opened, before, self.fixed):
            _log.warning("Updates are lost: nnx.%s writes Variables whose axis is None, so that each iteration finds "
                         "them as they were. To let them go round, give them the axis nnx.Carry in StateAxes, or put "
                         "them into the carry: %s", crossing.mode.name, ", ".join(lost))  # fmt: skip
        arrays: list[Any] = []
        if given is not None:
            arrays = self.check(given, args[self.at], carry)  # type: ignore[index]
        groups = dict(zip(crossing.labels, crossing.close(before, opened, rest)))
        sent = groups[Carry][sum(crossing.leaf_labels[n] is Carry for n in self.variables) :]
        if len(sent) != (len(self.attributes) if self.live else 0) or (self.live and groups[None]):
            raise self.changed("a new Variable or array belongs to what is carried or broadcast")
        values = {n: opened.objects[crossing.numbers[n]]._raw_value for n in self.variables}  # type: ignore[index]
        values |= zip(self.attributes, sent)
        values |= zip(self.own, arrays)
        after = [values[n] for n in self.carried]
        self.check_types(before, after)
        return after, [groups[axis] for axis in self.axes]

    # ------------------------------------------------------------ what has to stay as it is
    def walk(self, tree: Any) -> tuple[Walked, list[Any]]:
        walk = Walk(self.crossing.mode.graph, what=self.crossing.mode.name)
        walked = walk_tree(walk, tree, [None] * len(jax.tree.leaves(tree, is_leaf=is_root)), ("carry",))
        return walked, walk.leaves

    def check(self, given: tuple[Walked, list[Any]], old: Any, new: Any) -> list[Any]:
        """The arrays of the new carry, which has to hold the same objects as the old one.

        Raises:
            CarryError: it does not.
        """
        name, (walked, leaves) = self.crossing.mode.name, given
        walked_now, leaves_now = self.walk(new)
        same_tree = walked.treedef == walked_now.treedef
        if same_tree and self.live:
            for x, y in zip(*(jax.tree.leaves(tree, is_leaf=is_root) for tree in (old, new))):
                if is_root(x) and x is not y:
                    raise self.replaced(x, y)
        free = self.live and name == "scan"  # settings may change there; JAX sees that the arrays fit
        if not same_tree or len(leaves) != len(leaves_now) or (walked != walked_now and not free):
            raise self.changed(structure_difference(walked, walked_now, "the carry"))
        for x, y in zip(leaves, leaves_now):
            if isinstance(x, Variable) and x is not y:
                raise self.replaced(x, y)
        return [x for x in leaves_now if not is_graph_node(x)]

    def changed(self, detail: str) -> CarryError:
        name = self.crossing.mode.name
        return CarryError(
            f"nnx.{name} requires body function's input and output to have the same reference and pytree structure, "
            f"but they differ: {detail}",
            fix="create Variables and set attributes before the loop; inside, only write values",
        )  # fmt: skip

    def replaced(self, old: Any, new: Any) -> CarryError:
        name = self.crossing.mode.name
        return CarryError(
            f"Carry references must be the same between iterations: {name} Variable identity must be preserved across "
            f"iterations. nnx.{name} requires body function's input and output to have the same reference and pytree "
            "structure, but they differ", got=f"another {type(new).__name__}",
            expected=f"the {type(old).__name__} that came in",
            fix="write into the object that came in (variable[...] = value, nnx.update), and return that one",
        )  # fmt: skip

    def check_types(self, before: list[Any], after: list[Any]) -> None:
        paths = [self.crossing.paths[n] for n in self.carried]
        found = type_difference(paths, [before[n] for n in self.carried], after, weak=True)
        if found:
            raise CarryError(
                f"{self.crossing.mode.name} body function carry input and carry output must have equal types, but they "
                "differ", at=found[0], got=found[2], expected=found[1],
                fix="convert it (astype), or start with the type it will have",
            )  # fmt: skip

    def take_back(self, opened: Opened, before: list[Any], positions: Sequence[int]) -> list[str]:
        """Undoes what was written into Variables that do not come back; names them.

        Random streams are undone without a word: to share one means that each iteration draws the same numbers.
        """
        lost = []
        for n in positions:
            index = self.crossing.numbers[n]
            x = None if index is None else opened.objects[index]
            if isinstance(x, Variable) and x._raw_value is not before[n]:
                x._raw_value = before[n]
                if not isinstance(x, RngState):
                    lost.append(f"{type(x).__name__} at {place(self.crossing.paths[n])}")
        return lost


# ---------------------------------------------------------------- one call
class Loop:
    """One call of a looping transform: the live half."""

    def __init__(self, f: Callable, mode: Mode, args: tuple, axes: Any = Carry, out_axes: Any = (), at: int | None = 0,
                 take: Take = lambda out: (out, ())):  # fmt: skip
        self.args, self.at = args, at
        keep = lambda label: label is Carry or (label is None and not mode.live)
        self.boundary = Boundary(f, mode, out_axes, keep=keep)
        self.boundary.enter(args, axes, labels=(Carry, None))
        self.leaves = self.boundary.flat.values()
        crossing = self.boundary.crossing
        still = (None, Carry)
        held = {n: x for n, x in enumerate(self.leaves) if is_graph_node(x) and crossing.leaf_labels[n] in still}
        self.turn = Turn(crossing, at, held, take)

    def values(self, positions: Sequence[int]) -> list[Any]:
        return [self.leaves[n] for n in positions]

    def leave(self, carry: Sequence[Any], lanes: Sequence[Sequence[Any]] = (),
              note: Note | None = None) -> tuple[Any, Any]:  # fmt: skip
        """Writes into the live objects; returns the carry and what else the function handed out."""
        boundary, turn = self.boundary, self.turn
        final = dict(zip(turn.carried, carry))
        labels = boundary.crossing.leaf_labels
        groups: dict[Any, list[Any]] = {axis: list(lane) for axis, lane in zip(turn.axes, lanes)}
        for label in (Carry, None):
            groups[label] = [final[n] for n in turn.variables if labels[n] is label]
        groups[Carry] += [final[n] for n in turn.attributes] if turn.live else []
        rest = boundary.leave([groups[label] for label in boundary.labels], note)
        return self.last_carry(final), rest

    def last_carry(self, final: dict[int, Any]) -> Any:
        """The carry in the end: the live objects; without graph updates, new ones around the same Variables."""
        if self.at is None:
            return None
        if self.turn.live:
            arrays = iter([final[n] for n in self.turn.own if n not in self.turn.attributes])
            leaves, treedef = jax.tree.flatten(self.args[self.at], is_leaf=is_root)
            return jax.tree.unflatten(treedef, [x if is_root(x) else next(arrays) for x in leaves])
        entry = self.boundary.flat.leaves
        leaves = [x if isinstance(x, Variable) else final.get(n, x) for n, x in enumerate(entry)]
        walked = self.boundary.crossing.walked
        return jax.tree.unflatten(walked.treedef, build_all(walked, Build(leaves, None, False)))[self.at]


# ---------------------------------------------------------------- scan
def scan(f: Any = MISSING, *, length: int | None = None, reverse: bool = False, unroll: int | bool = 1,
         _split_transpose: bool = False, in_axes: Any = (Carry, 0), out_axes: Any = (Carry, 0),
         transform_metadata: Mapping[str, Any] = NO_METADATA, graph: bool | None = None,
         graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`jax.lax.scan` for functions of live objects: `carry, y[i] = f(carry, x[i])` for i = 0, 1, ...

    Args:
        in_axes, out_axes: prefixes of axes, of `Carry` for the one argument and result that go round, and of None for
            what each iteration sees whole. `StateAxes` or the result of `nnx.prefix` may stand for a module.
        transform_metadata: `{nnx.PARTITION_NAME: name}` takes the axis' name out of the Variables' metadata inside.

    What is written into Variables with the axis None is dropped, and logged; with `graph_updates=False` it goes round.

    Raises:
        ArgumentError: the axes make no sense, for example Carry stands in one of `in_axes` and `out_axes` alone.
        CarryError: the carry comes out with other objects, another structure or other types than it went in with.
        AliasError: one object gets two axes.

    >>> import jax.numpy as jnp
    >>> from batiste import nnx
    >>> layers = nnx.Param(jnp.array([1.0, 2.0, 3.0]))
    >>> scan(lambda x, w: (w * x, x))(1.0, layers)
    (Array(6., dtype=float32...), Array([1., 1., 2.], dtype=float32...))
    """
    if f is MISSING:
        return functools.partial(scan, length=length, reverse=reverse, unroll=unroll, _split_transpose=_split_transpose,
                                 in_axes=in_axes, out_axes=out_axes, transform_metadata=transform_metadata, graph=graph,
                                 graph_updates=graph_updates)  # fmt: skip
    mode = Mode.of("scan", graph, graph_updates)
    options: dict[str, Any] = dict(length=length, reverse=reverse, unroll=unroll, _split_transpose=_split_transpose)
    metadata = transform_metadata if mode.live else NO_METADATA
    return looped(f, mode, in_axes, out_axes, metadata, functools.partial(jax.lax.scan, **options))


def looped(f: Callable, mode: Mode, in_axes: Any, out_axes: Any, metadata: Mapping[str, Any], drive: Callable) -> Any:
    """`f` called again and again by `drive(body, start, lanes)`, which does what `jax.lax.scan` does.

    See `scan` for the axes.
    """
    check_function(f, mode, in_axes, out_axes)
    at = _check_axes(in_axes, out_axes, mode)
    take, put, rest_axes = _carry_of(out_axes)
    bodies: dict[Any, Callable] = {}

    @functools.wraps(f, updated=())
    def scanned(*args, **kwargs):
        args, kwargs = bound_to_axes(f, args, kwargs, in_axes)
        if kwargs:
            raise CallError("keyword arguments could not be resolved to positions", got=sorted(kwargs),
                            fix="nnx.scan wants an axis for each argument: make them positional")  # fmt: skip
        if in_axes is Carry and len(args) != 1:
            raise ArgumentError(
                f"When in_axes=Carry, the function must take exactly one argument, got {len(args)} arguments",
                fix="write in_axes=(nnx.Carry, 0, ...)",
            )
        call = without_axis_names(f, in_axes, out_axes, metadata)
        loop = Loop(call, mode, args, in_axes, rest_axes, at, take)
        turn = loop.turn
        check_sizes(mode.name, turn.crossing, loop.leaves)
        body = _body(turn) if turn.held else bodies.setdefault(turn.crossing.key(), _body(turn))
        lanes = [_move(loop.values(lane), axis, 0) for axis, lane in zip(turn.axes, turn.lanes)]
        start = loop.values(turn.carried), loop.values(turn.fixed)
        (carry, _), (lanes, note) = drive(body, start, lanes)
        lanes = [_move(lane, 0, axis) for axis, lane in zip(turn.axes, lanes)]
        return put(*loop.leave(carry, lanes, note))

    return scanned


def _body(turn: Turn) -> Callable:
    """The body of one structure of arguments: kept, so that JAX finds the program it compiled for it."""

    def body(start, lanes):
        carry, fixed = start
        carry, lanes = turn.go(turn.before(carry, fixed, lanes))
        return (carry, fixed), (lanes, turn.crossing.note)

    return body


def _move(tree: Any, source: int, destination: int) -> Any:
    return tree if source == destination else jax.tree.map(lambda x: jnp.moveaxis(x, source, destination), tree)


def _carry_of(out_axes: Any) -> tuple[Callable, Callable, Any]:
    """How the carry is taken out of a result and put into it again, and the axes of the rest."""
    if out_axes is Carry:
        return lambda out: (out, ()), lambda carry, _: carry, ()
    if not isinstance(out_axes, tuple) or Carry not in out_axes:
        return lambda out: (None, out), lambda _, rest: rest, out_axes
    k = out_axes.index(Carry)

    def take(out):
        if not isinstance(out, tuple) or len(out) != len(out_axes):
            got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
            raise StructureError("the result of a scanned function does not fit out_axes", got=got,
                                 expected=f"a tuple of {len(out_axes)}, for out_axes={out_axes}",
                                 fix="return one value per entry of out_axes")  # fmt: skip
        return out[k], (*out[:k], *out[k + 1 :])

    return take, lambda carry, rest: (*rest[:k], carry, *rest[k:]), (*out_axes[:k], *out_axes[k + 1 :])


def _check_axes(in_axes: Any, out_axes: Any, mode: Mode) -> int | None:
    """Where the Carry stands in `in_axes`.

    Raises:
        ArgumentError: it stands where it cannot, or a result has no axis.
    """
    places = []
    for name, axes in (("in_axes", in_axes), ("out_axes", out_axes)):
        entries = axes if isinstance(axes, tuple) else (axes,)
        tops = [n for n, axis in enumerate(entries) if axis is Carry]
        if len(tops) > 1:
            raise ArgumentError(f"Found multiple Carry definitions at {name}[{tops[0]}] and {name}[{tops[1]}]",
                                fix="put what is carried into one tuple")  # fmt: skip
        places.append(tops)
        is_leaf = lambda x: x is None or isinstance(x, Rule) or is_root(x)
        for keys, spec in jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_leaf)[0]:
            spec = Shaped(spec) if is_root(spec) else spec
            labels, where = spec.labels if isinstance(spec, Rule) else (spec,), jax.tree_util.keystr(keys)
            top = spec is Carry and len(keys) == isinstance(axes, tuple)
            if Carry in labels and not top and not (mode.live and isinstance(spec, Rule) and name == "in_axes"):
                if isinstance(spec, Rule) and name == "out_axes":
                    raise ArgumentError(f"Cannot carry output state. Got {spec} at: out_axes{where}",
                                        fix="give it an axis; the Carry is one whole result")  # fmt: skip
                raise ArgumentError(
                    f"Carry must be a top-level argument, it cannot be nested. Found Carry inside {name} at path "
                    f"{where}", fix="make it an entry of the tuple; StateAxes of in_axes may hold it",
                )  # fmt: skip
            if name == "out_axes" and None in labels:
                got = f"out_axes={spec}" if spec is None else spec
                raise ArgumentError(f"Cannot broadcast output state. Got {got} at: out_axes{where}",
                                    fix="give it an axis, or take the last one of the results")  # fmt: skip
    if bool(places[0]) != bool(places[1]):
        raise ArgumentError("If one of in_axes or out_axes has Carry, the other must also have Carry. "
                            f"Got in_axes={in_axes}, out_axes={out_axes}",
                            fix="mark both the argument and the result that go round")  # fmt: skip
    return places[0][0] if places[0] else None


# ---------------------------------------------------------------- while, for
def while_loop(cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any, *,
               graph: bool | None = None, graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`jax.lax.while_loop` for values that hold live objects: `while cond_fun(val): val = body_fun(val)`.

    Raises:
        CarryError: `body_fun` returns other objects, another structure or other types than it was given.
    """
    loop = Loop(body_fun, Mode.of("while_loop", graph, graph_updates), (init_val,))
    turn = loop.turn

    def goes_on(carry):
        before = turn.before(carry, ())
        args, opened = turn.crossing.open(before)
        answer = cond_fun(*args)
        if lost := turn.take_back(opened, before, turn.carried):
            warnings.warn(
                "Updates are lost: the condition of nnx.while_loop writes Variables, but only the body hands them on.\n"
                f"  Fix: write them in the body: {', '.join(lost)}.", LostUpdateWarning, stacklevel=2,
            )  # fmt: skip
        return answer.get_value() if isinstance(answer, Variable) else answer

    carry = jax.lax.while_loop(goes_on, lambda carry: turn.go(turn.before(carry, ()))[0], loop.values(turn.carried))
    return loop.leave(carry)[0] if turn.crossing.note else init_val


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init_val: Any, *,
              unroll: int | bool | None = None, graph: bool | None = None,
              graph_updates: bool | None = None) -> Any:  # fmt: skip
    """`jax.lax.fori_loop` for values that hold live objects: `for i in range(lower, upper): val = body_fun(i, val)`.

    Raises:
        CarryError: `body_fun` returns other objects, another structure or other types than it was given.
    """
    loop = Loop(body_fun, Mode.of("fori_loop", graph, graph_updates), (init_val,))
    turn = loop.turn

    def body(i, carry):
        return turn.go(turn.before(carry, ()), i)[0]

    carry = jax.lax.fori_loop(lower, upper, body, loop.values(turn.carried), unroll=unroll)
    return loop.leave(carry)[0] if turn.crossing.note else init_val
