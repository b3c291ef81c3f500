# SPDX-License-Identifier: Apache-2.0
"""Birth: the one function in which every variable of every layer is made."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from .errors import RngError
from .jaxcompat import is_staged
from .variable import Variable

V = TypeVar("V", bound=Variable)

_describing = contextvars.ContextVar("describing", default=False)

nursery: contextvars.ContextVar[Any] = contextvars.ContextVar("nursery", default=None)
"""What makes values somewhere else than on the default device, such as on a mesh (`sharding.use`): `born(init, key,
shape, dtype)` makes one, and `raising(object)` is entered around the constructor of every object."""


class Recipe:
    """A value that is not made yet: its shape and dtype are known, its numbers are not.

    Args:
        init: the initialiser `(key, shape, dtype) -> array`.
        random: whether it is given a key.
    """

    __slots__ = ("init", "shape", "dtype", "random")

    def __init__(self, init: Callable[..., Any], shape: tuple[int, ...], dtype: Any, random: bool):
        self.init, self.shape, self.dtype, self.random = init, tuple(shape), jax.numpy.dtype(dtype), random


@contextlib.contextmanager
def describing() -> Iterator[None]:
    """Inside, `make` makes no values: a Variable holds the `Recipe` of its value."""
    token = _describing.set(True)
    try:
        yield
    finally:
        _describing.reset(token)


def drawn(init: Callable[..., Any], key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """init(key, shape, dtype); under `jit`, an initialiser of JAX is traced once for each shape and dtype."""
    if is_staged(key) and getattr(init, "__module__", None) == jax.nn.initializers.zeros.__module__:
        init = _traced_once(init)
    return init(key, shape, dtype)


@functools.lru_cache(maxsize=256)
def _traced_once(init: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(init, static_argnums=(1, 2), inline=True)


def make(kind: type[V], init: Callable[..., Any], shape: tuple[int, ...], dtype: Any,
         stream: Callable[[], jax.Array] | None = None, metadata: Mapping[str, Any] = {}) -> V:  # fmt: skip
    """`kind(init(key, shape, dtype), **metadata)`, the key drawn from `stream`.

    Args:
        kind: the type of Variable, such as `Param`.
        init: an initialiser `(key, shape, dtype) -> array`, or one that returns a `VariableMetadata`.
        stream: what gives the key; None for initialisers that use none.

    Raises:
        RngError: `stream` is no stream of keys.
    """
    if stream is not None and not callable(stream):
        raise RngError(
            "a variable needs a random stream to be drawn from",
            got=type(stream).__name__,
            expected="nnx.Rngs",
            fix="pass rngs=nnx.Rngs(0)",
        )
    if _describing.get():
        return kind(Recipe(init, shape, dtype, stream is not None), **metadata)
    key = None if stream is None else stream()
    place = nursery.get()
    value = drawn(init, key, shape, dtype) if place is None else place.born(init, key, shape, dtype)
    return kind(value, **metadata)
