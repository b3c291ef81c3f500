# SPDX-License-Identifier: Apache-2.0
"""scan, remat_scan and while_loop of functions of scopes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from batiste.errors import LazyInitError
from batiste.graph.boundary import broadcast as spread
from batiste.graph.errors import ArgumentError

from ..abstract import without_values
from ..filters import in_filter, union_filters
from ..scope import Scope
from .batching import Axes, is_split, split_keys, streams_in
from .call import LiftedCall, below, first_axis_size
from .metadata import within_axes
from .programs import remat


class Broadcast:
    """Stands in `in_axes` and `out_axes` of `scan` for what is the same in all iterations."""

    def __repr__(self) -> str:
        return "broadcast"


broadcast = Broadcast()
CARRY = "carried"


class DependentError(ArgumentError):
    """What should be the same in all iterations differs from one to the next."""


def scan(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any] = {},
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    split_rngs: Mapping[Any, bool] = {},
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    _split_transpose: bool = False,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: dict[Any, Any] = {},  # noqa: B006  (the default that Flax shows; it is only read)
    check_constancy_invariants: bool = True,
) -> Callable[..., Any]:
    """carry, y[i] = fn(scopes[i], carry, *args[i]) for i = 0, 1, …

    Args:
        variable_axes: the axis of each collection whose variables differ from iteration to iteration.
        variable_broadcast: the collections that all iterations share; what is made or written must not depend on the
            iteration.
        variable_carry: the collections that one iteration hands to the next; none can be made inside.
        split_rngs: whether each iteration gets a key of its own, by stream; streams that are not named stay outside.
        in_axes, out_axes: axes of the other arguments and of y, or `broadcast`.
        length: the number of iterations, for when nothing that goes in has an axis.
        metadata_params: what boxes around variables are told of the axis.
        check_constancy_invariants: trace `fn` once more before the loop, and compute there what all iterations share.
            Without it nothing new can be shared.

    Raises:
        DependentError: something that is shared depends on the iteration.
        ArgumentError: nothing tells the number of iterations, or values differ in it.
    """
    axes = Axes(variable_axes)

    def label_of(col: str) -> Any:
        if in_filter(variable_broadcast, col):
            return None
        return CARRY if in_filter(variable_carry, col) else axes(col)

    shared = union_filters(variable_broadcast, variable_carry)

    def inner(scopes: Any, init: Any, *args: Any) -> Any:
        with within_axes(scopes, lambda col: None if in_filter(shared, col) else axes(col), metadata_params):
            return scanned(scopes, init, *args)

    def scanned(scopes: Any, init: Any, *args: Any) -> Any:
        call = LiftedCall(
            "scan", fn, scopes, into=union_filters(shared, axes.into), out=union_filters(shared, axes.out),
            rngs=streams_in(split_rngs), labels=label_of,
            streams=lambda name: 0 if is_split(split_rngs, name) else None,
            all_labels=(CARRY, None, 0, *axes.labels), keep=lambda label: label is CARRY,
        )  # fmt: skip
        loop = _Loop(call, args, in_axes, out_axes, length)
        split_keys(call, split_rngs, loop.length)
        once = loop.before(init) if check_constancy_invariants else None
        if once is None and any(axis is broadcast for axis in jax.tree.leaves(out_axes)):
            problem = "scan with check_constancy_invariants=False does not support broadcast non-carry function outputs"
            raise ArgumentError(problem, got=f"out_axes={out_axes}", fix="give the outputs an axis")
        call.fn = _reading(call.fn, label_of)
        loop.groups = call.enter()
        options: dict[str, Any] = dict(length=loop.length, reverse=reverse, unroll=unroll,
                                       _split_transpose=_split_transpose)  # fmt: skip
        (carry, state), (ys, lanes) = jax.lax.scan(
            loop.body, (init, loop.group(CARRY)), (loop.slices(), loop.lanes()), **options
        )
        call.leave(loop.gathered(state, lanes))
        return carry, loop.result(ys, once)

    return inner


class _Loop:
    """What a scan sees: arguments and groups of variables, cut along axis 0."""

    def __init__(self, call: LiftedCall, args: tuple, in_axes: Any, out_axes: Any, length: int | None):
        self.call, self.out_axes = call, out_axes
        self.args, self.treedef = jax.tree.flatten(args)
        self.axes = spread(in_axes, args, "in_axes", is_leaf=lambda x: False)
        self.groups: tuple[list[Any], ...] = ()
        self.length = self._length(length)
        self.out: tuple[Any, list[Any]] | None = None

    def _length(self, length: int | None) -> int:
        mapped = [(axis, x.get_raw_value()) for axis, x in self.call.variables()]
        sizes = {jnp.shape(x)[axis]: None for axis, x in zip(self.axes, self.args) if isinstance(axis, int)}
        if len(sizes) > 1:
            raise ArgumentError(f"scan got values with different leading axis sizes: {', '.join(map(str, sizes))}",
                                fix="give `broadcast` as the axis of what all iterations share")  # fmt: skip
        size = next(iter(sizes), None)
        size = first_axis_size(mapped) if size is None else size
        if size is None and length is None:
            raise ArgumentError("length should be specified manually",
                                got="no argument and no variable with an axis", fix="pass length=")  # fmt: skip
        return length if size is None else size  # type: ignore[return-value]

    # ------------------------------------------------------------ what goes in
    @property
    def lane_labels(self) -> list[Any]:
        return [label for label in self.call.labels if isinstance(label, int)]

    def group(self, label: Any) -> list[Any]:
        return self.groups[self.call.labels.index(label)]

    def lanes(self) -> list[Any]:
        return [_move(self.group(axis), axis, 0) for axis in self.lane_labels]

    def slices(self) -> list[Any]:
        return [_move(x, axis, 0) for axis, x in zip(self.axes, self.args) if isinstance(axis, int)]

    # ------------------------------------------------------------ one iteration
    def body(self, carried: Any, cut: Any) -> Any:
        """An iteration: `(carry, variables that go round), (y, variables with an axis)`."""
        carry, ys, groups = self.step(*carried, *cut)
        back = dict(zip(self.call.labels, groups))
        ys = [y for axis, y in zip(*self.outputs(ys)) if axis is not broadcast]
        return (carry, back[CARRY]), (ys, [back[axis] for axis in self.lane_labels])

    def step(self, carry: Any, state: list[Any], slices: list[Any], lanes: list[Any]) -> Any:
        """Calls the function."""
        fixed = iter(slices)
        args = [next(fixed) if isinstance(axis, int) else x for axis, x in zip(self.axes, self.args)]
        groups = dict(zip(self.lane_labels, lanes)) | {CARRY: state, None: self.group(None)}
        out, groups = self.call.run([groups[label] for label in self.call.labels], carry, *self.treedef.unflatten(args))
        if not isinstance(out, tuple) or len(out) != 2:
            raise ArgumentError("a scanned function must return a pair (carry, y)", got=type(out).__name__,
                                fix="return (carry, None) where there is no y")  # fmt: skip
        return *out, groups

    def before(self, init: Any) -> list[Any]:
        """Traces the function once, and computes what all iterations share: variables, and the result's leaves.

        Raises:
            DependentError: it depends on the iteration.
        """
        self.groups = self.call.enter()

        def shared(*unknown: Any) -> Any:
            _, ys, groups = self.step(*unknown)
            ys = [y for axis, y in zip(*self.outputs(ys)) if axis is broadcast]
            return groups[self.call.labels.index(None)], ys

        unknown = (*_like((init, self.group(CARRY))), *_like((self.slices(), self.lanes()), cut=True))
        try:
            variables, ys = without_values(shared)(*unknown)
        except LazyInitError:
            raise DependentError(
                "broadcasted variable has a data dependency on the scan body", got="a value that the carry, a slice or "
                "a split key goes into", fix="give it an axis, or split_rngs={stream: False} for its initialiser",
            ) from None  # fmt: skip
        self.call.put(None, variables)
        return ys

    def outputs(self, ys: Any) -> tuple[list[Any], list[Any]]:
        """The axes and the leaves of what the function returns beside the carry."""
        leaves, treedef = jax.tree.flatten(ys)
        axes = spread(self.out_axes, ys, "out_axes", is_leaf=lambda x: False)
        self.out = treedef, axes
        return axes, leaves

    # ------------------------------------------------------------ what comes out
    def gathered(self, state: list[Any], lanes: list[Any]) -> list[list[Any]]:
        back = {axis: [_move(x, 0, axis) for x in lane] for axis, lane in zip(self.lane_labels, lanes)}
        back |= {CARRY: state, None: []}
        return [back[label] for label in self.call.labels]

    def result(self, ys: list[Any], once: list[Any] | None) -> Any:
        assert self.out is not None
        treedef, axes = self.out
        stacked, shared = iter(ys), iter(once or ())
        return treedef.unflatten([next(shared) if axis is broadcast else _move(next(stacked), 0, axis)
                                  for axis in axes])  # fmt: skip


def _reading(fn: Callable[..., Any], label_of: Callable[[str], Any]) -> Callable[..., Any]:
    """`fn`, which leaves what all iterations share as it was."""

    def inside(scopes: Any, *args: Any) -> Any:
        before = {id(scope): _contents(scope, label_of) for scope in below(scopes)}
        out = fn(scopes, *args)
        for scope in below(scopes):
            for col in [col for col in scope.cells if label_of(col) is None]:
                del scope.cells[col]
            for col, cells in before.get(id(scope), {}).items():
                scope.cells[col] = {name: x for name, (x, _) in cells.items()}
                for x, value in cells.values():
                    if x.get_raw_value() is not value:
                        x.set_raw_value(value)
        return out

    return inside


def _contents(scope: Scope, label_of: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
    """The shared Variables with their values."""
    shared = {col: cells for col, cells in scope.cells.items() if label_of(col) is None}
    return {col: {name: (x, x.get_raw_value()) for name, x in cells.items()} for col, cells in shared.items()}


def _like(tree: Any, cut: bool = False) -> Any:
    """What is known of values before they are: shapes and types; `cut` takes the first axis away."""

    def like(x: Any) -> jax.ShapeDtypeStruct:
        aval = jax.typeof(x)
        return jax.ShapeDtypeStruct(aval.shape[1:] if cut else aval.shape, aval.dtype, weak_type=aval.weak_type)

    return jax.tree.map(like, tree)


def _move(tree: Any, source: int, destination: int) -> Any:
    return tree if source == destination else jax.tree.map(lambda x: jnp.moveaxis(x, source, destination), tree)


# ---------------------------------------------------------------- remat_scan, while
def remat_scan(
    body_fn: Callable[..., Any],
    lengths: Sequence[int],
    policy: Callable[..., bool] | None = None,
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    variable_axes: Mapping[Any, Any] = {True: 0},
    split_rngs: Mapping[Any, bool] = {True: True},
) -> Callable[..., Any]:
    """x = body_fn(scopes, x), as many times as the product of `lengths` says; memory grows with their sum.

    Scans stand inside scans, one for each length, and each of their bodies is recomputed in the backward pass.

    Args:
        policy: what is kept all the same: one of `jax.checkpoint_policies`.
        variable_broadcast, variable_carry, variable_axes, split_rngs: as for `scan`.
    """

    def once_more(scopes: Any, x: Any) -> tuple[Any, None]:
        inside = body_fn if len(lengths) == 1 else remat_scan(body_fn, lengths[1:], policy, variable_broadcast,
                                                              variable_carry, variable_axes, split_rngs)  # fmt: skip
        return inside(scopes, x), None

    scanned = scan(remat(once_more, policy=policy, prevent_cse=False), variable_axes, variable_broadcast,
                   variable_carry, split_rngs, length=lengths[0])  # fmt: skip
    return lambda scopes, x: scanned(scopes, x)[0]


SPLIT = "split"


def while_loop(
    cond_fn: Callable[[Any, Any], Any],
    body_fn: Callable[[Any, Any], Any],
    scope: Any,
    init: Any,
    carry_variables: Any = False,
    broadcast_variables: Any = True,
    split_rngs: Mapping[Any, bool] = {},
) -> Any:
    """while cond_fn(scopes, x): x = body_fn(scopes, x)

    Args:
        carry_variables: the collections that one iteration hands to the next; none can be made inside.
        broadcast_variables: the collections that are only read.
        split_rngs: whether each iteration gets keys of its own, by stream; streams that are not named stay outside.
    """

    def label_of(col: str) -> Any:
        return CARRY if in_filter(carry_variables, col) else None

    call = LiftedCall(
        "while_loop", body_fn, scope, into=union_filters(carry_variables, broadcast_variables), out=carry_variables,
        rngs=streams_in(split_rngs), labels=label_of, all_labels=(CARRY, None, SPLIT),
        streams=lambda name: SPLIT if is_split(split_rngs, name) else None, keep=lambda label: label is CARRY,
    )  # fmt: skip
    state, fixed, keys = call.enter()

    def groups(n: Any, state: list[Any]) -> tuple[list[Any], ...]:
        return state, fixed, [jax.random.fold_in(key, n) for key in keys]

    def goes_on(carry: Any) -> Any:
        n, x, state = carry
        return call.ask(cond_fn, groups(n, state), x)

    def body(carry: Any) -> Any:
        n, x, state = carry
        x, (state, *_) = call.run(groups(n, state), x)
        return n + 1, x, state

    _, x, state = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), init, state))
    call.leave((state, [], []))
    return x
