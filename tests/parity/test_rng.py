# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same keys as in Flax, bit for bit, through everything that changes streams."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from batiste import nnx


def plain(x):
    """What two libraries can be compared by: names, key data, counts, and the order of things."""
    if isinstance(x, (nnx.Variable, flax_nnx.Variable)):
        x = x.get_value()
    if isinstance(x, jax.Array):
        return (
            jax.random.key_data(x).tolist() if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x).tolist()
        )
    if isinstance(x, (nnx.RngStream, flax_nnx.RngStream)):
        return x.tag, plain(x.key), plain(x.count), x.key.tag, x.count.tag, str(x.count.dtype)
    if isinstance(x, (nnx.Rngs, flax_nnx.Rngs)):
        return {name: plain(stream) for name, stream in x.items()}
    if isinstance(x, dict):
        return {name: plain(part) for name, part in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(part) for part in x]
    return x


def streams(ns, used=2):
    rngs = ns.Rngs(0, dropout=jax.random.key(7), noise=2)
    for _ in range(used):
        rngs()
    rngs.dropout()
    return rngs


def model(ns):
    class Noisy(ns.Module):
        def __init__(self, rngs):
            self.rngs = rngs
            self.own = rngs.dropout.fork()
            self.weight = ns.Param(rngs.params.normal((2,)))

    return Noisy(streams(ns))


def parts(m):
    return [m.rngs, m.own, m.weight]


def in_place(change):
    """A case of a function that changes streams in place: what it leaves, what it keeps, and how it is undone."""

    def case(ns):
        m = model(ns)
        backups = change(ns, m)
        after, kept = plain(parts(m)), plain([list(b) for b in backups])
        ns.restore_rngs(backups)
        again = model(ns)
        with change(ns, again):
            inside = plain(parts(again))
        return after, kept, plain(parts(m)), inside, plain(parts(again))

    return case


def copied(change):
    """A case of a function that returns a copy with other streams."""

    def case(ns):
        m = model(ns)
        new = change(ns, m)
        return plain(parts(new)), plain(parts(m)), new.weight is m.weight, new is m

    return case


def decorated(decorate):
    """A case of a decorator, for positional and keyword arguments."""

    def case(ns):
        @decorate(ns)
        def f(first, number, *, named):
            return plain([first, named]), number, first is m

        m = streams(ns)
        return f(m, 3, named=ns.Rngs(named=3)), f.__name__, plain(m)

    return case


CASES = {
    "an int": lambda ns: ns.Rngs(3),
    "a bool": lambda ns: ns.Rngs(True),
    "a key": lambda ns: ns.Rngs(jax.random.key(1)),
    "a raw key": lambda ns: ns.Rngs(jax.random.PRNGKey(1)),
    "keys": lambda ns: ns.Rngs(
        a=jax.random.split(jax.random.key(0), 3), b=jax.random.split(jax.random.PRNGKey(0), (2, 3))
    ),
    "another implementation": lambda ns: [(r := ns.Rngs(jax.random.key(0, impl="rbg")))(), r.normal((2,)), r],
    "names": lambda ns: ns.Rngs(0, params=1, dropout=jax.random.key(2)),
    "a mapping": lambda ns: ns.Rngs({"params": 0, "dropout": jax.random.key(2)}, noise=4, params=1),
    "a used stream": lambda ns: [ns.Rngs(streams(ns).default), ns.Rngs(other=streams(ns).dropout)],
    "nothing": lambda ns: [ns.Rngs(), len(ns.Rngs()), list(ns.Rngs())],
    "a stream": lambda ns: [(s := ns.RngStream(3, tag="a"))(), s(), s],
    "drawing": lambda ns: [(r := streams(ns))(), r.params(), r.dropout(), r["noise"](), r["none"](), r.default(), r],
    "as a mapping": lambda ns: [
        list(streams(ns)),
        len(streams(ns)),
        [n for n, _ in streams(ns).items()],
        "noise" in streams(ns),
        "params" in streams(ns),
        "key" in streams(ns),
    ],
    "state": lambda ns: [(path, type(v).__name__, v) for path, v in ns.to_flat_state(ns.state(streams(ns)))],
    "kinds": lambda ns: [
        [p for p, _ in ns.to_flat_state(ns.state(streams(ns), f))] for f in (ns.RngKey, ns.RngCount, "noise")
    ],
    "stream fork": lambda ns: [(r := streams(ns)).default.fork(), r],
    "stream split": lambda ns: [(r := streams(ns)).default.split(3), r.default.split((2, 2)), r.noise.split(()), r],
    "stream broadcast": lambda ns: [(r := streams(ns)).default.broadcast(3), r.noise.broadcast((2, 2)), r],
    "fork": lambda ns: [(r := streams(ns)).fork(), r],
    "fork some to a shape": lambda ns: [(r := streams(ns)).fork(split={"dropout": 2, "noise": None}), r],
    "fork to a shape": lambda ns: [(r := streams(ns)).fork(split=(2, 1)), r],
    "split": lambda ns: [(r := streams(ns)).split(2), r],
    "split some": lambda ns: [(r := streams(ns)).split({"dropout": 2}), r],
    "split by filters": lambda ns: [(r := streams(ns)).split({"dropout": None, ns.Not("noise"): (2, 1), ...: 3}), r],
    "broadcast": lambda ns: [(r := streams(ns)).broadcast(2), r.broadcast(None), r],
    "broadcast some": lambda ns: [(r := streams(ns)).broadcast({"dropout": 2, ...: None}), r],
    "mapped": lambda ns: jax.vmap(lambda r: [r.params(), r.params(), r.dropout(), r])(
        ns.Rngs(params=0, dropout=1).split(3)
    ),
    "in a jitted function": lambda ns: [
        (r := streams(ns)) and jax.jit(lambda r: [r(), r.noise.uniform((2,)), r])(r),
        r,
    ],
    "made in a jitted function": lambda ns: jax.jit(lambda key: [(r := ns.Rngs(a=key)).a(), r.a(), r])(
        jax.random.key(3)
    ),
    "split_rngs": in_place(lambda ns, m: ns.split_rngs(m, splits=3)),
    "split_rngs to a shape": in_place(lambda ns, m: ns.split_rngs([m, m], splits=(2, 1))),
    "split_rngs only": in_place(lambda ns, m: ns.split_rngs(m, splits=2, only="dropout")),
    "split_rngs path": in_place(lambda ns, m: ns.split_rngs({"m": m}, splits=2, only=ns.PathContains("own"))),
    "split_rngs keys": in_place(lambda ns, m: ns.split_rngs(m, splits=2, only=ns.RngKey)),
    "split_rngs squeeze": in_place(lambda ns, m: ns.split_rngs(m, splits=1, squeeze=True)),
    "split_rngs copy": copied(lambda ns, m: ns.split_rngs(m, splits=3, only=ns.Not("noise"), graph_updates=False)),
    "split_rngs copy squeezed": copied(lambda ns, m: ns.split_rngs(m, splits=1, squeeze=True, graph_updates=False)),
    "split_rngs tree": copied(lambda ns, m: ns.split_rngs(m, splits=(3, 2), graph=False)),
    "split_rngs decorator": decorated(lambda ns: ns.split_rngs(splits=2, only=ns.Not("named"))),
    "split_rngs copying decorator": decorated(lambda ns: ns.split_rngs(splits=2, only=ns.Not("named"), graph=False)),
    "split_rngs of a stream": lambda ns: [
        ns.split_rngs(s := ns.RngStream(0, tag="a"), splits=2).__enter__() and None,
        s,
    ],
    "fork_rngs": in_place(lambda ns, m: ns.fork_rngs(m)),
    "fork_rngs by filters": in_place(lambda ns, m: ns.fork_rngs(m, split={"dropout": 2, "noise": None})),
    "fork_rngs to a shape": in_place(lambda ns, m: ns.fork_rngs(m, split=(2, 3))),
    "fork_rngs of nothing": in_place(lambda ns, m: ns.fork_rngs(m, split={})),
    "fork_rngs copy": copied(lambda ns, m: ns.fork_rngs(m, graph_updates=False)),
    "fork_rngs tree": copied(lambda ns, m: ns.fork_rngs(m, split={"dropout": 2}, graph=False)),
    "fork_rngs copy, first match": copied(
        lambda ns, m: ns.fork_rngs(m, split={"dropout": 2, ...: None}, graph_updates=False)
    ),
    "fork_rngs decorator": decorated(lambda ns: ns.fork_rngs()),
    "fork_rngs copying decorator": decorated(lambda ns: ns.fork_rngs(graph_updates=False)),
    "with_rngs": copied(lambda ns, m: ns.with_rngs(m, graph_updates=False)),
    "with_rngs split": copied(lambda ns, m: ns.with_rngs(m, split=2, graph=False)),
    "with_rngs split some, fork the rest": copied(
        lambda ns, m: ns.with_rngs(m, split={"noise": 3}, fork=..., graph=False)
    ),
    "with_rngs all three": copied(
        lambda ns, m: ns.with_rngs(m, split={"noise": (2, 2)}, broadcast={"dropout": 2}, fork=True, graph_updates=False)
    ),
    "with_rngs fork some": copied(lambda ns, m: ns.with_rngs(m, fork=["dropout", ns.Not("noise")], graph=False)),
    "with_rngs split before fork": copied(lambda ns, m: ns.with_rngs(m, split=2, fork="dropout", graph=False)),
    "with_rngs split before broadcast": copied(
        lambda ns, m: ns.with_rngs(m, split=2, broadcast={"noise": 3}, graph=False)
    ),
    "with_rngs first match": copied(
        lambda ns, m: ns.with_rngs(m, split={"dropout": 2, ns.Not("noise"): 4}, graph=False)
    ),
    "with_rngs only": copied(lambda ns, m: ns.with_rngs(m, split=2, only="dropout", graph_updates=False)),
    "with_rngs only one": copied(
        lambda ns, m: ns.with_rngs(m, split=2, only=ns.PathContains("own"), graph_updates=False)
    ),
    "with_rngs decorator": decorated(lambda ns: ns.with_rngs(fork=..., graph=False)),
    "reseed": lambda ns: [ns.reseed(m := model(ns), dropout=42, default=jax.random.key(9)), *parts(m)],
    "reseed with a raw key": lambda ns: [ns.reseed(m := model(ns), dropout=jax.random.PRNGKey(9)), *parts(m)],
    "reseed a tree": lambda ns: [ns.reseed(m := model(ns), graph=False, dropout=42, absent=1), *parts(m)],
    "reseed to a shape": lambda ns: [
        ns.reseed(m := streams(ns).split((2, 3)), policy="match_shape", noise=4, dropout=5),
        m,
    ],
    "reseed by a function": lambda ns: [
        ns.reseed(
            m := {"a": streams(ns).split(2)}, noise=4, policy=lambda path, key, shape: jax.random.split(key, len(path))
        ),
        m,
    ],
    "backup_keys": lambda ns: [
        (m := model(ns)) and None,
        *parts(m),
        ns.restore_rngs(ns.compat.backup_keys(m)),
        *parts(m),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_the_streams_hold_the_same(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The 'split' argument of 'fork'", category=DeprecationWarning)
        ours, theirs = CASES[name](nnx), CASES[name](flax_nnx)
    assert plain(ours) == plain(theirs)


SAMPLERS = {
    "ball": (3,),
    "bernoulli": (),
    "beta": (1.0, 2.0),
    "binomial": (4, 0.5),
    "bits": (),
    "categorical": (jnp.ones(3),),
    "cauchy": (),
    "chisquare": (2.0,),
    "choice": (5,),
    "dirichlet": (jnp.ones(3),),
    "double_sided_maxwell": (0.0, 1.0),
    "exponential": (),
    "f": (2.0, 3.0),
    "gamma": (2.0,),
    "generalized_normal": (2.0,),
    "geometric": (0.5,),
    "gumbel": (),
    "laplace": (),
    "loggamma": (2.0,),
    "logistic": (),
    "lognormal": (),
    "maxwell": (),
    "multinomial": (5, jnp.ones(3) / 3),
    "multivariate_normal": (jnp.zeros(2), jnp.eye(2)),
    "normal": ((3,), jnp.float16),
    "orthogonal": (3,),
    "pareto": (2.0,),
    "permutation": (5,),
    "poisson": (3.0,),
    "rademacher": (),
    "randint": ((3,), 0, 9),
    "rayleigh": (1.0,),
    "t": (3.0,),
    "triangular": (0.0, 0.3, 1.0),
    "truncated_normal": (-1.0, 1.0),
    "uniform": ((2,),),
    "wald": (1.0,),
    "weibull_min": (1.0, 2.0),
}
INITIALIZERS = {
    "delta_orthogonal": (),
    "glorot_normal": (),
    "glorot_uniform": (),
    "he_normal": (),
    "he_uniform": (),
    "kaiming_normal": (),
    "kaiming_uniform": (),
    "lecun_normal": (),
    "lecun_uniform": (),
    "variance_scaling": (1.0, "fan_in", "uniform"),
    "xavier_normal": (),
    "xavier_uniform": (),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_the_same(name):
    def case(ns):
        rngs = streams(ns)
        return [getattr(rngs, name)(*SAMPLERS[name]), getattr(rngs.noise, name)(*SAMPLERS[name]), rngs]

    assert plain(case(nnx)) == plain(case(flax_nnx))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_an_initializer_draws_the_same(name):
    def case(ns):
        rngs = streams(ns)
        first, second = getattr(rngs, name)(*INITIALIZERS[name]), getattr(rngs.noise, name)(*INITIALIZERS[name])
        return [first((3, 3, 4, 5)), first((3, 3, 4, 5), jnp.float32), second((3, 3, 4, 5)), rngs]

    assert plain(case(nnx)) == plain(case(flax_nnx))


def test_every_sampler_of_flax_is_there():
    public = lambda cls: {name for name in dir(cls) if not name.startswith("_")}
    assert public(flax_nnx.Rngs) <= public(nnx.Rngs)
    assert public(flax_nnx.RngStream) <= public(nnx.RngStream)
    assert set(SAMPLERS) | set(INITIALIZERS) | {"fork", "split", "broadcast"} == public(flax_nnx.RngStream)
