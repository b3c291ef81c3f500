# SPDX-License-Identifier: Apache-2.0
"""remat of functions of live objects: the same values, other residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from batiste import nnx
from batiste.graph.errors import AliasError, ArgumentError
from batiste.transforms.remat import POLICIES

LIVE = dict(graph=True, graph_updates=True)
MODES = [LIVE, dict(graph=True, graph_updates=False), dict(graph=False, graph_updates=False)]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])
X = jnp.arange(6.0).reshape(2, 3) / 6


class Layer(nnx.Module):
    def __init__(self, rngs=None):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (3, 3)))
        self.mean = nnx.BatchStat(jnp.zeros((1, 3)))
        self.rngs = rngs or nnx.Rngs(0)

    def __call__(self, x):
        y = jnp.sin(jnp.exp(jnp.sin(checkpoint_name(x @ self.kernel[...], "inner"))))
        self.mean[...] = y.mean(0, keepdims=True)
        return y + jax.random.normal(self.rngs(), y.shape)


def call(layer, x):
    return layer(x)


def loss_of(f, mode, **options):
    block = nnx.remat(f, **mode, **options)
    return lambda layer, x: (block(layer, x) ** 2).sum()


def saved(loss):
    """The shapes of what the forward pass keeps for the backward pass."""

    def of_kernel(kernel):
        layer = Layer()
        layer.kernel[...] = kernel
        return loss(layer, X)

    _, pullback = jax.vjp(of_kernel, Layer().kernel[...])
    return [x.shape for x in jax.tree.leaves(pullback)]


@every_mode
def test_the_gradients_are_the_same_and_updates_come_back(mode):
    plain, block = Layer(), Layer()
    expected = nnx.grad(lambda m, x: (m(x) ** 2).sum(), argnums=1, **mode)(plain, X)
    found = nnx.grad(loss_of(call, mode), argnums=1, **mode)(block, X)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(block.mean[...], plain.mean[...], rtol=1e-6)
    assert int(block.rngs.default.count[...]) == 1


@every_mode
def test_less_is_kept(mode):
    plain = saved(lambda m, x: (m(x) ** 2).sum())
    assert len(saved(loss_of(call, mode))) < len(plain)
    assert len(saved(loss_of(call, mode, policy="everything_saveable"))) >= len(plain)


@every_mode
def test_a_policy_by_name_is_the_policy(mode):
    for name in POLICIES:
        by_name = nnx.remat(call, policy=name, **mode)
        by_function = nnx.remat(call, policy=POLICIES[name], **mode)
        a, b = (str(jax.make_jaxpr(lambda x, f=f: f(Layer(), x))(X)) for f in (by_name, by_function))
        assert a == b
    named = jax.checkpoint_policies.save_only_these_names("inner")
    named, none = saved(loss_of(call, mode, policy=named)), saved(loss_of(call, mode))
    assert named.count((2, 3)) == none.count((2, 3)) + 1


def test_an_unknown_policy():
    with pytest.raises(ArgumentError, match=r"unknown policy.*'some'.*dots_saveable"):
        nnx.remat(call, policy="some")
    with pytest.raises(ArgumentError, match="unknown policy"):
        nnx.remat(call, policy="save_only_these_names")


@every_mode
@pytest.mark.parametrize("argnums", [(1, 2), (-1, 1), [2, 1]])
def test_static_arguments(mode, argnums):
    def repeat(layer, times, names):
        return sum(layer.kernel[...].sum() for _ in range(times) for _ in names)

    f = nnx.remat(repeat, static_argnums=tuple(argnums), **mode)
    expected = 6 * Layer().kernel[...].sum()
    for found in (
        f(Layer(), 2, ["a", "b", "c"]),
        f(Layer(), names=["a", "b", "c"], times=2),
        f(Layer(), 2, names="abc"),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@every_mode
def test_keyword_arguments(mode):
    layer = Layer()
    found = nnx.remat(call, **mode)(x=X, layer=layer)
    np.testing.assert_allclose(found, Layer()(X), rtol=1e-6)
    assert layer.mean[...].any()


@every_mode
def test_a_decorated_method_inside_a_scan(mode):
    class Block(Layer):
        @nnx.remat(prevent_cse=False, **mode)
        def __call__(self, x):
            return jnp.sin(x @ self.kernel[...])

    def total(block, loop):
        if loop:
            step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3, **mode)
            return step(X, block).sum()
        return block(block(block(X))).sum()

    looped, unrolled = (total(Block(), loop) for loop in (True, False))
    np.testing.assert_allclose(looped, unrolled, rtol=1e-5)


@every_mode
def test_results_may_be_objects(mode):
    made = nnx.remat(lambda m: {"layer": Layer(), "p": nnx.Param(m.kernel * 2)}, **mode)(Layer())
    assert type(made["layer"]) is Layer and type(made["p"]) is nnx.Param


def test_live_objects_keep_their_identity_and_may_change():
    layer = Layer()

    def change(a, b):
        a.extra = nnx.Cache(b.kernel * 2)
        return b

    assert nnx.remat(change)(layer, layer) is layer
    assert type(layer.extra) is nnx.Cache
    with pytest.raises(AliasError, match="Duplicate"):
        nnx.remat(change, graph=False)(layer, layer)


def test_bound_methods_are_refused():
    with pytest.raises(ArgumentError, match="does not support bound methods"):
        nnx.remat(Layer().__call__)
