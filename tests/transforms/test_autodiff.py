# SPDX-License-Identifier: Apache-2.0
"""grad, value_and_grad, vjp and jvp of live objects: the values are JAX's, updates come back, wrong uses say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import AliasError, ArgumentError, AutodiffError, TraceContextError

LIVE = dict(graph=True, graph_updates=True)
MODES = [LIVE, dict(graph=True, graph_updates=False), dict(graph=False, graph_updates=False)]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])
copies = pytest.mark.parametrize("mode", MODES[1:], ids=["graph", "tree"])


class Layer(nnx.Module):
    def __init__(self, seed=0):
        kernel, bias = jax.random.normal(jax.random.key(seed), (2, 3, 3))
        self.kernel = nnx.Param(kernel, role="weights")
        self.bias = nnx.Param(bias[:1])
        self.mean = nnx.BatchStat(jnp.zeros((1, 3)))
        self.size = 3

    def __call__(self, x):
        y = jnp.tanh(x @ self.kernel[...] + self.bias[...])
        self.mean[...] = y.mean(0, keepdims=True)
        return y


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Layer(1), Layer(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


X = jnp.arange(6.0).reshape(2, 3) / 6


def loss(net, x=X):
    return (net(x) ** 2).sum()


def pure_gradients(net):
    """What JAX says, as `(kernel, bias)` per layer."""

    def f(parameters):
        x = X
        for kernel, bias in parameters:
            x = jnp.tanh(x @ kernel + bias)
        return (x**2).sum()

    return jax.value_and_grad(f)([(layer.kernel[...], layer.bias[...]) for layer in net.layers])


def layers_of(gradients):
    return [(layer.kernel[...], layer.bias[...]) for layer in (gradients.layers[0], gradients.layers[1])]


# ---------------------------------------------------------------- values and looks
@every_mode
def test_the_gradients_are_those_of_jax(mode):
    net = Net()
    value, gradients = nnx.value_and_grad(loss, **mode)(net)
    expected, expected_gradients = pure_gradients(net)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), layers_of(gradients), expected_gradients)
    jax.tree.map(np.testing.assert_array_equal, layers_of(gradients), layers_of(nnx.grad(loss, **mode)(net)))


@every_mode
def test_a_gradient_looks_like_its_argument(mode):
    net = Net()
    gradients = nnx.grad(loss, **mode)(net)
    if mode == LIVE:
        assert type(gradients) is nnx.State
        assert [p for p, _ in nnx.to_flat_state(gradients)] == [
            p for p, _ in nnx.to_flat_state(nnx.state(net, nnx.Param))
        ]
    else:
        assert type(gradients) is Net and gradients is not net and gradients.layers[0].size == 3
        np.testing.assert_array_equal(gradients.layers[0].mean, jnp.zeros((1, 3)))
    kernel = gradients["layers"][0]["kernel"] if mode == LIVE else gradients.layers[0].kernel
    assert type(kernel) is nnx.Param and kernel.role == "weights"


@every_mode
def test_updates_reach_the_same_objects(mode):
    net = Net()
    mean, kernel = net.layers[0].mean, net.layers[0].kernel
    nnx.grad(loss, **mode)(net)
    assert net.layers[0].mean is mean and net.layers[0].kernel is kernel
    np.testing.assert_allclose(
        mean[...], jnp.tanh(X @ kernel[...] + net.layers[0].bias[...]).mean(0, keepdims=True), rtol=1e-6
    )


@every_mode
def test_an_exception_leaves_everything_as_it_was(mode):
    net = Net()

    def broken(net):
        loss(net)
        net.extra = nnx.Param(jnp.ones(2))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        nnx.grad(broken, **mode)(net)
    assert not hasattr(net, "extra") and not net.layers[0].mean[...].any()


def test_a_new_variable_stays_with_live_objects_alone():
    for mode in MODES:
        net = Net()
        nnx.grad(lambda net: (setattr(net, "extra", nnx.Cache(X)), loss(net))[1], **mode)(net)
        assert hasattr(net, "extra") == (mode == LIVE)


@every_mode
def test_auxiliary_data_may_hold_objects(mode):
    net = Net()
    gradients, (made, text) = nnx.grad(lambda net: (loss(net), (Layer(), "text")), has_aux=True, **mode)(net)
    assert type(made) is Layer and text == "text" and gradients is not None
    np.testing.assert_array_equal(made.kernel, Layer().kernel)


def test_live_objects_may_be_handed_out_again():
    net = Net()
    _, (again, layer) = nnx.grad(lambda net: (loss(net), (net, net.layers[1])), has_aux=True)(net)
    assert again is net and layer is net.layers[1]


@every_mode
def test_several_arguments_give_a_tuple_in_their_order(mode):
    by_x, by_net = nnx.grad(lambda net, x: loss(net, x), argnums=(1, 0), **mode)(Net(), X)
    np.testing.assert_array_equal(by_x, nnx.grad(loss, argnums=-1, **mode)(Net(), X))
    jax.tree.map(np.testing.assert_array_equal, layers_of(by_net), layers_of(nnx.grad(loss, **mode)(Net())))


def test_a_filter_chooses_what_is_differentiated():
    net = Net()
    only_bias = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.PathContains("bias")))(net)
    assert [p for p, _ in nnx.to_flat_state(only_bias)] == [("layers", 0, "bias"), ("layers", 1, "bias")]
    by_mean = nnx.grad(lambda net: net.layers[0].mean[0, 0] * 3, argnums=nnx.DiffState(0, nnx.BatchStat))(net)
    np.testing.assert_array_equal(by_mean.layers[0].mean, jnp.array([[3.0, 0, 0]]))


def test_a_shared_variable_has_one_gradient():
    net = Net()
    net.layers[1] = net.layers[0]
    gradients = nnx.grad(loss)(net)
    assert list(gradients.layers) == [0]
    copy = nnx.grad(loss, graph_updates=False)(net)
    assert copy.layers[0] is copy.layers[1]
    np.testing.assert_array_equal(gradients.layers[0].kernel, copy.layers[0].kernel)


def test_keyword_arguments_are_differentiated_by_their_number():
    assert float(nnx.grad(lambda x, y: x * y, argnums=1)(x=3.0, y=2.0)) == 3.0


@every_mode
def test_arrays_behind_refs_keep_what_was_written(mode):
    counter = nnx.Variable(jnp.array(1.0), ref=True)

    def f(x, counter):
        counter[...] = counter[...] + 1
        return x**2

    assert float(nnx.grad(f, **mode)(3.0, counter)) == 6.0
    assert float(counter[...]) == 2.0


@every_mode
def test_what_is_behind_a_ref_is_not_differentiated(mode):
    layer = Layer()
    layer.bias = nnx.Param(jnp.ones((1, 3)), ref=True)
    for transform in (nnx.grad(loss, **mode), lambda layer: nnx.vjp(loss, layer, **mode)):
        with pytest.raises(AutodiffError, match="cannot differentiate a Variable with ref=True at 0/bias"):
            transform(layer)


# ---------------------------------------------------------------- vjp and jvp
def tangent_of(net, seed):
    """A random module of the same structure."""
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), net)


@every_mode
def test_pushing_forward_and_pulling_back_are_adjoint(mode):
    net, cotangent = Net(), jax.random.normal(jax.random.key(0), (2, 3))
    tangent = tangent_of(net, 1)
    if mode == LIVE:
        tangent = nnx.state(tangent, nnx.Param)
    else:
        for layer in tangent.layers:
            layer.mean[...] = jnp.zeros((1, 3))
    out, pushed = nnx.jvp(lambda net: net(X), (net,), (tangent,), **mode)
    again, pullback = nnx.vjp(lambda net: net(X), net, **mode)
    (pulled,) = pullback(cotangent)
    inner = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), tangent, pulled)))
    np.testing.assert_array_equal(out, again)
    np.testing.assert_allclose((pushed * cotangent).sum(), inner, rtol=1e-4)
    assert type(pulled) is type(nnx.grad(loss, **mode)(net))


@every_mode
def test_vjp_and_jvp_keep_updates_and_auxiliary_data(mode):
    net = Net()
    out, _, aux = nnx.vjp(lambda net: (net(X), {"a": Layer()}), net, has_aux=True, **mode)
    assert type(aux["a"]) is Layer and net.layers[1].mean[...].any()
    net = Net()
    ones = jax.tree.map(jnp.ones_like, net)
    again, tangent, aux = nnx.jvp(lambda net: (net(X), {"a": Layer()}), (net,), (ones,), has_aux=True, **mode)
    assert type(aux["a"]) is Layer and net.layers[1].mean[...].any() and tangent.shape == out.shape
    np.testing.assert_array_equal(out, again)


def test_what_a_tangent_leaves_out_is_zero():
    layer = Layer()
    some = nnx.State({"bias": nnx.Param(jnp.ones((1, 3)))})
    full = jax.tree.map(jnp.zeros_like, layer)
    full.bias[...] = jnp.ones((1, 3))
    f = lambda layer: layer(X)
    np.testing.assert_array_equal(nnx.jvp(f, (layer,), (some,))[1], nnx.jvp(f, (layer,), (full,))[1])


@every_mode
def test_results_may_be_objects(mode):
    layer = Layer()
    out, pullback = nnx.vjp(lambda layer: {"made": nnx.Param(layer.bias * 2), "no": layer.bias * 5}, layer, **mode)
    assert type(out["made"]) is nnx.Param
    (pulled,) = pullback({"made": nnx.Param(jnp.ones((1, 3))), "no": None})
    np.testing.assert_array_equal(pulled.bias, jnp.full((1, 3), 2.0))
    _, tangent = nnx.jvp(
        lambda layer: nnx.Cache(layer.bias * 2), (layer,), (jax.tree.map(jnp.ones_like, layer),), **mode
    )
    assert type(tangent) is nnx.Cache
    np.testing.assert_array_equal(tangent, jnp.full((1, 3), 2.0))


def test_decorators():
    @nnx.value_and_grad(has_aux=True)
    def f(x):
        """Squares."""
        return x**2, "aux"

    @nnx.vjp(graph=False)
    def g(x):
        return x**2

    @nnx.jvp(graph=False)
    def h(x):
        return x**2

    (value, aux), gradient = f(3.0)
    assert (float(value), aux, float(gradient)) == (9.0, "aux", 6.0) and f.__doc__ == "Squares."
    assert float(g(3.0)[1](1.0)[0]) == 6.0 and float(h((3.0,), (2.0,))[1]) == 12.0


def test_a_decorated_method():
    class Model(Layer):
        @nnx.grad
        def slope(self, power):
            return (self.bias**power).sum()

    model = Model()
    np.testing.assert_allclose(model.slope(2.0).bias[...], 2 * model.bias[...], rtol=1e-6)


# ---------------------------------------------------------------- with other transforms
@every_mode
def test_grad_of_grad(mode):
    def curvature(layer):
        inner = nnx.grad(lambda layer: (layer.bias**3).sum(), **mode)(layer)
        return sum(leaf.sum() for leaf in jax.tree.leaves(inner))

    layer = Layer()
    np.testing.assert_allclose(nnx.grad(curvature, **mode)(layer).bias[...], 6 * layer.bias[...], rtol=1e-5)


@every_mode
def test_grad_inside_jit_is_traced_once(mode):
    net, traces = Net(), []

    @nnx.jit(**mode)
    def step(net):
        traces.append(1)
        value, gradients = nnx.value_and_grad(loss, **mode)(net)
        for layer, (kernel, bias) in zip(net.layers, layers_of(gradients)):
            layer.kernel[...] -= 0.1 * kernel
            layer.bias[...] -= 0.1 * bias
        return value

    values = [float(step(net)) for _ in range(5)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] and len(traces) == 1


@every_mode
def test_vmap_of_grad(mode):
    xs = jnp.arange(12.0).reshape(4, 3)

    def gradient(kernel, x):
        return nnx.grad(lambda k: (x @ k[...]).sum() ** 2, **mode)(kernel)[...]

    kernel = nnx.Param(jnp.eye(3))
    axes = (None, 0)
    found = nnx.vmap(gradient, in_axes=axes, **mode)(kernel, xs)
    expected = jax.vmap(jax.grad(lambda k, x: (x @ k).sum() ** 2), in_axes=axes)(kernel[...], xs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_grad_of_a_scan_of_a_remat():
    layer = Layer()
    axes = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})

    def total(layer, remat):
        block = nnx.remat(lambda layer, x: layer(x)) if remat else (lambda layer, x: layer(x))
        scanned = nnx.scan(lambda x, layer: block(layer, x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry, length=3)
        return (scanned(X, layer) ** 2).sum()

    plain, saved = (nnx.grad(total)(Layer(), remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, saved)
    nnx.grad(total)(layer, True)
    assert layer.mean[...].any()


# ---------------------------------------------------------------- wrong uses
def test_a_variable_is_differentiated_everywhere_or_nowhere():
    layer, other = Layer(), Layer()
    other.kernel = layer.kernel
    f = lambda a, b: (a.kernel[...] * b.kernel[...]).sum()
    with pytest.raises(
        AliasError, match=r"(?s)Inconsistent aliasing.*0/kernel: differentiated.*1/kernel: not differentiated"
    ):
        nnx.grad(f)(layer, other)
    with pytest.raises(AliasError, match="0/kernel"):
        nnx.grad(f, argnums=(nnx.DiffState(0, nnx.Param), nnx.DiffState(1, nnx.BatchStat)))(layer, other)
    with pytest.raises(AliasError):
        nnx.grad(f)(layer, layer)
    both = nnx.grad(f, argnums=(0, 1))(layer, other)
    np.testing.assert_allclose(both[0].kernel[...], 2 * layer.kernel[...], rtol=1e-6)


@copies
def test_filters_need_live_objects(mode):
    with pytest.raises(ArgumentError, match="`argnums` cannot contain `DiffState`"):
        nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param), **mode)


@copies
def test_inputs_are_not_handed_out_again(mode):
    with pytest.raises(AliasError, match=r"(?s)Duplicate.*out/1"):
        nnx.grad(lambda net: (loss(net), net), has_aux=True, **mode)(Net())


@pytest.mark.parametrize("argnums", [5, -3, (0, 0), (0, nnx.DiffState(0, nnx.Param)), ()])
def test_arguments_that_are_not_there_or_twice(argnums):
    with pytest.raises(AutodiffError) as error:
        nnx.grad(loss, argnums=argnums)(Net(), X)
    assert isinstance(error.value, TypeError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("f", [lambda x: x, lambda x: (x, 1, 2)])
def test_auxiliary_data_come_in_pairs(f):
    with pytest.raises(AutodiffError, match="cannot unpack"):
        nnx.grad(f, has_aux=True)(3.0)


def test_results_must_be_scalars():
    with pytest.raises(TypeError, match="Gradient only defined for scalar-output functions"):
        nnx.grad(lambda net: net(X))(Net())
    with pytest.raises(AutodiffError, match="Gradient only defined for scalar-output functions"):
        nnx.grad(lambda v: v)(nnx.Param(jnp.array(3.0)))


@pytest.mark.parametrize("transform", [nnx.grad, nnx.value_and_grad])
def test_bound_methods_are_refused(transform):
    with pytest.raises(ArgumentError, match="does not support bound methods"):
        transform(Net().__call__)
    with pytest.raises(ArgumentError, match="does not support bound methods"):
        nnx.vjp(Net().__call__, X)
    with pytest.raises(ArgumentError, match="does not support bound methods"):
        nnx.jvp(Net().__call__, (X,), (X,))


def test_an_object_that_was_not_passed_is_not_written():
    layer = Layer()
    with pytest.raises(TraceContextError):
        nnx.grad(lambda x: (layer.mean.set_value(x), x.sum())[1])(jnp.ones(3))


@pytest.mark.parametrize(("primals", "tangents"), [((1.0,), [1.0]), ((1.0,), (1.0, 2.0)), (1.0, 1.0)])
def test_tangents_have_the_structure_of_primals(primals, tangents):
    with pytest.raises(AutodiffError, match="primal and tangent arguments"):
        nnx.jvp(lambda *x: x[0], primals, tangents)


def test_cotangents_have_the_structure_of_results():
    _, pullback = nnx.vjp(lambda layer: {"a": layer.bias * 2, "b": nnx.Param(layer.bias * 3)}, Layer())
    with pytest.raises(AutodiffError, match="unexpected tree structure"):
        pullback({"a": jnp.ones(3)})
    with pytest.raises(AutodiffError, match="values that nothing asked for"):
        pullback({"a": jnp.ones(3), "b": nnx.State({"x": jnp.ones(3)})})
    with pytest.raises(AutodiffError, match="the tangent argument"):
        nnx.jvp(lambda layer: layer(X), (Layer(),), (nnx.State({"kernle": jnp.ones((3, 3))}),))
