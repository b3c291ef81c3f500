# SPDX-License-Identifier: Apache-2.0
"""custom_vjp: functions of live objects with their own backward rule."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal

from batiste.graph.boundary import Boundary, Mode, Note, is_root, ungroup
from batiste.graph.errors import AutodiffError, MissingRuleError, ShapeError
from batiste.graph.flatten import ANY, flatten_graph
from batiste.graph.structure import GraphDef, show_path
from batiste.graph.unflatten import unflatten_graph
from batiste.graph.variable import MISSING

from .arguments import bound, by_position, refuse_sharing
from .compile import refuse_bound_method, refuse_rules
from .tangents import DIFF, REST, DiffState, Likeness, Output, specs_of


class CustomVjp:
    """A function with a backward rule of its own, given by `defvjp`."""

    def __init__(self, fun: Callable, mode: Mode, nondiff_argnums: Sequence[int | DiffState]):
        refuse_bound_method(fun, mode.name)
        refuse_rules(mode, nondiff_argnums=tuple(nondiff_argnums))
        functools.update_wrapper(self, fun)
        self.fun, self.mode, self.nondiff_argnums = fun, mode, nondiff_argnums
        self.filters = {d.argnum: d for d in nondiff_argnums if isinstance(d, DiffState)}
        self.static = frozenset(n for n in nondiff_argnums if not isinstance(n, DiffState))
        self.fwd: Callable | None = None
        self.bwd: Callable | None = None
        self.symbolic_zeros = False

    def __get__(self, instance, owner=None):
        """A decorated method binds its object as the first argument."""
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"<nnx.custom_vjp of {self.fun!r}>"

    def defvjp(
        self, fwd: Callable[..., tuple[Any, Any]], bwd: Callable[..., tuple[Any, ...]], symbolic_zeros: bool = False
    ) -> None:
        """Sets the rule.

        Args:
            fwd: takes what the function takes; returns `(out, residuals)`.
            bwd: takes the non-differentiated arguments, the residuals and the cotangent of `out`; returns one
                cotangent for each of the other arguments. What belongs to objects looks as `grad` shows it.

        With live objects the cotangent is a pair `(updates, out)`: one State per object with the cotangents of all its
        Variables as `fwd` left them. Otherwise `bwd` may have a keyword `updates_g`: objects with the cotangents of
        those Variables that `fwd` changed, and None elsewhere.
        """
        self.fwd, self.bwd, self.symbolic_zeros = fwd, bwd, symbolic_zeros

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fwd is None or self.bwd is None:
            name = getattr(self.fun, "__name__", repr(self.fun))
            raise MissingRuleError(
                f"No VJP defined for custom_vjp function {name} using defvjp", fix="call f.defvjp(fwd, bwd) first"
            )
        return _Call(self, *bound(self.fun, args, kwargs)).run()


class _Call:
    """One call of a `CustomVjp`."""

    def __init__(self, owner: CustomVjp, args: tuple, kwargs: dict[str, Any]):
        self.owner, self.mode = owner, owner.mode
        if kwargs:
            raise AutodiffError(
                "nnx.custom_vjp takes keyword arguments only where they can be passed by position", got=sorted(kwargs)
            )
        self.static = tuple(args[n] for n in sorted(owner.static))
        if self.mode.live and any(map(is_root, jax.tree.leaves(self.static, is_leaf=is_root))):
            raise AutodiffError(
                "Passing integers to nondiff_argnums for graph nodes arguments in custom_vjp is not supported",
                fix="nondiff_argnums=(nnx.DiffState(argnum, filter),), whose filter says what is differentiated",
            )
        call, xs = by_position(owner.fun, args, {}, owner.static)
        refuse_sharing(args, self.mode)
        moving = [n for n in range(len(args)) if n not in owner.static]
        specs = specs_of(xs, {i: owner.filters.get(n, DIFF) for i, n in enumerate(moving)})
        self.boundary = Boundary(call, self.mode, ANY, keep=(lambda label: True) if self.mode.live else None)
        self.diff, self.rest, _ = self.boundary.enter(xs, specs=specs, labels=(DIFF, REST, ANY))
        self.crossing = self.boundary.crossing
        self.note: Note | None = None
        self.rule = by_position(owner.fwd, args, {}, owner.static)[0]  # type: ignore[arg-type]

    def run(self) -> Any:
        f = jax.custom_vjp(functools.wraps(self.owner.fun)(functools.partial(self.primal)), nondiff_argnums=(0,))
        f.defvjp(self.forward, self.backward, symbolic_zeros=self.owner.symbolic_zeros)
        return self.boundary.leave(f(self.static, self.diff, self.rest))

    def primal(self, static: tuple, *groups: Sequence[Any]) -> tuple[list[Any], ...]:
        """What `jax.custom_vjp` calls where nothing is differentiated."""
        came = self.crossing.run(groups)
        self.note = self.crossing.note
        return came

    def forward(self, static: tuple, *groups: Sequence[Any]) -> tuple[Any, Any]:
        """What `jax.custom_vjp` calls for the forward pass: all that comes back, and what the backward pass needs."""
        crossing = self.crossing
        before = crossing.ungroup(groups)
        self.shapes = [np.shape(_plain(x)) for x in before]
        args, opened = crossing.open(before)
        out, residuals = self.rule(*args)
        came = crossing.close(before, opened, out)
        assert crossing.note is not None
        if self.note is not None and self.note.labels != crossing.note.labels:
            raise AutodiffError(
                "fwd must return the same structure as the function and change the same Variables",
                got=self.changed(crossing.note),
                expected=self.changed(self.note),
            )
        kept = flatten_graph(residuals)
        return tuple([_plain(x) for x in part] for part in came), (kept.values(), kept.graphdef, crossing.note)

    def backward(
        self, static: tuple, saved: tuple[list[Any], GraphDef, Note], groups: Sequence[Sequence[Any]]
    ) -> tuple[Any, Any]:
        """What `jax.custom_vjp` calls for the backward pass: cotangents of what came back -> of what went in."""
        values, graphdef, note = saved
        residuals, _ = unflatten_graph(graphdef.root, values)
        crossing, like = self.crossing, Likeness(self.crossing.walked, self.mode)
        cotangents = ungroup(crossing.labels, groups, note.labels)
        changed = dict(zip(note.changed, cotangents))
        updates = like.show([changed.get(n) for n in range(len(crossing.numbers))])
        output = Output.of(note, self.mode)
        out = output.show(cotangents[len(cotangents) - sum(output.sent) :])
        bwd = self.owner.bwd
        assert bwd is not None
        if self.mode.live:
            result = bwd(*static, residuals, (updates, out))
        elif "updates_g" in inspect.signature(bwd).parameters:
            result = bwd(*static, residuals, out, updates_g=updates)
        else:
            result = bwd(*static, residuals, out)
        found = like.read(_per_argument(result, crossing.walked.treedef), "the result of bwd", self.is_wanted)
        for path, x, shape in zip(crossing.paths, found, self.shapes):
            if x is not None and np.shape(x) != shape:
                raise ShapeError(
                    "the result of bwd has another shape than its argument",
                    at=show_path(path),
                    got=np.shape(x),
                    expected=shape,
                )
        return [found[n] for n in crossing.order[0]], [None] * len(crossing.order[1])

    def changed(self, note: Note) -> str:
        """What a trace brought back, in words."""
        paths = [show_path(self.crossing.paths[n]) for n in note.changed]
        return f"{len(note.labels) - len(paths)} results and changes of {', '.join(paths) or 'no Variable'}"

    def is_wanted(self, n: int) -> bool:
        """Whether the leaf at this position is differentiated."""
        return self.crossing.leaf_labels[n] is DIFF


def _plain(x: Any) -> Any:
    """The value of what `symbolic_zeros=True` wraps."""
    return x.value if isinstance(x, CustomVJPPrimal) else x


def _per_argument(result: Any, treedef: Any) -> tuple:
    """One cotangent per argument, where None stands for zeros.

    Raises:
        AutodiffError: there are more or fewer.
    """
    children = treedef.children()
    if not isinstance(result, (tuple, list)) or len(result) != len(children):
        got = f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, (tuple, list)) else "")
        raise AutodiffError(
            "Custom VJP bwd rule must produce an output with the same container (pytree) structure as the arguments",
            got=got,
            expected=f"a tuple of {len(children)}",
        )
    return tuple(child.unflatten([None] * child.num_leaves) if x is None else x for child, x in zip(children, result))


def custom_vjp(
    fun: Any = MISSING,
    *,
    nondiff_argnums: tuple[int | DiffState, ...] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`fun` with a backward rule of its own, which `fun.defvjp(fwd, bwd)` sets.

    Args:
        nondiff_argnums: arguments that are no arrays. A DiffState says which Variables of an argument *are*
            differentiated.

    >>> @custom_vjp
    ... def clipped(x):
    ...     return x
    >>> clipped.defvjp(lambda x: (x, None), lambda res, g: (jax.numpy.clip(g[1], -1, 1),))
    >>> float(jax.grad(lambda x: 5 * clipped(x))(2.0))
    1.0
    """
    if fun is MISSING:
        return functools.partial(custom_vjp, nondiff_argnums=nondiff_argnums, graph=graph, graph_updates=graph_updates)
    return CustomVjp(fun, Mode.of("custom_vjp", graph, graph_updates), nondiff_argnums)
