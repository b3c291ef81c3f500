# SPDX-License-Identifier: Apache-2.0
"""Calls of functions of live objects while they are traced, and reading from a jaxpr which part made what."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from batiste.graph import Pytree, iter_graph
from batiste.graph.boundary import Boundary, Mode, is_root
from batiste.graph.errors import locate
from batiste.graph.jaxcompat import user_frames
from batiste.graph.watch import watching

PACKAGE = str(Path(__file__).parents[1])


_anew = itertools.count()


class Places:
    """The parts that were called during a trace: `path/to/part (Type)`, numbered; equations bear the number.

    >>> places = Places()
    >>> places.names.append("encoder/mlp (Mlp)")
    >>> places.of("transpose(jvp(part_0))/relu")
    'encoder/mlp (Mlp)'
    """

    TAG = re.compile(r"\bpart_(\d+)\b")

    def __init__(self) -> None:
        self.names: list[str] = []
        self._open: list[tuple[Any, str]] = []  # the calls that are running: (part, path)

    def of(self, name_stack: Any) -> str | None:
        """The innermost part that a name stack tells of."""
        numbers = self.TAG.findall(str(name_stack))
        if numbers:
            return self.names[int(numbers[-1])]
        return re.sub(r"\b[a-z]+\(|\)", "", str(name_stack)).strip("/") or None  # names that the user or Linen gave

    @contextlib.contextmanager
    def noted(self, types: set[type]) -> Iterator[None]:
        """Notes the calls of parts of these types. Programs that were traced before are traced again meanwhile."""
        with watching(types, self._report), self._traced_anew():
            yield

    @contextlib.contextmanager
    def _traced_anew(self) -> Iterator[None]:
        """A jitted function that this or another part has called before is not found in JAX's cache of traces."""
        with set_xla_metadata(batiste_places=next(_anew)):
            yield

    def _report(self, part: Any, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        path = self._path(part)
        self.names.append(f"{path or '(root)'} ({type(part).__name__})")
        self._open.append((part, path))
        try:
            with jax.named_scope(f"part_{len(self.names) - 1}"), self._traced_anew():
                return function(part, *args, **kwargs)
        finally:
            self._open.pop()

    def _path(self, part: Any) -> str:
        """Where the part stands below a part that runs; a copy inside a transform, below what holds it there."""
        for outer, path in reversed(self._open):
            for inner, x in iter_graph(outer, graph=True):
                if x is part:
                    return "/".join(filter(None, (path, *map(str, inner))))
        outer, path = self._open[-1] if self._open else (None, "")
        return "/".join(filter(None, (path, locate(part) or _like(outer, part))))


def _like(outer: Any, part: Any) -> str:
    """Where the one part of this type stands in `outer`: the part itself is a copy, made by a transform."""
    of_type = [path for path, x in iter_graph(outer, graph=True) if type(x) is type(part) and path]
    return "/".join(map(str, of_type[0])) if len(of_type) == 1 else ""


def part_types(*trees: Any) -> set[type]:
    """The types of all parts in these trees."""
    return {type(x) for tree in trees for _, x in iter_graph(tree, graph=True) if isinstance(x, Pytree)}


@dataclass(frozen=True)
class Around:
    """Where an equation stands: in which part, user's line, loop iterations, and direction."""

    module: str | None = None
    source: str | None = None
    inside: str | None = None
    iterations: tuple[str, ...] = ()
    backward: bool = False

    def at(self, eqn: Any, places: Places) -> Around:
        """Of an equation that stands directly in this one; what it does not know itself, it has from here."""
        stack = eqn.source_info.name_stack
        frames = [(f.file_name, f"{f.start_line} ({f.function_name})") for f in user_frames(eqn.source_info)]
        theirs = [f"{file}:{line}" for file, line in frames if not file.startswith(PACKAGE)]
        ours = frames[0] if frames and frames[0][0].startswith(PACKAGE) else None
        return Around(
            module=places.of(stack) or self.module,
            source=theirs[0] if theirs else self.source,
            inside=f"batiste{ours[0].removeprefix(PACKAGE)}:{ours[1]}" if ours else None,
            iterations=self.iterations,
            backward=(self.backward or "transpose(" in str(stack)) and "rematted_computation" not in str(stack),
        )

    def iteration(self, text: str) -> Around:
        return replace(self, iterations=(*self.iterations, text))


# ---------------------------------------------------------------- functions of live objects, as functions of values


def open_call(fn: Callable, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[Boundary, tuple]:
    """The passage of one call of `fn` and its values; a module, or a method of one, is an argument of the call."""
    if is_root(fn):
        args, fn = (fn, *args), type(fn).__call__
    elif inspect.ismethod(fn) and is_root(fn.__self__):
        args, fn = (fn.__self__, *args), fn.__func__
    boundary = Boundary(lambda given: fn(*given["args"], **given["kwargs"]), Mode.of(name, None, None))
    return boundary, boundary.enter({"args": args, "kwargs": kwargs})


def flat_function(boundary: Boundary) -> Callable:
    """The function of flat values, which hands its note out."""

    def run(*groups):
        return boundary.crossing.run(groups), boundary.crossing.note

    return run


def arguments(fn: Callable, boundary: Boundary, groups: tuple) -> Iterator[tuple[str, Any]]:
    """`(path, value)` of each leaf, in the order of the flat function's arguments; paths begin with argument names."""
    crossing = boundary.crossing
    paths = [crossing.paths[i] for part in crossing.order for i in part]
    names = _argument_names(fn)
    for path, held in zip(paths, (x for part in groups for x in part)):
        kind, place, *inside = path
        where = names[place] if kind == "args" and place < len(names) else str(place)
        shown = "/".join(map(str, inside if where == "self" else [where, *inside]))
        for _, x in jax.tree_util.tree_leaves_with_path(held):
            yield shown, x


def _argument_names(fn: Callable) -> list[str]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return ["self", *names] if is_root(fn) or inspect.ismethod(fn) else names


def evaluate(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of one equation of a jaxpr."""
    parameters = eqn.primitive.get_bind_params(eqn.params)
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    out = eqn.primitive.bind(*functions, *values, **parameters)
    return list(out) if eqn.primitive.multiple_results else [out]
