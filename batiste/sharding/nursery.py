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
            return init(key, shape, dtype)
        return computed(init, key, tuple(shape), dtype, self.birthplace(tuple(shape)))


def is_model(root: Any) -> bool:
    """Whether an object has a place of its own: modules and optimizers have, streams and scopes have not."""
    return isinstance(root, Module) or (type(root)._pytree__is_pytree and not isinstance(root, (Rngs, RngStream)))


def computed(init: Callable[..., Any], key: Any, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """`init(key, shape, dtype)` with its result in this place; initialisers that do the same share one program."""
    metadata: list[VariableMetadata] = []

    def value(key: Any) -> Any:
        made = init(key, shape, dtype)
        if type(made) is VariableMetadata:
            metadata.append(made)
            return made.raw_value
        return made

    made = birth_program(value, key, sharding)(key)
    return dataclasses.replace(metadata[0], raw_value=made) if metadata else made


_programs: dict[Any, Callable[[Any], Any]] = {}


def birth_program(value: Callable[[Any], Any], key: Any, sharding: NamedSharding) -> Callable[[Any], Any]:
    """The compiled `value`, one for all functions that are traced to the same program."""
    closed, out = jax.make_jaxpr(value, return_shape=True)(key)
    program = jax.jit(value, out_shardings=sharding)
    if closed.consts:
        return program
    return _programs.setdefault((str(closed), jax.tree.structure(out), sharding), program)
