# SPDX-License-Identifier: Apache-2.0
"""Transformed functions with their first arguments fixed.

A jitted function remembers the traversal of its arguments anyway (`batiste.graph.plan`). What these two add is a
promise: the structure of the fixed objects is that of the moment they were fixed, and stays so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from batiste.graph.boundary import Mode, is_root
from batiste.graph.epoch import Epoch
from batiste.graph.errors import ArgumentError, StructureError
from batiste.graph.flatten import flatten_graph
from batiste.graph.structure import GraphDef
from batiste.graph.unflatten import unflatten_graph

from .compare import difference
from .compile import JitWrapped, Stage


def _pinned(args: tuple, mode: Mode) -> tuple[GraphDef, list[Any], tuple]:
    """The structure of the arguments, their leaves, and copies of their objects around the same Variables."""
    flat = flatten_graph(args, graph=mode.graph, what=mode.name)
    return flat.graphdef, flat.leaves, unflatten_graph(flat.graphdef.root, flat.leaves)[0]


def cached_partial(f: Callable[..., Any], *cached_args: Any, graph: bool | None = None,
                   graph_updates: bool | None = None) -> Callable[..., Any]:  # fmt: skip
    """`f` with its first arguments fixed: a function of the others.

    Modules among them are copied around the same Variables: values are shared, later changes of structure are not seen.

    Raises:
        ArgumentError: objects are taken as trees, or without updates.
        StructureError: when called: `f` changed the structure of a fixed object.
    """
    mode = Mode.of("cached_partial", graph, graph_updates)
    if not mode.live:
        raise ArgumentError("cached_partial is a graph-mode-only API and requires graph_updates=True",
                            fix="pass graph=True and graph_updates=True, or use nnx.jit_partial")  # fmt: skip
    structure, leaves, args = _pinned(cached_args, mode)
    epoch = Epoch.now

    @functools.wraps(f)
    def partial(*others: Any, **kwargs: Any) -> Any:
        nonlocal args, epoch
        out = f(*args, *others, **kwargs)
        if epoch != Epoch.now:  # some structure has changed, perhaps that of a fixed object
            found = flatten_graph(args).graphdef
            if found != structure:
                args = unflatten_graph(structure.root, leaves)[0]
                raise StructureError(
                    "The graph structure of a node added to cached_partial was mutated inside the transformation, "
                    f"this is not allowed: {difference(structure.root, found.root, ('argument',))}",
                    fix="undo the change before the function returns, or call it without cached_partial",
                )
            epoch = Epoch.now
        return out

    return partial


class JitPartial:
    """What `jit_partial` returns."""

    def __init__(self, jitted: JitWrapped, partial_args: tuple):
        self.jitted, self.partial_args = jitted, partial_args
        functools.update_wrapper(self, jitted.fun)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted(*self._all(args, kwargs), **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Stage:
        return self.jitted.lower(*self._all(args, kwargs), **kwargs).with_fixed(*self.partial_args)

    def trace(self, *args: Any, **kwargs: Any) -> Stage:
        return self.jitted.trace(*self._all(args, kwargs), **kwargs).with_fixed(*self.partial_args)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted.eval_shape(*self._all(args, kwargs), **kwargs)

    def _all(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        if any(is_root(x) for x in jax.tree.leaves((args, kwargs), is_leaf=is_root)):
            raise ArgumentError("Found Variable in non-partial arguments, where jit_partial takes only arrays",
                                fix="pass it to jit_partial, or use nnx.jit")  # fmt: skip
        return (*self.partial_args, *args)

    def __repr__(self) -> str:
        return f"<nnx.jit_partial of {self.jitted.fun!r}>"


def jit_partial(fun: Callable[..., Any], *partial_args: Any, in_shardings: Any = None, out_shardings: Any = None,
                static_argnums: int | Sequence[int] | None = None, static_argnames: str | Iterable[str] | None = None,
                donate_argnums: int | Sequence[int] | None = None, donate_argnames: str | Iterable[str] | None = None,
                keep_unused: bool = False, device: Any = None, backend: str | None = None, inline: bool = False,
                graph: bool | None = None, graph_updates: bool | None = None) -> JitPartial:  # fmt: skip
    """`jit` with the first arguments fixed, without graph updates: values travel, changes of structure do not.

    Numbers of arguments, and a tuple of shardings, count the fixed ones too. All Variables are among these.

    Raises:
        ArgumentError: graph updates are asked for, or (when called) another argument is an object.
    """
    mode = Mode.of("jit_partial", graph, graph_updates)
    if mode.live:
        raise ArgumentError("`graph_updates` not supported by `jit_partial`",
                            fix="pass graph_updates=False, or use nnx.cached_partial")  # fmt: skip
    options: dict[str, Any] = {"keep_unused": keep_unused, "inline": inline}
    options |= {name: x for name, x in (("device", device), ("backend", backend)) if x is not None}
    jitted = JitWrapped(fun, mode, in_shardings, out_shardings, static_argnums, static_argnames, donate_argnums,
                        donate_argnames, **options)  # fmt: skip
    return JitPartial(jitted, _pinned(partial_args, mode)[2])
