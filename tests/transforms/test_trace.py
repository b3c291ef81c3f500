# SPDX-License-Identifier: Apache-2.0
"""eval_shape, make_jaxpr and checkify of functions of live objects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from batiste import nnx
from batiste.graph.errors import AliasError, ArgumentError, TraceContextError

LIVE = dict(graph=True, graph_updates=True)
MODES = [LIVE, dict(graph=True, graph_updates=False), dict(graph=False, graph_updates=False)]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])
copies = pytest.mark.parametrize("mode", MODES[1:], ids=["graph", "tree"])


class Layer(nnx.Module):
    def __init__(self, n=3):
        self.kernel = nnx.Param(jnp.ones((n, n)), role="weights")
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.scale = nnx.data(jnp.ones(n))
        self.size = n

    def __call__(self, x):
        self.count[...] += 1
        return x @ self.kernel[...]


X = jnp.ones((2, 3))


# ---------------------------------------------------------------- eval_shape
@every_mode
def test_an_abstract_module(mode):
    layer = nnx.eval_shape(lambda: Layer(5), **mode)
    assert type(layer) is Layer and layer.size == 5 and layer.kernel.role == "weights"
    struct = layer.kernel.get_raw_value()
    assert isinstance(struct, jax.ShapeDtypeStruct) and struct.shape == (5, 5)
    assert isinstance(layer.scale, jax.ShapeDtypeStruct) and layer.count.dtype == jnp.int32


@every_mode
def test_arguments_stay_as_they_are(mode):
    layer = Layer()

    def grow(layer, x):
        layer.extra = nnx.Param(x)
        return {"y": layer(x), "made": Layer(4)}

    out = nnx.eval_shape(grow, layer, x=X, **mode)
    assert out["y"].shape == (2, 3) and out["made"].kernel.shape == (4, 4)
    assert int(layer.count[...]) == 0 and not hasattr(layer, "extra") and isinstance(layer.scale, jax.Array)


@every_mode
def test_abstract_arguments(mode):
    layer = nnx.eval_shape(Layer, **mode)
    out = nnx.eval_shape(lambda layer, x: layer(x), layer, jax.ShapeDtypeStruct((7, 3), jnp.float32), **mode)
    assert out.shape == (7, 3) and out.dtype == jnp.float32


def test_live_arguments_come_back_as_abstract_copies():
    layer = Layer()
    both = nnx.eval_shape(lambda layer: (layer(X), [layer, layer])[1], layer)
    assert both[0] is both[1] and both[0] is not layer
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(both))
    assert int(layer.count[...]) == 0


def test_shardings_of_a_mesh():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def make():
        return {"a": nnx.Param(jnp.ones((4, 4)), out_sharding=("x", "y")), "b": nnx.Param(jnp.ones((4, 4)))}

    with jax.set_mesh(mesh):
        made = nnx.eval_shape(make)
    assert made["a"].get_raw_value().sharding.spec == P("x", "y")
    assert made["b"].get_raw_value().sharding.spec == P()
    free = nnx.eval_shape(lambda: nnx.Param(jnp.ones(4), out_sharding=("x",), eager_sharding=False))
    assert free.get_raw_value().sharding is None


def test_an_object_that_was_not_passed_is_not_written():
    layer = Layer()
    with pytest.raises(TraceContextError):
        nnx.eval_shape(lambda: layer(X))


@copies
def test_without_live_objects_nothing_is_shared(mode):
    layer = Layer()
    with pytest.raises(AliasError, match="Duplicate"):
        nnx.eval_shape(lambda a, b: a(X), layer, layer, **mode)
    with pytest.raises(AliasError, match="Duplicate"):
        nnx.eval_shape(lambda a: a, layer, **mode)


# ---------------------------------------------------------------- make_jaxpr
@copies
def test_a_jaxpr_has_the_arrays_of_arguments_and_results(mode):
    layer = Layer()
    jaxpr = nnx.make_jaxpr(lambda layer, x: {"y": layer(x), "made": Layer(4)}, **mode)(layer, x=X)
    assert len(jaxpr.in_avals) == 4  # count, kernel, scale, x
    assert sorted(a.shape for a in jaxpr.out_avals) == [(), (2, 3), (4,), (4, 4)]
    assert int(layer.count[...]) == 0


@copies
def test_a_jaxpr_runs(mode):
    layer = Layer()
    closed = nnx.make_jaxpr(lambda layer, x, n: layer(x) * n, static_argnums=2, **mode)(layer, X, 3)
    (found,) = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves(layer), X)
    np.testing.assert_array_equal(found, layer(X) * 3)
    assert "3.0" in str(closed)


def test_a_jaxpr_as_a_decorator():
    @nnx.make_jaxpr(graph=False)
    def f(x):
        """Doubles."""
        return x * 2

    assert "mul" in str(f(1.0)) and f.__doc__ == "Doubles."


def test_a_jaxpr_cannot_change_structure():
    with pytest.raises(ArgumentError, match="does not support graph_updates=True"):
        nnx.make_jaxpr(lambda x: x)


# ---------------------------------------------------------------- checkify
def checked(layer, x):
    checkify.check((x > 0).all(), "{x} is not positive", x=x)
    return layer(x)


@every_mode
def test_a_failed_check_is_a_value(mode):
    layer = Layer()
    f = nnx.checkify(checked, **mode)
    error, out = f(layer, X)
    assert error.get() is None and out.shape == X.shape
    error, _ = f(layer, x=-X)
    with pytest.raises(ValueError, match="is not positive"):
        error.throw()
    assert int(layer.count[...]) == 2


@every_mode
def test_checks_and_jit_in_both_orders(mode):
    layer = Layer()
    error, _ = nnx.jit(nnx.checkify(checked, **mode), **mode)(layer, -X)
    assert "is not positive" in error.get()
    error, made = nnx.checkify(
        nnx.jit(lambda layer: (jnp.log(-layer.scale), Layer())[1], **mode), checkify.nan_checks, **mode
    )(layer)
    assert "nan generated" in error.get() and type(made) is Layer
    assert int(layer.count[...]) == 1


def test_bound_methods_are_refused():
    for transform in (nnx.eval_shape, nnx.checkify):
        with pytest.raises(ArgumentError, match="does not support bound methods"):
            transform(Layer().__call__)
    with pytest.raises(ArgumentError, match="does not support bound methods"):
        nnx.make_jaxpr(Layer().__call__, graph=False)
