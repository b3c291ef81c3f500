# SPDX-License-Identifier: Apache-2.0
"""Programs that cross between the two faces give the same numbers, trees and names as with the installed Flax."""

import warnings

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import linen, nnx

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)


def model(nnx, linen):
    """A Linen model with parameters, statistics, a counter, a record and noise."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
            count = self.variable("counter", "count", lambda: jnp.zeros(()))
            if not self.is_initializing() and train:
                count.value += 1
            self.sow("intermediates", "hidden", x)
            return linen.Dropout(0.5, deterministic=not train)(x)

        def double(self, x):
            return 2 * x

    return Model()


def node(nnx):
    """An object with a parameter that is named, statistics, a cache, a list and noise."""

    class Node(nnx.Module):
        def __init__(self, features, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
            with_eager = nnx.using_eager_sharding()
            nnx.use_eager_sharding(False)
            self.linear = nnx.Linear(3, features, kernel_init=init, rngs=rngs)
            nnx.use_eager_sharding(with_eager)
            self.norm = nnx.BatchNorm(features, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.seen = nnx.Cache(jnp.zeros(()), unit="calls")
            self.scales = nnx.List([nnx.Param(jnp.ones(features))])

        def __call__(self, x):
            self.seen[...] += 1
            return self.drop(self.norm(self.linear(x))) * self.scales[0][None]

        def calls(self):
            return self.seen[...]

    return Node


def bridged(nnx):
    """A module that is both, with parts of all sorts."""
    bridge = nnx.bridge

    class Dense(bridge.Module):
        features: int

        @bridge.compact
        def __call__(self, x):
            return x @ self.param("w", nnx.initializers.lecun_normal(), (x.shape[-1], self.features))[...]

    class Both(bridge.Module):
        features: int

        def setup(self):
            self.first = Dense(self.features)
            self.layers = [Dense(self.features, name=f"layer_{i}") for i in range(2)]

        @bridge.compact
        def __call__(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            x = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(self.features, 3, rngs=rngs))(x)
            count = self.variable("counter", "count", lambda: jnp.zeros(()))
            count[...] += 1
            self.alias = Dense(2)
            return self.alias(x)

        def head(self, x):
            return self.first(x)

    return Both


def pure(nnx, tree):
    """Nested dicts of arrays, without streams."""
    return nnx.to_pure_dict(nnx.state(tree, nnx.Not(nnx.RngState)))


# ---------------------------------------------------------------- the programs
def to_nnx(nnx, linen):
    m = nnx.bridge.ToNNX(model(nnx, linen), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    return pure(nnx, m), m(X), m.double(X), m(X, method="double"), list(m.rngs)


def to_nnx_writes_what_may_be_written(nnx, linen):
    m = nnx.bridge.ToNNX(model(nnx, linen), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    y = m(X, train=True, mutable=["batch_stats", "counter"])
    z = m(X, train=True, mutable=True)
    return y, z, pure(nnx, m), m.rngs.dropout.count[...]


def to_nnx_in_an_object(nnx, linen):
    class Wrap(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.bridge.ToNNX(model(nnx, linen), rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.inner(x))

    m = nnx.bridge.lazy_init(Wrap(nnx.Rngs(0)), X)
    grads = nnx.grad(lambda m: m(X).sum())(m)
    return pure(nnx, m), nnx.jit(lambda m, x: m(x))(m, X), nnx.to_pure_dict(grads)


def keys_of_a_call(nnx, linen):
    m = nnx.bridge.ToNNX(linen.Dense(2))
    rngs = nnx.Rngs(3, noise=1)
    m.lazy_init(X, rngs=rngs)
    other = nnx.bridge.ToNNX(linen.Dense(2)).lazy_init(X, rngs=jax.random.key(3))
    return pure(nnx, m), pure(nnx, other), rngs.default.count[...], rngs.noise.count[...]


def to_linen(nnx, linen):
    m = nnx.bridge.to_linen(node(nnx), 4, metadata_fn=None)
    y, variables = m.init_with_output({"params": KEY, "dropout": KEY}, X)
    z, updates = m.apply(variables, X, rngs={"dropout": KEY}, mutable=["batch_stats", "cache"])
    return y, variables, z, updates, m.apply({**variables, **updates}, nnx_method="calls")


def to_linen_keeps_metadata_in_boxes(nnx, linen):
    variables = nnx.bridge.to_linen(node(nnx), 4).init({"params": KEY, "dropout": KEY}, X)
    boxes = [variables["params"]["linear"]["kernel"], variables["cache"]["seen"]]
    known = ("out_sharding", "mesh", "unit")
    metadata = [{k: v for k, v in b.metadata.items() if k in known} for b in boxes]
    return [b.value for b in boxes], metadata, [b.var_type.__name__ for b in boxes]


def to_linen_in_linen(nnx, linen):
    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = nnx.bridge.to_linen(nnx.Linear, 3, 4)(x)
            x = nnx.bridge.to_linen(nnx.Linear, 4, 5)(x)
            x = nnx.bridge.to_linen(nnx.BatchNorm, 5, name="norm")(x)
            return linen.Dense(2)(x)

    variables = Outer().init(KEY, X)
    return variables, Outer().apply(variables, X, mutable=True)


def streams_of_to_linen(nnx, linen):
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.rngs, self.own = rngs, rngs.noise.fork()

        def __call__(self, x):
            return x + self.rngs.noise.normal(x.shape) + self.own.normal(x.shape)

    m = nnx.bridge.to_linen(Noisy)
    return [m.apply({}, X), m.apply({}, X, rngs={"noise": KEY}), m.apply({}, X, rngs={"noise": jax.random.key(1)})]


def linen_in_nnx_in_linen(nnx, linen):
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.bridge.lazy_init(
                nnx.bridge.ToNNX(linen.BatchNorm(use_running_average=False), rngs=rngs), X)  # fmt: skip

        def __call__(self, x):
            return self.norm(x)

    m = nnx.bridge.to_linen(Inner)
    variables = m.init(KEY, X)
    return variables, m.apply(variables, X, mutable=["batch_stats"])


def methods_of_to_linen(nnx, linen):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

        def plus(self, x):
            return self.linear(x) + 1

    class Outer(linen.Module):
        def setup(self):
            self.two = nnx.bridge.to_linen(Two)

        def __call__(self, x):
            return self.two.plus(x)

    m = nnx.bridge.to_linen(Two)
    variables = m.init(KEY, X)
    return (
        m.apply(variables, X, nnx_method="plus"), m.apply(variables, X, nnx_method=Two.plus), m.bind(variables).plus(X),
        Outer().init_with_output(KEY, X),
    )  # fmt: skip


def class_of_linen_modules(nnx, linen):
    class Linear(nnx.bridge.wrappers.to_linen_class(nnx.Linear, in_features=3)):
        pass

    return Linear(out_features=4, use_bias=False).init(KEY, X)


def without_state(nnx, linen):
    linear = nnx.bridge.functional(nnx.Linear)(3, 4)
    weights = linear.init(rngs=nnx.Rngs(0))
    y, (_, after) = linear.apply(weights)(X)
    return y, nnx.to_pure_dict(after)


def both_at_once(nnx, linen):
    m = bridged(nnx)(4)
    variables = m.init(KEY, X)
    return (
        variables, m.apply(variables, X), m.apply(variables, X, mutable=True), m.apply(variables, X, method="head"),
        m.apply(variables, X, method=lambda m, x: m.first(x)), m.init_with_output(3, X),
    )  # fmt: skip


def linen_in_both(nnx, linen):
    class Both(nnx.bridge.Module):
        @nnx.bridge.compact
        def __call__(self, x):
            x = nnx.bridge.linen_in_bridge_mdl(linen.Dense(5))(x)
            x = nnx.bridge.linen_in_bridge_mdl(linen.Dense(6), "named")(x)
            x = nnx.bridge.linen_in_bridge_mdl(linen.BatchNorm(use_running_average=False), "norm")(x)
            return nnx.bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Dropout(0.5, rngs=rngs))(x)

    rngs = {"params": KEY, "dropout": KEY}
    variables = Both().init(rngs, X)
    return variables, Both().apply(variables, X, rngs=rngs, mutable=True)


def trees_of_variables(nnx, linen):
    v = nnx.bridge.variables
    given = {"params": {"d": {"kernel": X}, "w": X}, "batch_stats": {"d": {"mean": X}}, "intermediates": {"h": (X, X)}}
    attributes = v.linen_vars_to_nnx_attrs(given)
    kinds = jax.tree.map(lambda x: type(x).__name__, attributes, is_leaf=lambda x: isinstance(x, nnx.Variable))
    types = [nnx.Param, nnx.Variable, nnx.RngKey, nnx.Perturbation, nnx.RngState, nnx.Intermediate]
    order = [t.__name__ for t in v.sort_variable_types(types)]
    return kinds, v.nnx_attrs_to_linen_vars(attributes), order


PROGRAMS = [
    to_nnx, to_nnx_writes_what_may_be_written, to_nnx_in_an_object, keys_of_a_call, to_linen,
    to_linen_keeps_metadata_in_boxes, to_linen_in_linen, streams_of_to_linen, linen_in_nnx_in_linen,
    methods_of_to_linen, class_of_linen_modules, without_state, both_at_once, linen_in_both, trees_of_variables,
]  # fmt: skip


def plain(tree):
    """Tuples of leaves and their paths, whatever the mappings are."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x: x, dicts(tree)))[0]
    return {jax.tree_util.keystr(path): np.asarray(x) if not isinstance(x, str) else x for path, x in leaves}


def dicts(x):
    if hasattr(x, "items"):
        return {str(k): dicts(v) for k, v in x.items()}
    return [dicts(v) for v in x] if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_program_gives_the_same(program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = plain(program(flax.nnx, flax.linen))
    ours = plain(program(nnx, linen))
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        if isinstance(x, str):
            assert x == theirs[path], path
        else:
            assert x.dtype == theirs[path].dtype, path
            np.testing.assert_allclose(x, theirs[path], rtol=1e-6, err_msg=path)
