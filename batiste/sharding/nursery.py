# SPDX-License-Identifier: Apache-2.0
"""Where values are born while a plan is in use: spread over the devices, until the path of each is known."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

from batiste.graph import Module, Rngs, RngStream, VariableMetadata
from batiste.graph.birth import drawn
from batiste.graph.errors import TraceContextError
from batiste.graph.placement import put


class Nursery:
    """Makes the values of a model under construction, and has them sent to their places when it stands.

    Args:
        birthplace: the sharding of a value of this shape whose path is not known yet.
        settle: sends all values of an object to their places.
    """

    def __init__(self, birthplace: Callable[[tuple[int, ...]], NamedSharding], settle: Callable[[Any], None]):
        self.birthplace, self.settle, self.depth = birthplace, settle, 0

    @contextlib.contextmanager
    def raising(self, root: Any) -> Iterator[None]:
        """Around the constructor of an object; the outermost one knows all paths."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.depth == 0 and is_model(root):
            self.settle(root)

    def born(self, init: Callable[..., Any], key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """`init(key, shape, dtype)`, computed where it is to be."""
        if self.depth == 0:  # no constructor that could tell its path
            return drawn(init, key, shape, dtype)
        return computed(init, key, tuple(shape), dtype, self.birthplace(tuple(shape)))


def is_model(root: Any) -> bool:
    """Whether an object has a place of its own: modules and optimizers have, streams and scopes have not."""
    return isinstance(root, Module) or (type(root)._pytree__is_pytree and not isinstance(root, (Rngs, RngStream)))


def computed(init: Callable[..., Any], key: Any, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """`init(key, shape, dtype)` with its result in this place; initialisers that do the same share one program.

    Initialisers run once, whatever else they do. Those that cannot be traced compute their value as they always do.
    """
    metadata: list[VariableMetadata] = []

    def value(key: Any) -> Any:
        made = drawn(init, key, shape, dtype)
        if type(made) is VariableMetadata:
            metadata.append(made)
            return made.raw_value
        return made

    try:
        closed, out = jax.make_jaxpr(value, return_shape=True)(key)
    except (TraceContextError, jax.errors.JAXTypeError):  # it draws from a stream of its own, or looks at numbers
        metadata.clear()
        made = jax.tree.map(lambda x: put(x, sharding), value(key))
    else:
        program = birth_program(closed.jaxpr, jax.tree.structure(out), sharding)
        made = program(closed.consts, jax.tree.leaves(key))
    return dataclasses.replace(metadata[0], raw_value=made) if metadata else made


_programs: dict[Any, Any] = {}


def birth_program(jaxpr: Any, treedef: Any, sharding: NamedSharding) -> Any:
    """`f(consts, leaves of the key)`, compiled: one for all that are written alike."""
    name = str(jaxpr), treedef, sharding
    if name not in _programs:

        def run(consts: list[Any], leaves: list[Any]) -> Any:
            return treedef.unflatten(jax.core.eval_jaxpr(jaxpr, consts, *leaves))  # type: ignore[attr-defined]

        _programs[name] = jax.jit(run, out_shardings=sharding)
    return _programs[name]
