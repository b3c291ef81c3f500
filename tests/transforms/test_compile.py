# SPDX-License-Identifier: Apache-2.0
"""jit over live objects: what comes back, what is refused, and what a plan remembers."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from batiste import nnx
from batiste.graph.config import config
from batiste.graph.epoch import Epoch
from batiste.graph.errors import AliasError, TraceContextError
from batiste.graph.plan import StalePlanError

MODES = [
    dict(graph=True, graph_updates=True),
    dict(graph=True, graph_updates=False),
    dict(graph=False, graph_updates=False),
]


class Layer(nnx.Module):
    def __init__(self, n=2, m=2):
        self.kernel = nnx.Param(jnp.eye(n, m))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.sizes = [n, m]

    def __call__(self, x):
        self.count[...] += 1
        return x @ self.kernel


def traced(f, **options):
    """A jitted function that counts how often it is traced."""
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return f(*args, **kwargs)

    return nnx.jit(counted, **options), traces


@pytest.mark.parametrize("mode", MODES)
def test_updates_of_variables_come_back_in_every_mode(mode):
    layer = Layer()
    kernel, x = layer.kernel, jnp.ones((1, 2))
    f, traces = traced(lambda m, x: m(x), **mode)
    for _ in range(3):
        y = f(layer, x)
    assert int(layer.count[...]) == 3 and layer.kernel is kernel and len(traces) == 1
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_leaves_everything_as_it_was(mode):
    layer = Layer()

    def broken(m):
        m.count[...] += 1
        m.kernel[...] = 0
        m.extra = 1
        raise RuntimeError("in the middle")

    f = nnx.jit(broken, **mode)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            f(layer)
    assert int(layer.count[...]) == 0 and float(layer.kernel.sum()) == 2 and not hasattr(layer, "extra")


def test_structural_changes_come_back():
    layer = Layer()

    @nnx.jit
    def change(m):
        m.new = nnx.Param(jnp.ones(3))
        m.child = Layer()
        m.alias = m.kernel
        m.flag = True
        m.kernel.set_metadata(note="seen")
        del m.count
        m.sizes.append(7)

    change(layer)
    assert layer.new.shape == (3,) and layer.child.kernel is not layer.kernel and layer.alias is layer.kernel
    assert (
        layer.flag is True and layer.kernel.note == "seen" and not hasattr(layer, "count") and layer.sizes == [2, 2, 7]
    )


@pytest.mark.parametrize("mode", MODES[1:])
def test_without_graph_updates_only_variables_change(mode):
    layer = Layer()

    def change(m):
        m.flag, m.new = True, nnx.Param(1.0)
        m.kernel[...] = 0
        m.kernel.set_metadata(note="seen")

    nnx.jit(change, **mode)(layer)
    assert not hasattr(layer, "flag") and not hasattr(layer, "new")
    assert float(layer.kernel.sum()) == 0 and layer.kernel.note == "seen"


def test_identity_is_kept_through_the_result():
    layer, other = Layer(), Layer()

    @nnx.jit
    def f(a, b):
        b.friend = a
        return {"a": a, "kernel": a.kernel, "new": (new := Layer()), "again": new}

    out = f(layer, other)
    assert out["a"] is layer and out["kernel"] is layer.kernel and other.friend is layer and out["again"] is out["new"]


def test_sharing_inside_and_between_arguments():
    layer = Layer()
    model = nnx.List([layer, layer])

    @nnx.jit
    def f(a, b):
        assert a[0] is a[1] is b
        b.kernel[...] = b.kernel * 3

    f(model, layer)
    assert float(layer.kernel.sum()) == 6


def test_a_cycle_passes():
    layer = Layer()
    layer.me = nnx.List([layer])
    f, traces = traced(lambda m: m.me[0].kernel.set_value(m.kernel * 2))
    f(layer), f(layer)
    assert float(layer.kernel.sum()) == 8 and layer.me[0] is layer and len(traces) == 1


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("f", [lambda m: m, lambda m: m.kernel, lambda m: {"x": [m.kernel]}])
def test_without_graph_updates_inputs_may_not_be_returned(mode, f):
    with pytest.raises(AliasError, match="Duplicate"):
        nnx.jit(f, **mode)(Layer())


def test_a_tree_may_not_hold_an_object_twice():
    layer = Layer()
    with pytest.raises(AliasError, match="Duplicate"):
        nnx.jit(lambda a, b: 1, graph=False)(layer, layer)
    assert nnx.jit(lambda a, b: 1, graph=True, graph_updates=False)(layer, layer) == 1


def test_a_captured_object_cannot_be_written():
    layer = Layer()
    with pytest.raises(TraceContextError):
        nnx.jit(lambda x: layer(x))(jnp.ones((1, 2)))


def test_bound_methods_are_refused():
    with pytest.raises(ValueError, match="bound methods"):
        nnx.jit(Layer().__call__)


def test_a_decorated_method_works():
    class M(Layer):
        @nnx.jit
        def double(self, x, *, by=2):
            self.count[...] += by
            return x * by

    m = M()
    assert int(m.double(jnp.int32(3))) == 6 and int(m.double(3, by=3)) == 9 and int(m.count[...]) == 5


# ---------------------------------------------------------------- plans
def test_programs_are_remembered_by_structure():
    f, traces = traced(lambda m, x: m(x))
    x = jnp.ones((1, 2))
    a, b = Layer(), Layer()
    f(a, x), f(b, x), f(a, x)
    assert len(traces) == 1
    a.flag = True
    f(a, x)
    assert len(traces) == 2
    del a.flag
    f(a, x)
    assert len(traces) == 2 and (int(a.count[...]), int(b.count[...])) == (4, 1)


def test_a_new_variable_in_the_place_of_another_is_seen():
    layer = Layer()
    f = nnx.jit(lambda m: m.kernel.set_value(m.kernel + 1))
    f(layer)
    old = layer.kernel
    layer.kernel = nnx.Param(jnp.full((2, 2), 5.0))
    f(layer)
    assert float(layer.kernel[0, 0]) == 6 and float(old[0, 0]) == 2


def test_plain_containers_and_arrays_that_change_are_seen():
    class M(nnx.Module):
        def __init__(self):
            self.parts = nnx.data([nnx.Param(jnp.ones(()))])
            self.array, self.scale = jnp.ones(()), [1]

        def total(self):
            return sum(p[...] for p in self.parts) * self.array * self.scale[0]

    m, f = M(), nnx.jit(lambda m: m.total())
    assert float(f(m)) == 1
    m.parts.append(nnx.Param(jnp.ones(())))
    assert float(f(m)) == 2
    m.array = m.array + 2
    assert float(f(m)) == 6
    m.scale[0] = 10
    assert float(f(m)) == 60


def test_an_array_attribute_that_is_counted_up_needs_no_new_plan():
    class M(nnx.Module):
        def __init__(self):
            self.n = jnp.zeros(())

    m = M()

    @nnx.jit
    def f(m):
        m.n = m.n + 1

    f(m)
    epoch = Epoch.now
    for _ in range(3):
        f(m)
    m.n = m.n + 10
    assert float(m.n) == 14 and Epoch.now == epoch


def test_building_and_writing_values_do_not_move_the_epoch():
    m, f = Layer(), nnx.jit(lambda m, x: m(x))
    f(m, jnp.ones((1, 2)))
    epoch = Epoch.now
    Layer()
    m.kernel[...] = 0
    f(m, jnp.ones((1, 2)))
    assert Epoch.now == epoch


def test_a_dropped_model_is_freed_although_it_was_in_a_plan():
    f = nnx.jit(lambda m: m.layers[0].count.set_value(m.layers[0].count + 1))
    m = nnx.Dict(layers=nnx.List([Layer()]))
    f(m), f(m)
    gone = weakref.ref(m), weakref.ref(m.layers[0]), weakref.ref(m.layers[0].kernel)
    del m
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3 and not f.plans


def test_going_around_assignment_is_caught_when_plans_are_checked():
    with config.temp_flip_flag("check_plans", True):
        m, f = Layer(), nnx.jit(lambda m: m.kernel.sum())
        f(m)
        m.__dict__["kernel"] = nnx.Param(jnp.zeros((2, 2)))
        with pytest.raises(StalePlanError):
            f(m)


def test_weak_types_and_shapes_retrace_without_a_new_plan():
    layer = Layer()
    f, traces = traced(lambda m, x: m(x))
    f(layer, jnp.ones((1, 2))), f(layer, jnp.ones((3, 2))), f(layer, jnp.ones((1, 2)))
    assert len(traces) == 2 and len(f.plans) == 1


# ---------------------------------------------------------------- options
def test_static_arguments():
    f, traces = traced(lambda m, n, x, k="a": x * len(n) * len(k), static_argnums=(1,), static_argnames=("k",))
    layer = Layer()
    assert float(f(layer, "ss", 1.0, k="bbb")) == 6.0
    f(layer, "ss", 2.0, k="bbb"), f(layer, "t", 2.0, k="bbb")
    assert len(traces) == 2
    with pytest.raises(ValueError, match="hashable"):
        f(layer, [1], 2.0)


def test_donated_objects_keep_valid_values():
    layer = Layer()
    old_kernel, old_count = layer.kernel[...], layer.count[...]
    f = nnx.jit(lambda m, x: m(x), donate_argnums=0)
    f(layer, jnp.ones((1, 2))), f(layer, jnp.ones((1, 2)))
    assert old_kernel.is_deleted() and old_count.is_deleted()
    assert float(layer.kernel.sum()) == 2 and int(layer.count[...]) == 2


def test_donation_by_name():
    layer = Layer()
    old = layer.kernel[...]
    nnx.jit(lambda x, m: m(x), donate_argnames="m")(jnp.ones((1, 2)), m=layer)
    assert old.is_deleted() and float(layer.kernel.sum()) == 2


def test_shardings_by_filter():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    layer = Layer(4, 4)
    rule = nnx.StateSharding({nnx.Param: split, ...: whole})
    f = nnx.jit(lambda m, x: m(x), in_shardings=(rule, whole), out_shardings=whole)
    y = f(layer, jnp.ones((1, 4)))
    assert layer.kernel.sharding == split and y.sharding.is_equivalent_to(whole, 2) and int(layer.count[...]) == 1


@pytest.mark.parametrize("mode", MODES)
def test_stages(mode):
    layer, x = Layer(), jnp.ones((1, 2))
    f = nnx.jit(lambda m, x: m(x), **mode)
    lowered = f.lower(layer, x)
    assert "stablehlo" in lowered.as_text()
    compiled = lowered.compile()
    assert int(layer.count[...]) == 0
    np.testing.assert_array_equal(compiled(layer, x), x)
    assert int(layer.count[...]) == 1 and compiled.memory_analysis() is not None
    np.testing.assert_array_equal(f.trace(layer, x).lower().compile()(layer, x), x)


def test_jit_inside_jit_and_jax_jit():
    layer = Layer()
    inner = nnx.jit(lambda m, x: m(x))
    outer = nnx.jit(lambda m, x: inner(m, inner(m, x)))
    outer(layer, jnp.ones((1, 2)))
    assert int(layer.count[...]) == 2

    @jax.jit
    def functional(graphdef, state, x):
        m = nnx.merge(graphdef, state)
        inner(m, x)
        return nnx.state(m)

    nnx.update(layer, functional(*nnx.split(layer), jnp.ones((1, 2))))
    assert int(layer.count[...]) == 3


def test_objects_inside_argument_trees():
    layers = {"a": Layer(), "b": [Layer()]}
    f = nnx.jit(lambda t, x: t["b"][0](t["a"](x)))
    f(layers, jnp.ones((1, 2))), f(layers, jnp.ones((1, 2)))
    assert int(layers["b"][0].count[...]) == 2
    f({"a": layers["a"], "b": [Layer()]}, jnp.ones((1, 2)))
    assert int(layers["a"].count[...]) == 3


def test_a_captured_object_is_not_written_by_a_jitted_function_of_it():
    layer = Layer()
    update = nnx.jit(lambda m: m.count.set_value(m.count + 1))

    @jax.jit
    def f(x):
        update(layer)
        return x

    with pytest.raises(TraceContextError, match="Variable"):
        f(1.0)
    assert int(layer.count[...]) == 0
    update(layer)
    assert int(layer.count[...]) == 1


def test_a_tied_weight_takes_the_label_of_its_first_path():
    layer = Layer()
    layer.tied = layer.kernel
    grads = nnx.grad(lambda m: (m.kernel * m.tied).sum(), argnums=nnx.DiffState(0, nnx.PathContains("kernel")))(layer)
    np.testing.assert_array_equal(grads["kernel"][...], 2 * layer.kernel[...])


def test_threads_share_a_function():
    f = nnx.jit(lambda m, x: m.count.set_value(m.count + x.shape[0]) or m.kernel * x.sum())
    layers = [Layer() for _ in range(4)]

    def work(layer):
        for i in range(30):
            f(layer, jnp.ones(1 + i % 2))

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(layer.count[...]) for layer in layers] == [45] * 4
