# SPDX-License-Identifier: Apache-2.0
"""Random streams: a base key and a count.

    key(n) = fold_in(base key, n),   n = 0, 1, 2, …

An `RngStream` holds the two as Variables, so that transforms carry the count along and can split the key. `Rngs` is a
set of streams with names. A stream that lacks a name's own falls back to the stream `default`.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from .errors import RngError
from .filters import Filter, Predicate, to_predicate
from .pytree import Pytree
from .represent import Layout
from .variable import Variable

Shape = int | tuple[int, ...]


class RngState(Variable[jax.Array]):
    """A Variable of a random stream; `tag` is the stream's name."""

    __slots__ = ()
    tag: str

    def __batiste_repr__(self) -> Layout:
        return dataclasses.replace(super().__batiste_repr__(), kind="RngState")  # keys and counts are counted as one


class RngKey(RngState):
    """The base key of a stream."""

    __slots__ = ()


class RngCount(RngState):
    """How many keys a stream has given."""

    __slots__ = ()


class MissingStreamError(RngError, AttributeError, KeyError):
    """A random stream was asked for that is not there, and there is no `default` to stand in."""

    __str__ = Exception.__str__  # KeyError's would show the text in quotes


# ---------------------------------------------------------------- drawing
def _sampler(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    @functools.wraps(function)
    def draw(self: Callable[[], jax.Array], *args: Any, **kwargs: Any) -> jax.Array:
        return function(self(), *args, **kwargs)

    draw.__doc__ = f"`jax.random.{function.__name__}` with the next key of the stream."
    return draw


def _initializer(constructor: Callable[..., Callable[..., jax.Array]]) -> Callable[..., Callable[..., jax.Array]]:
    def make(self: Callable[[], jax.Array], *args: Any, **kwargs: Any) -> Callable[..., jax.Array]:
        initializer = constructor(*args, **kwargs)

        def initialize(*args: Any, **kwargs: Any) -> jax.Array:
            return initializer(self(), *args, **kwargs)

        return initialize

    make.__name__ = constructor.__name__
    make.__doc__ = f"`jax.nn.initializers.{constructor.__name__}` that takes its key from the stream at each call."
    return make


class Draws:
    """The functions of `jax.random` and the initialisers as methods of something that gives a key when it is called.

    >>> Rngs(0).normal((2,)).shape, Rngs(0).lecun_normal()((2, 3)).shape
    ((2,), (2, 3))
    """

    ball = _sampler(jax.random.ball)
    bernoulli = _sampler(jax.random.bernoulli)
    beta = _sampler(jax.random.beta)
    binomial = _sampler(jax.random.binomial)
    bits = _sampler(jax.random.bits)
    categorical = _sampler(jax.random.categorical)
    cauchy = _sampler(jax.random.cauchy)
    chisquare = _sampler(jax.random.chisquare)
    choice = _sampler(jax.random.choice)
    dirichlet = _sampler(jax.random.dirichlet)
    double_sided_maxwell = _sampler(jax.random.double_sided_maxwell)
    exponential = _sampler(jax.random.exponential)
    f = _sampler(jax.random.f)
    gamma = _sampler(jax.random.gamma)
    generalized_normal = _sampler(jax.random.generalized_normal)
    geometric = _sampler(jax.random.geometric)
    gumbel = _sampler(jax.random.gumbel)
    laplace = _sampler(jax.random.laplace)
    loggamma = _sampler(jax.random.loggamma)
    logistic = _sampler(jax.random.logistic)
    lognormal = _sampler(jax.random.lognormal)
    maxwell = _sampler(jax.random.maxwell)
    multinomial = _sampler(jax.random.multinomial)
    multivariate_normal = _sampler(jax.random.multivariate_normal)
    normal = _sampler(jax.random.normal)
    orthogonal = _sampler(jax.random.orthogonal)
    pareto = _sampler(jax.random.pareto)
    permutation = _sampler(jax.random.permutation)
    poisson = _sampler(jax.random.poisson)
    rademacher = _sampler(jax.random.rademacher)
    randint = _sampler(jax.random.randint)
    rayleigh = _sampler(jax.random.rayleigh)
    t = _sampler(jax.random.t)
    triangular = _sampler(jax.random.triangular)
    truncated_normal = _sampler(jax.random.truncated_normal)
    uniform = _sampler(jax.random.uniform)
    wald = _sampler(jax.random.wald)
    weibull_min = _sampler(jax.random.weibull_min)

    delta_orthogonal = _initializer(initializers.delta_orthogonal)
    glorot_normal = _initializer(initializers.glorot_normal)
    glorot_uniform = _initializer(initializers.glorot_uniform)
    he_normal = _initializer(initializers.he_normal)
    he_uniform = _initializer(initializers.he_uniform)
    kaiming_normal = _initializer(initializers.kaiming_normal)
    kaiming_uniform = _initializer(initializers.kaiming_uniform)
    lecun_normal = _initializer(initializers.lecun_normal)
    lecun_uniform = _initializer(initializers.lecun_uniform)
    variance_scaling = _initializer(initializers.variance_scaling)
    xavier_normal = _initializer(initializers.xavier_normal)
    xavier_uniform = _initializer(initializers.xavier_uniform)


@functools.partial(jax.jit, inline=True)
def _advance(key: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key of this count, and the next count: one dispatch instead of many when a model is built outside jit."""
    return jax.random.fold_in(key, count), count + 1


def as_key(value: Any) -> jax.Array:
    """A typed key from an int seed, a typed key, or a raw uint32 key.

    Raises:
        RngError: `value` is none of them.
    """
    if isinstance(value, int):
        return jax.random.key(value)
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        if value.dtype == jnp.uint32 and value.ndim:
            return jax.random.wrap_key_data(value)
    got = type(value).__name__ if isinstance(value, (Pytree, Variable)) else repr(value)
    if isinstance(value, Pytree):
        fix = "pass the Rngs itself to the layers, or rngs.fork() for streams of their own"
    elif isinstance(value, Variable):
        fix = "pass the key in it: variable.get_value()"
    else:
        fix = "pass a Python int, or jax.random.key(seed)"
    expected = "an int or a jax.Array of jax.dtypes.prng_key sub-dtype"
    raise RngError("Invalid rng value", got=got, expected=expected, fix=fix)


def as_shape(k: Any) -> tuple[int, ...]:
    return (k,) if isinstance(k, int) else tuple(k)


class RngStream(Draws, Pytree):
    """key(n) = fold_in(key, n), n = 0, 1, 2, …: calling the stream gives the next key.

    >>> stream = RngStream(0, tag="dropout")
    >>> bool(stream() == jax.random.fold_in(jax.random.key(0), 0)), int(stream.count[...])
    (True, 1)

    Raises:
        RngError: the key is none, or has been split.
        TraceContextError: the stream was made at another trace level, where it would give the same key again.
    """

    def __init__(self, key: jax.Array | int, *, tag: str):
        key = as_key(key)
        self.tag = tag
        self.key = RngKey(key, tag=tag)
        self.count = RngCount(jnp.zeros(key.shape, jnp.uint32), tag=tag)

    def __call__(self) -> jax.Array:
        counter = self.count
        if not (counter.ref or counter.hijax):
            counter._check_can_update()  # before the draw: a key of another trace level cannot even be read
        key, count = self.key.get_value(), counter.get_value()
        if key.shape:
            raise RngError(
                f"fold_in accepts a single key: stream {self.tag!r} was split", got=f"keys of shape {key.shape}",
                expected="shape ()", fix="map over the stream with vmap or scan, or restore it with restore_rngs",
            )  # fmt: skip
        key, count = _advance(key, count)
        counter.set_value(count)
        return key

    def split(self, k: Shape) -> RngStream:
        """A stream whose keys have shape `k`, for vmap and scan: a fresh key, split."""
        shape = as_shape(k)
        return RngStream(jax.random.split(self(), shape), tag=self.tag)

    def fork(self, *, split: Shape | None = None) -> RngStream:
        """A stream of its own, from a fresh key of this one."""
        if split is None:
            return RngStream(self(), tag=self.tag)
        warnings.warn("The 'split' argument of 'fork' is deprecated; use the 'split' method instead.",
                      DeprecationWarning, stacklevel=2)  # fmt: skip
        return self.split(split)

    def broadcast(self, k: Shape) -> RngStream:
        """A stream whose keys have shape `k` and are all the same fresh key."""
        return RngStream(jnp.broadcast_to(self(), as_shape(k)), tag=self.tag)


class Rngs(Draws, Pytree):
    """Named random streams: `rngs.params()` gives the next key of `params`; a missing stream is `default`'s.

    Args:
        default: the seed or key of the stream `default`, or a mapping from names to seeds, keys and streams.
        rngs: seeds, keys or streams by name.

    >>> rngs = Rngs(0, params=1)
    >>> bool(rngs.params() == jax.random.fold_in(jax.random.key(1), 0))
    True
    >>> bool(rngs.dropout() == jax.random.fold_in(jax.random.key(0), 0))  # there is no `dropout`: `default` stands in
    True

    Raises:
        RngError: a value is neither an int nor a key.
    """

    def __init__(self, default: Any = None, **rngs: Any):
        if isinstance(default, Mapping):
            rngs = {**default, **rngs}
        elif default is not None:
            rngs["default"] = default
        for name, value in rngs.items():
            key = value.key.get_value() if isinstance(value, RngStream) else value
            setattr(self, name, RngStream(key, tag=name))

    def __call__(self) -> jax.Array:
        return self.default()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._stand_in(name)

    def __getitem__(self, name: str) -> RngStream:
        stream = vars(self).get(name)
        return stream if isinstance(stream, RngStream) else self._stand_in(name)

    def _stand_in(self, name: str) -> RngStream:
        stream = vars(self).get("default")
        if not isinstance(stream, RngStream):
            raise MissingStreamError(
                f"No RngStream named '{name}' found in Rngs", got=f"the streams {list(self)}",
                fix=f"write Rngs({name}=seed) for this stream, or Rngs(seed) for a default that stands in for all",
            )  # fmt: skip
        return stream

    def items(self) -> Iterator[tuple[str, RngStream]]:
        """Names and streams, in the order they were given."""
        return ((name, stream) for name, stream in vars(self).items() if isinstance(stream, RngStream))

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __len__(self) -> int:
        return sum(1 for _ in self.items())

    def __contains__(self, name: Any) -> bool:
        return isinstance(vars(self).get(name), RngStream)

    def split(self, k: Mapping[Filter, Shape | None] | Shape | None) -> Rngs:
        """Streams whose keys have shape `k`; a mapping from filters to shapes leaves out what it maps to None.

        >>> rngs = Rngs(params=1, dropout=2, noise=3).split({"params": 5, "dropout": None, ...: (2, 5)})
        >>> rngs.params.key.shape, rngs.dropout.key.shape, rngs.noise.key.shape
        ((5,), (), (2, 5))
        """
        return Rngs({name: stream if k is None else stream.split(k) for name, stream, k in self._shapes(k)})

    def broadcast(self, k: Mapping[Filter, Shape | None] | Shape | None) -> Rngs:
        """Streams of `k` equal fresh keys; a mapping from filters to shapes leaves out what it maps to None.

        >>> Rngs(0).broadcast(5).default.key.shape
        (5,)
        """
        return Rngs({name: stream if k is None else stream.broadcast(k) for name, stream, k in self._shapes(k)})

    def fork(self, /, *, split: Mapping[Filter, Shape | None] | Shape | None = None) -> Rngs:
        """Streams of their own, each from a fresh key of the stream of the same name.

        >>> rngs = Rngs(0)
        >>> bool(rngs.fork().default() == rngs.default())
        False
        """
        return Rngs({name: stream.fork(split=k) for name, stream, k in self._shapes(split)})

    def _shapes(self, k: Any) -> Iterator[tuple[str, RngStream, Shape | None]]:
        """Each stream with the shape of the first filter that matches it."""
        rules = by_filter(k)
        for name, stream in self.items():
            yield name, stream, next((shape for _, matches, shape in rules if matches((), stream)), None)


def by_filter(shapes: Mapping[Filter, Any] | Any) -> list[tuple[Filter, Predicate, Any]]:
    """The rules `(filter, its predicate, shape)` of a mapping from filters to shapes; a single shape is for all."""
    pairs = shapes.items() if isinstance(shapes, Mapping) else [(..., shapes)]
    return [(f, to_predicate(f), shape) for f, shape in pairs]
