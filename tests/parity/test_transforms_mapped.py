# SPDX-License-Identifier: Apache-2.0
"""vmap, pmap, scan, loops and branches give what the installed Flax gives: results, final states, kinds of errors."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from batiste import nnx as batiste_nnx

MODES = {
    "live": dict(graph=True, graph_updates=True),
    "graph": dict(graph=True, graph_updates=False),
    "tree": dict(graph=False, graph_updates=False),
}
VALUES, ERRORS = [], []


def case(*modes):
    """Registers a scenario `f(nnx, mode)` for these modes, or for all; what it returns is compared."""

    def register(f):
        VALUES.extend(pytest.param(f, mode, id=f"{f.__name__}-{mode}") for mode in modes or MODES)
        return f

    return register


def error(words, *modes):
    """Registers a scenario that raises in both libraries, with these words in both messages."""

    def register(f):
        ERRORS.extend(pytest.param(f, mode, words, id=f"{f.__name__}-{mode}") for mode in modes or MODES)
        return f

    return register


def plain(x):
    """What two libraries can be compared by: types by name, arrays by dtype and value, objects by their attributes."""
    if isinstance(x, (flax_nnx.Variable, batiste_nnx.Variable)):
        metadata = {k: v for k, v in x.get_metadata().items() if k not in ("hijax", "ref", "eager_sharding")}
        return type(x).__name__, plain(x.get_value()), metadata
    if isinstance(x, (flax_nnx.Module, batiste_nnx.Module, flax_nnx.Rngs, batiste_nnx.Rngs)):
        return type(x).__name__, {k: plain(v) for k, v in sorted(vars(x).items()) if not k.startswith("_")}
    if isinstance(x, (flax_nnx.RngStream, batiste_nnx.RngStream)):
        return plain([x.key, x.count])
    if isinstance(x, (jax.Array, np.ndarray)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return plain(jax.random.key_data(x))
        return str(x.dtype), np.asarray(x).round(5).tolist()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x).__name__, [plain(v) for v in x]
    return x


@pytest.mark.parametrize(("scenario", "mode"), VALUES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_same_values_and_states(scenario, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = plain(scenario(flax_nnx, MODES[mode]))
    assert plain(scenario(batiste_nnx, MODES[mode])) == theirs


@pytest.mark.parametrize(("scenario", "mode", "words"), ERRORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_same_errors(scenario, mode, words):
    with pytest.raises((ValueError, TypeError)) as theirs:
        scenario(flax_nnx, MODES[mode])
    with pytest.raises(type(theirs.value)) as ours:
        scenario(batiste_nnx, MODES[mode])
    assert words in str(theirs.value) and words in str(ours.value)
    assert type(ours.value).__module__ == "batiste.graph.errors"


# ---------------------------------------------------------------- objects to map and loop over
_made = {}


def module(nnx, n=None, **attributes):
    """A module with a Param of shape (3, 2) and a statistic of shape (3,), or without its leading axis."""
    if nnx not in _made:

        class Pair(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(jnp.arange(6.0).reshape(3, 2))
                self.b = nnx.BatchStat(jnp.zeros(3))

        _made[nnx] = Pair
    made = _made[nnx]()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def shared(mode):
    """Modes whose walk takes one object at two places."""
    return mode["graph"]


def axes_of(nnx, mode, tree, filter_map):
    """The prefix that says the same in this mode: StateAxes, or an object of axes."""
    return nnx.StateAxes(filter_map) if mode["graph_updates"] else nnx.prefix(tree, filter_map, graph=mode["graph"])


def named(nnx, names=("layer", "embed"), shape=(3, 2)):
    value = jnp.arange(float(np.prod(shape))).reshape(shape)
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def words_of(keys):
    return jax.random.key_data(keys)[..., 0]


# ---------------------------------------------------------------- vmap
@case()
def vmap_writes_what_is_mapped(nnx, mode):
    m = module(nnx)

    def f(m, y):
        m.b[...] = m.b + y
        return m.w.sum() + y

    return nnx.vmap(f, in_axes=(0, None), **mode)(m, 2.0), m


@case()
def vmap_by_filter(nnx, mode):
    m = module(nnx, n=None, count=nnx.Cache(jnp.array(0)))
    axes = axes_of(nnx, mode, m, {(nnx.Param, nnx.BatchStat): 0, ...: None})

    def f(m, y):
        m.b[...] = m.b + 1
        m.count[...] = m.count + 1
        return m.w.sum() + y

    return nnx.vmap(f, in_axes=(axes, None), **mode)(m, 1.0), m


@case("live")
def vmap_by_a_state_of_axes(nnx, mode):
    m = module(nnx)
    axes = nnx.StateAxes(nnx.State({"w": 1, "b": None}))
    return nnx.vmap(lambda m: m.w.sum() + m.b.sum(), in_axes=(axes,), **mode)(m)


@case()
def vmap_makes_modules(nnx, mode):
    class Point(nnx.Module):
        def __init__(self, i):
            self.w = nnx.Param(i * jnp.ones(2))
            self.b = nnx.BatchStat(i)

    return nnx.vmap(Point, **mode)(jnp.arange(3.0))


@case()
def vmap_makes_modules_by_filter(nnx, mode):
    class Point(nnx.Module):
        def __init__(self, i):
            self.w = nnx.Param(i * jnp.ones(2))
            self.b = nnx.BatchStat(jnp.zeros(()))

    axes = axes_of(nnx, mode, Point(1.0), {nnx.Param: 1, ...: None})
    return nnx.vmap(Point, out_axes=axes, **mode)(jnp.arange(3.0))


@case()
def vmap_sets_attributes(nnx, mode):
    m = module(nnx)

    def f(m):
        m.new = nnx.Param(m.w * 2)
        m.flag = True
        return m.w.sum()

    return nnx.vmap(f, **mode)(m), m


@case("live")
def vmap_sets_attributes_by_filter(nnx, mode):
    m = module(nnx, b=None)

    def f(m):
        m.new = nnx.BatchStat(jnp.ones(()))
        m.other = nnx.Param(m.w * 2)
        return m.w.sum()

    return nnx.vmap(f, in_axes=(nnx.StateAxes({nnx.Param: 1, ...: None}),), **mode)(m), m


@case("live")
def vmap_returns_its_argument(nnx, mode):
    m = module(nnx)
    return nnx.vmap(lambda m: m, **mode)(m) is m


@case("live", "graph")
def vmap_of_one_object_twice(nnx, mode):
    m = module(nnx)

    def f(a, b, c):
        assert a is b and a.w is c
        b.b[...] = b.b + 1
        return a.w + c

    return nnx.vmap(f, **mode)(m, m, m.w), m


@case()
def vmap_of_variables_and_trees(nnx, mode):
    v, m = nnx.Param(jnp.arange(6.0).reshape(2, 3)), module(nnx)

    def f(d, x):
        d["v"][...] = d["v"] + x
        return {"sum": d["v"].sum(), "m": d["m"].w * 1, "x": x}

    f = nnx.vmap(f, in_axes=({"v": -1, "m": 0}, None), out_axes={"sum": 0, "m": 1, "x": None}, **mode)
    return f({"v": v, "m": m}, 2.0), v, m


@case()
def vmap_broadcast_and_written_alike(nnx, mode):
    count = nnx.Variable(jnp.array(0))

    def f(count, x):
        count[...] = count + 1
        return x + count

    return nnx.vmap(f, in_axes=(None, 0), **mode)(count, jnp.arange(3)), count


@case()
def vmap_with_a_name_of_the_axis(nnx, mode):
    v = nnx.Param(jnp.arange(3.0))

    def f(v):
        v[...] = jax.lax.pmean(v[...], "i")
        return jax.lax.psum(1, "i")

    return nnx.vmap(f, axis_name="i", out_axes=None, **mode)(v), v


@case()
def vmap_of_nothing_but_a_size(nnx, mode):
    return nnx.vmap(lambda m: m.w * 1, in_axes=None, axis_size=2, **mode)(module(nnx))


@case()
def vmap_with_keywords(nnx, mode):
    v = nnx.Param(jnp.arange(3.0))

    def f(x, v):
        v[...] = v + x

    nnx.vmap(f, **mode)(jnp.arange(3.0), v=v)
    return v


@case("live")
def vmap_gives_keywords_their_places(nnx, mode):
    return nnx.vmap(lambda x, y, z=3.0: x + y + z, in_axes=(0, None, None), **mode)(jnp.arange(3.0), y=2.0)


@case()
def vmap_of_a_method(nnx, mode):
    class M(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.arange(3.0))

        @nnx.vmap(in_axes=(None, 0), **mode)
        def total(self, x):
            return self.w.sum() + x

    return M().total(jnp.arange(2.0))


@case()
def vmap_of_vmap_in_jit(nnx, mode):
    v = nnx.Param(jnp.arange(6.0).reshape(2, 3))

    def f(v, x):
        v[...] = v + x
        return v * 2

    inner = nnx.vmap(f, in_axes=(0, None), **mode)
    return nnx.jit(nnx.vmap(inner, in_axes=(1, 0), out_axes=1, **mode), **mode)(v, jnp.arange(3.0)), v


@case()
def vmap_in_grad(nnx, mode):
    v, count = nnx.Param(jnp.arange(6.0).reshape(2, 3)), nnx.BatchStat(jnp.zeros(2))

    def f(v, count):
        count[...] = count + 1
        return (v**2).sum()

    loss = lambda v, count: nnx.vmap(f, **mode)(v, count).sum()
    return nnx.grad(loss, **mode)(v, count)[...], count


@case()
def vmap_draws_from_a_broadcast_stream(nnx, mode):
    rngs = nnx.Rngs(0)
    f = nnx.vmap(lambda rngs, x: words_of(rngs()) + x, in_axes=(None, 0), **mode)
    return f(rngs, jnp.arange(3, dtype="uint32")), rngs


@case()
def vmap_draws_from_split_streams(nnx, mode):
    rngs = nnx.Rngs(params=0, dropout=1)

    @nnx.split_rngs(splits=3, only="params", **mode)
    @nnx.vmap(in_axes=(axes_of(nnx, mode, rngs, {"params": 0, ...: None}), 0), **mode)
    def f(rngs, x):
        return words_of(rngs.params()) + words_of(rngs.dropout()) + x

    return f(rngs, jnp.arange(3, dtype="uint32")), rngs


@case("live")
def vmap_takes_the_name_of_the_axis_away(nnx, mode):
    v, seen = named(nnx), []

    def f(v):
        seen.append(v.out_sharding)
        v[...] = v + 1
        return nnx.Param(v * 2, out_sharding=("embed",), eager_sharding=False)

    out = nnx.vmap(f, out_axes=1, transform_metadata={nnx.PARTITION_NAME: "layer"}, **mode)(v)
    return out, v, seen


@case()
def metadata_stay_where_no_axis_is_named(nnx, mode):
    v, seen = named(nnx), []

    def f(v):
        seen.append(v.out_sharding)
        return v * 2

    return nnx.vmap(f, transform_metadata={"other": 1}, **mode)(v), v, seen


@case("graph", "tree")
def transform_metadata_below_vmap(nnx, mode):
    v, seen = named(nnx), []

    @nnx.vmap(in_axes=0, out_axes=1, **mode)
    @nnx.transform_metadata(in_axes=0, out_axes=1, partition="layer", graph=mode["graph"])
    def f(v):
        seen.append(v.out_sharding)
        return nnx.Param(v * 2, out_sharding=("embed",), eager_sharding=False)

    return f(v), v, seen


@case("graph", "tree")
def transform_metadata_below_scan(nnx, mode):
    v, seen = named(nnx), []

    @nnx.scan(**mode)
    @nnx.transform_metadata(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), partition="layer", graph=mode["graph"])
    def f(c, v):
        seen.append(v.out_sharding)
        return c + 1, nnx.Param(v * 2, out_sharding=("embed",), eager_sharding=False)

    return f(0.0, v), v, seen


@case()
def transform_metadata_alone(nnx, mode):
    v, u, seen = named(nnx), named(nnx, ("embed", "layer")), []

    @nnx.transform_metadata(in_axes=(None, 1), out_axes=(1, None), partition="layer", graph=mode["graph"])
    def f(v, u):
        seen.append((v.out_sharding, u.out_sharding))
        return nnx.Param(v * 2, out_sharding=("embed",), eager_sharding=False), 1.0

    return f(v, u), v, u, seen


@error("`in_axes` cannot contain `StateAxes` objects", "graph", "tree")
def vmap_by_filter_without_updates(nnx, mode):
    nnx.vmap(lambda m: m.w, in_axes=(nnx.StateAxes({...: 0}),), **mode)


@error("`out_axes` cannot contain `StateAxes` objects", "graph", "tree")
def vmap_results_by_filter_without_updates(nnx, mode):
    nnx.vmap(lambda m: m.w, out_axes=nnx.StateAxes({...: 0}), **mode)


@error("Graph nodes are not allowed as prefixes", "live")
def vmap_by_an_object_with_updates(nnx, mode):
    m = module(nnx)
    nnx.vmap(lambda m: m.w, in_axes=(nnx.prefix(m, {...: 0}, graph=False),), **mode)(m)


@error("Variables prefixes are not supported")
def vmap_by_a_variable(nnx, mode):
    nnx.vmap(lambda v: v * 1, in_axes=(nnx.Param(0),), **mode)(nnx.Param(jnp.ones(2)))


@error("Inconsistent aliasing detected", "live", "graph")
def vmap_of_one_object_along_two_axes(nnx, mode):
    m = module(nnx)
    nnx.vmap(lambda a, b: a.w + b.w, in_axes=(0, 1), **mode)(m, m)


@error("Duplicate Param", "tree")
def vmap_of_a_tree_twice(nnx, mode):
    m = module(nnx)
    del m.b
    nnx.vmap(lambda a, b: a.w + b.w, **mode)(m, m)


@error("Inconsistent aliasing detected", "live")
def vmap_returns_along_another_axis(nnx, mode):
    v = nnx.Param(jnp.ones((2, 2)))
    nnx.vmap(lambda v: v, out_axes=1, **mode)(v)


@error("does not support Variable aliasing", "graph", "tree")
def vmap_returns_its_argument_without_updates(nnx, mode):
    nnx.vmap(lambda m: m, **mode)(module(nnx))


@error("got axis spec None but output was batched on axis 0")
def vmap_writes_what_differs_into_what_is_broadcast(nnx, mode):
    def f(count, x):
        count[...] = count + x

    nnx.vmap(f, in_axes=(None, 0), **mode)(nnx.Variable(jnp.array(0)), jnp.arange(3))


@error("nnx.vmap does not support bound methods")
def vmap_of_a_bound_method(nnx, mode):
    class M(nnx.Module):
        def f(self, x):
            return x

    nnx.vmap(M().f, **mode)


@error("vmap in_axes must be an int, None, or a tuple")
def vmap_by_a_word(nnx, mode):
    nnx.vmap(lambda x: x, in_axes="0", **mode)(jnp.arange(2))


@error("vmap got inconsistent sizes for array axes to be mapped")
def vmap_of_sizes_that_differ(nnx, mode):
    nnx.vmap(lambda m, x: x, **mode)(module(nnx), jnp.arange(2))


@error("which implies that its rank should be at least 1, but is only 0 (its shape is ())")
def vmap_of_a_number(nnx, mode):
    nnx.vmap(lambda m, x: x, **mode)(module(nnx), 1.0)


@error("different trace level", "live")
def vmap_returns_what_it_captured(nnx, mode):
    m = module(nnx)
    nnx.vmap(lambda x: m, **mode)(jnp.arange(2))


@error("Cannot return captured Variable of type BatchStat from nnx.vmap", "graph", "tree")
def vmap_returns_what_it_captured_without_updates(nnx, mode):
    m = module(nnx)
    nnx.vmap(lambda x: m, **mode)(jnp.arange(2))


@error("Expected to remove 'other' at index 0", "live")
def vmap_with_the_name_of_another_axis(nnx, mode):
    nnx.vmap(lambda v: v * 1, transform_metadata={nnx.PARTITION_NAME: "other"}, **mode)(named(nnx))


# ---------------------------------------------------------------- pmap
@case()
def pmap_writes_what_is_mapped(nnx, mode):
    m = module(nnx, w=nnx.Param(jnp.ones((4, 2))), b=nnx.BatchStat(jnp.zeros(4)))

    def f(m, x):
        m.b[...] = m.b + jax.lax.psum(x, "i")
        return m.w.sum() + x

    return nnx.pmap(f, axis_name="i", **mode)(m, jnp.arange(4.0)), m


@case()
def pmap_by_filter_with_static_arguments(nnx, mode):
    m = module(nnx, w=nnx.Param(jnp.ones((4, 2))))
    axes = axes_of(nnx, mode, m, {nnx.Param: 0, ...: None})

    def f(m, power, x):
        m.w[...] = m.w + x
        return m.w.sum() ** power + m.b.sum()

    f = nnx.pmap(f, in_axes=(axes, None, 0), static_broadcasted_argnums=1, **mode)
    return f(m, 2, jnp.arange(4.0)), f(m, 3, jnp.arange(4.0)), m


@case()
def pmap_gives_buffers_away(nnx, mode):
    m = module(nnx, w=nnx.Param(jnp.ones((4, 2))), b=nnx.BatchStat(jnp.zeros(4)))

    def f(m, x):
        m.w[...] = m.w + x

    nnx.pmap(f, donate_argnums=0, **mode)(m, jnp.arange(4.0))
    return m


@case()
def pmap_makes_modules(nnx, mode):
    return nnx.pmap(lambda key: nnx.Param(jax.random.normal(key, (2,))), **mode)(jax.random.split(jax.random.key(0), 4))


@case("live")
def pmap_takes_the_name_of_the_axis_away(nnx, mode):
    v, seen = named(nnx, shape=(4, 2)), []

    def f(v):
        seen.append(v.out_sharding)
        return v * 2

    return nnx.pmap(f, transform_metadata={nnx.PARTITION_NAME: "layer"}, **mode)(v), v, seen


@error("nnx.pmap does not support bound methods")
def pmap_of_a_bound_method(nnx, mode):
    class M(nnx.Module):
        def f(self, x):
            return x

    nnx.pmap(M().f, **mode)


# ---------------------------------------------------------------- scan
@case()
def scan_of_arrays(nnx, mode):
    return nnx.scan(lambda c, x: (c + x, c * x), **mode)(jnp.float32(0), jnp.arange(3.0))


@case()
def scan_carries_a_variable(nnx, mode):
    v = nnx.BatchStat(jnp.float32(1))

    def f(v, x):
        v[...] = v + x
        return v, v * 2

    out, ys = nnx.scan(f, **mode)(v, jnp.arange(3.0))
    return out is v, ys, v


@case()
def scan_carries_modules_in_a_tuple(nnx, mode):
    m = module(nnx)

    def f(carry, x):
        m, total = carry
        m.b[...] = m.b + x
        return (m, total + x), m.b.sum()

    (out, total), ys = nnx.scan(f, **mode)((m, jnp.float32(0)), jnp.arange(3.0))
    return out is m, out.b is m.b, total, ys, m


@case("live", "graph")
def scan_carries_one_object_twice(nnx, mode):
    m = module(nnx)

    def f(carry, x):
        a, b = carry
        b.b[...] = b.b + x
        return (a, b), a.b * 1

    (a, b), ys = nnx.scan(f, **mode)((m, m), jnp.arange(3.0))
    return a.b is b.b is m.b, ys, m


@case()
def scan_over_layers(nnx, mode):
    m = module(nnx)

    def f(m, c):
        m.b[...] = m.b + c
        return c + m.w.sum()

    return nnx.scan(f, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, **mode)(m, jnp.float32(0)), m


@case("live")
def scan_by_filter(nnx, mode):
    m = module(nnx, count=nnx.Cache(jnp.array(0)), scale=nnx.Intermediate(jnp.array(5.0)))
    axes = nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, nnx.Cache: nnx.Carry, ...: None})

    def f(m, c):
        m.b[...] = m.b + c
        m.count[...] = m.count + 1
        return c + m.w.sum() * m.scale

    return nnx.scan(f, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry, **mode)(m, jnp.float32(0)), m


@case("live")
def scan_carries_by_filter_alone(nnx, mode):
    m = module(nnx)

    def f(m):
        m.b[...] = m.b + 1
        return m.w.sum() + m.b

    return nnx.scan(f, length=4, in_axes=(nnx.StateAxes({...: nnx.Carry}),), out_axes=0, **mode)(m), m


@case("live")
def scan_carries_by_filter_and_in_a_list(nnx, mode):
    m = module(nnx)

    def f(m, carry):
        carry[0].b[...] = m.b + 1
        return carry

    axes = nnx.StateAxes({...: nnx.Carry})
    out = nnx.scan(f, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry, length=3, **mode)(m, [m, jnp.float32(1)])
    return out[0] is m, out[1], m


@case("graph", "tree")
def scan_by_an_object(nnx, mode):
    m = module(nnx)
    axes = nnx.prefix(m, {nnx.Param: 0, ...: None}, graph=mode["graph"])

    def f(c, m):
        m.b[...] = m.b + 1
        return c + m.w.sum(), m.b * 1

    return nnx.scan(f, in_axes=(nnx.Carry, axes), **mode)(jnp.float32(0), m), m


@case("graph", "tree")
def scan_writes_what_is_broadcast(nnx, mode):
    m = module(nnx)

    def f(c, m):
        m.b[...] = m.b + 1
        return c, m.b * 1

    return nnx.scan(f, in_axes=(nnx.Carry, None), length=2, **mode)(jnp.float32(0), m), m


@case()
def scan_reads_what_is_broadcast(nnx, mode):
    m = module(nnx)
    f = nnx.scan(lambda c, m, x: (c + m.w.sum() * x, c), in_axes=(nnx.Carry, None, 0), **mode)
    return f(jnp.float32(0), m, jnp.arange(3.0)), m


@case()
def scan_of_parts_of_a_dict(nnx, mode):
    m = module(nnx)
    f = nnx.scan(lambda c, d: (c, d["m"].w.sum() * d["k"]), in_axes=(nnx.Carry, {"m": 0, "k": None}), **mode)
    return f(jnp.float32(1), {"m": m, "k": jnp.float32(2)})


@case()
def scan_along_other_axes(nnx, mode):
    f = nnx.scan(lambda c, x: (c + x, (c, x)), in_axes=(nnx.Carry, 1), out_axes=(nnx.Carry, (0, -1)), **mode)
    return f(jnp.zeros(2), jnp.arange(6.0).reshape(2, 3))


@case()
def scan_writes_along_another_axis(nnx, mode):
    v = nnx.Param(jnp.arange(6.0).reshape(2, 3))

    def f(c, v):
        v[...] = v + c
        return c + 1, v * 1

    return nnx.scan(f, in_axes=(nnx.Carry, -1), out_axes=(nnx.Carry, 1), **mode)(jnp.float32(0), v), v


@case()
def scan_without_a_carry(nnx, mode):
    m = module(nnx)

    def f(m, x):
        m.b[...] = m.b + x
        return m.w * x

    return nnx.scan(f, in_axes=(0, 0), out_axes=0, **mode)(m, jnp.arange(3.0)), m


@case()
def scan_of_a_carry_alone(nnx, mode):
    return nnx.scan(lambda x: x * 2, in_axes=nnx.Carry, out_axes=nnx.Carry, length=3, **mode)(jnp.arange(3.0))


@case()
def scan_with_the_carry_in_the_middle(nnx, mode):
    f = nnx.scan(lambda x, c: (x * 2, c + x, x), in_axes=(0, nnx.Carry), out_axes=(0, nnx.Carry, 0), **mode)
    return f(jnp.arange(3.0), jnp.float32(0))


@case()
def scan_backwards(nnx, mode):
    m = module(nnx)

    def f(c, m):
        m.b[...] = m.b + c
        return c + 1, c

    return nnx.scan(f, reverse=True, unroll=2, _split_transpose=True, **mode)(jnp.float32(0), m), m


@case()
def scan_makes_modules(nnx, mode):
    def f(c, x):
        m = module(nnx)
        m.w[...] = m.w + x
        return c + 1, m

    return nnx.scan(f, **mode)(jnp.float32(0), jnp.arange(2.0))


@case("live")
def scan_makes_modules_by_filter(nnx, mode):
    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    return nnx.scan(lambda c, x: (c + x, module(nnx)), out_axes=(nnx.Carry, axes), **mode)(0.0, jnp.arange(2.0))[1]


@case()
def scan_sets_attributes_of_what_is_cut(nnx, mode):
    m = module(nnx)

    def f(c, m):
        m.new = nnx.Param(c)
        m.flag = 3
        return c + 1, m.w.sum()

    return nnx.scan(f, **mode)(jnp.float32(0), m), m


@case("live")
def scan_sets_a_setting_of_the_carry(nnx, mode):
    m = module(nnx, flag=0)

    def f(m, x):
        m.flag = 1
        return m, x

    out, _ = nnx.scan(f, **mode)(m, jnp.arange(3.0))
    return out is m, m


@case("live")
def scan_returns_what_it_cut(nnx, mode):
    m = module(nnx)
    return nnx.scan(lambda c, m: (c, m), **mode)(1.0, m)[1] is m


@case()
def scan_of_a_method(nnx, mode):
    class M(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.arange(3.0))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, **mode)
        def through(self, x):
            return x + self.w

    return M().through(jnp.float32(0))


@case()
def scan_in_grad_in_jit(nnx, mode):
    m = module(nnx)

    def f(c, m):
        m.b[...] = m.b + c.sum()
        return jnp.tanh(c + m.w), c

    def loss(m, x):
        out, ys = nnx.scan(f, **mode)(x, m)
        return (out**2).sum() + ys.sum()

    loss_and_grad = nnx.jit(nnx.value_and_grad(loss, **mode), **mode)
    value, grads = loss_and_grad(m, jnp.ones(2))
    return value, grads["w"] if mode["graph_updates"] else grads.w, m


@case()
def scan_in_scan(nnx, mode):
    m = module(nnx)

    def inner(carry, x):
        m, c = carry
        m.b[...] = m.b + x
        return (m, c + x), c

    def outer(carry, x):
        return nnx.scan(inner, **mode)(carry, x)

    (_, total), ys = nnx.scan(outer, **mode)((m, jnp.float32(0)), jnp.arange(6.0).reshape(2, 3))
    return total, ys, m


@case()
def scan_in_vmap(nnx, mode):
    m = module(nnx)

    def step(c, x, m):
        m.b[...] = m.b + x
        return c + m.w.sum() * x, c

    f = lambda m, xs: nnx.scan(step, in_axes=(nnx.Carry, 0, None), **mode)(jnp.float32(0), xs, m)
    if mode["graph_updates"]:
        f = lambda m, xs: nnx.scan(step, in_axes=(nnx.Carry, 0, nnx.StateAxes({...: nnx.Carry})), **mode)(0.0, xs, m)
    return nnx.vmap(f, in_axes=(0, None), **mode)(m, jnp.arange(2.0)), m


@case("live")
def scan_draws_the_same_from_a_broadcast_stream(nnx, mode):
    rngs = nnx.Rngs(0)
    f = nnx.scan(lambda c, rngs: (c, words_of(rngs())), in_axes=(nnx.Carry, None), length=3, **mode)
    return f(jnp.float32(0), rngs), rngs


@case("graph", "tree")
def scan_draws_on_from_a_broadcast_stream(nnx, mode):
    rngs = nnx.Rngs(0)
    f = nnx.scan(lambda c, rngs: (c, words_of(rngs())), in_axes=(nnx.Carry, None), length=3, **mode)
    return f(jnp.float32(0), rngs), rngs


@case()
def scan_draws_from_a_carried_stream(nnx, mode):
    rngs = nnx.Rngs(0)
    f = nnx.scan(lambda rngs, x: (rngs, words_of(rngs()) + x), **mode)
    return f(rngs, jnp.arange(3, dtype="uint32"))[1], rngs


@case()
def scan_draws_from_split_streams(nnx, mode):
    rngs = nnx.Rngs(0)
    f = nnx.split_rngs(splits=3, **mode)(nnx.scan(lambda c, rngs: (c, words_of(rngs())), **mode))
    return f(jnp.float32(0), rngs), rngs


@case("live")
def scan_takes_the_name_of_the_axis_away(nnx, mode):
    v, carried, seen = named(nnx), named(nnx), []

    def f(carried, v):
        seen.append((carried.out_sharding, v.out_sharding))
        return carried, nnx.Param(v * 2, out_sharding=("embed",), eager_sharding=False)

    _, out = nnx.scan(f, transform_metadata={nnx.PARTITION_NAME: "layer"}, **mode)(carried, v)
    return out, v, carried, seen


@case("live")
def scan_writes_bare_arrays(nnx, mode):
    carried, cut = module(nnx, total=jnp.float32(0)), module(nnx, part=jnp.arange(3.0))

    def f(carried, cut):
        carried.total = carried.total + cut.part
        cut.part = cut.part + 1
        return carried, carried.total

    out, ys = nnx.scan(f, **mode)(carried, cut)
    return out is carried, ys, carried, cut


@case("graph", "tree")
def scan_carries_bare_arrays(nnx, mode):
    m = module(nnx, total=jnp.float32(0))

    def f(m, x):
        m.total = m.total + x
        return m, x

    out, _ = nnx.scan(f, **mode)(m, jnp.arange(3.0))
    return out, out.b is m.b, m


@error("If one of in_axes or out_axes has Carry, the other must also have Carry")
def scan_without_the_carry_of_the_result(nnx, mode):
    nnx.scan(lambda x, c: x, in_axes=(0, nnx.Carry), out_axes=0, **mode)


@error("If one of in_axes or out_axes has Carry, the other must also have Carry")
def scan_without_the_carry_of_the_arguments(nnx, mode):
    nnx.scan(lambda x, c: x, in_axes=(0, 0), out_axes=(0, nnx.Carry), **mode)


@error("Found multiple Carry definitions")
def scan_with_two_carries(nnx, mode):
    nnx.scan(lambda x, c: x, in_axes=(nnx.Carry, nnx.Carry), **mode)


@error("Found multiple Carry definitions")
def scan_with_two_carries_as_results(nnx, mode):
    nnx.scan(lambda x, c: x, out_axes=(nnx.Carry, nnx.Carry), **mode)


@error("it cannot be nested")
def scan_with_a_nested_carry(nnx, mode):
    nnx.scan(lambda x, c: x, in_axes=((nnx.Carry, 0), 0), **mode)


@error("Carry must be a top-level argument, it cannot be nested", "graph", "tree")
def scan_with_a_carry_in_an_object(nnx, mode):
    axes = nnx.prefix(module(nnx), {...: nnx.Carry}, graph=mode["graph"])
    nnx.scan(lambda x, c: x, in_axes=(axes, 0), **mode)


@error("Cannot broadcast output state. Got out_axes=None at: out_axes[1]")
def scan_of_a_result_without_axis(nnx, mode):
    nnx.scan(lambda c, x: (c, x), out_axes=(nnx.Carry, None), **mode)


@error("Cannot broadcast output state. Got StateAxes({Ellipsis: None}) at: out_axes[1]", "live")
def scan_of_a_result_without_axis_by_filter(nnx, mode):
    nnx.scan(lambda c, x: (c, x), out_axes=(nnx.Carry, nnx.StateAxes({...: None})), **mode)


@error("Cannot carry output state. Got StateAxes(", "live")
def scan_of_a_result_that_is_carried_by_filter(nnx, mode):
    nnx.scan(lambda c, x: (c, x), out_axes=(nnx.Carry, nnx.StateAxes({...: nnx.Carry})), **mode)


@error("When in_axes=Carry, the function must take exactly one argument, got 2 arguments")
def scan_of_two_arguments_by_carry(nnx, mode):
    nnx.scan(lambda a, b: a, in_axes=nnx.Carry, out_axes=nnx.Carry, length=3, **mode)(1.0, 2.0)


@error("scan got values with different leading axis sizes")
def scan_of_sizes_that_differ(nnx, mode):
    nnx.scan(lambda c, x, m: (c, x), in_axes=(nnx.Carry, 0, 0), **mode)(0.0, jnp.arange(4), module(nnx))


@error("Carry references must be the same between iterations", "live")
def scan_returns_another_module(nnx, mode):
    nnx.scan(lambda m, x: (module(nnx), x), **mode)(module(nnx), jnp.arange(3.0))


@error("scan Variable identity must be preserved across iterations", "graph", "tree")
def scan_returns_another_variable(nnx, mode):
    nnx.scan(lambda v, x: (nnx.Param(v + 1), x), **mode)(nnx.Param(jnp.float32(0)), jnp.arange(3.0))


@error("Inconsistent aliasing detected", "live", "graph")
def scan_of_one_object_as_carry_and_cut(nnx, mode):
    m = module(nnx)
    nnx.scan(lambda a, b: (a, b.w * 1), **mode)(m, m)


@error("Duplicate", "tree")
def scan_of_one_tree_as_carry_and_cut(nnx, mode):
    m = module(nnx)
    nnx.scan(lambda a, b: (a, b.w * 1), **mode)(m, m)


@error("does not support Variable aliasing", "graph", "tree")
def scan_returns_what_it_cut_without_updates(nnx, mode):
    nnx.scan(lambda c, m: (c, m), **mode)(1.0, module(nnx))


@error("nnx.scan does not support bound methods")
def scan_of_a_bound_method(nnx, mode):
    class M(nnx.Module):
        def f(self, c, x):
            return c, x

    nnx.scan(M().f, **mode)


@error("keyword arguments could not be resolved to positions", "live")
def scan_with_keywords_alone(nnx, mode):
    nnx.scan(lambda c, *, x: (c, x), **mode)(0.0, x=jnp.arange(3))


# ---------------------------------------------------------------- while_loop, fori_loop
@case()
def while_loop_of_numbers(nnx, mode):
    return nnx.while_loop(lambda v: v[0] < 3, lambda v: (v[0] + 1, v[1] * 2), (jnp.int32(0), jnp.float32(1)), **mode)


@case()
def while_loop_writes_a_module(nnx, mode):
    m = module(nnx)

    def body(value):
        i, m = value
        m.b[...] = m.b + i
        return i + 1, m

    i, out = nnx.while_loop(lambda value: value[1].b.sum() < 9, body, (jnp.int32(0), m), **mode)
    return i, out is m, out.b is m.b, m


@case("live", "graph")
def while_loop_of_one_object_twice(nnx, mode):
    m = module(nnx)

    def body(value):
        a, b = value
        b.b[...] = a.b + 1
        return a, b

    a, b = nnx.while_loop(lambda value: value[0].b.sum() < 9, body, (m, m), **mode)
    return a.b is b.b is m.b, m


@case()
def while_loop_writes_a_bare_array(nnx, mode):
    m = module(nnx, total=jnp.float32(0))

    def body(value):
        i, m = value
        m.total = m.total + i
        return i + 1, m

    i, out = nnx.while_loop(lambda value: value[1].total < 4, body, (jnp.int32(0), m), **mode)
    return i, out.total, m


@case()
def while_loop_of_methods(nnx, mode):
    class M(nnx.Module):
        def goes_on(self, v):
            return v < 9

        def body(self, v):
            return v + 2

    m = M()
    return nnx.while_loop(m.goes_on, m.body, jnp.int32(0), **mode)


@case()
def fori_loop_writes_a_module(nnx, mode):
    m = module(nnx)

    def body(i, value):
        m, x = value
        m.b[...] = m.b + i
        return m, x + m.b.sum()

    out, x = nnx.fori_loop(1, 4, body, (m, jnp.float32(0)), unroll=2, **mode)
    return out is m, out.b is m.b, x, m


@case()
def fori_loop_with_bounds_that_are_traced(nnx, mode):
    v = nnx.Param(jnp.float32(0))

    def body(i, v):
        v[...] = v + i
        return v

    out = nnx.fori_loop(jnp.int32(0), jnp.int32(3), body, v, **mode)
    return out is v, v


@case()
def fori_loop_draws(nnx, mode):
    rngs = nnx.Rngs(0)
    _, out = nnx.fori_loop(0, 3, lambda i, v: (v[0], v[1] + words_of(v[0]())), (rngs, jnp.uint32(0)), **mode)
    return out, rngs


@error("requires body function's input and output to have the same reference and pytree structure", "live")
def while_loop_sets_a_new_variable(nnx, mode):
    def body(m):
        m.new = nnx.Param(jnp.ones(2))
        return m

    nnx.while_loop(lambda m: m.b.sum() < 9, body, module(nnx), **mode)


@error("requires body function's input and output to have the same reference and pytree structure", "live")
def while_loop_sets_a_setting(nnx, mode):
    def body(m):
        m.flag = 1
        return m

    nnx.while_loop(lambda m: m.b.sum() < 9, body, module(nnx, flag=0), **mode)


@error("requires body function's input and output to have the same reference and pytree structure", "live")
def while_loop_swaps_variables(nnx, mode):
    x, y = nnx.Param(jnp.float32(1)), nnx.Param(jnp.float32(2))
    nnx.while_loop(lambda v: v[2] < 3, lambda v: (v[1], v[0], v[2] + 1), (x, y, jnp.int32(0)), **mode)


@error("while_loop Variable identity must be preserved across iterations", "graph", "tree")
def while_loop_returns_another_variable(nnx, mode):
    nnx.while_loop(lambda v: v[...] < 3, lambda v: nnx.Param(v + 1), nnx.Param(jnp.float32(0)), **mode)


@error("fori_loop Variable identity must be preserved across iterations", "graph", "tree")
def fori_loop_returns_another_variable(nnx, mode):
    nnx.fori_loop(0, 3, lambda i, v: nnx.Param(v + 1), nnx.Param(jnp.float32(0)), **mode)


@error("body function carry input and carry output must have equal types, but they differ")
def while_loop_changes_a_shape(nnx, mode):
    def body(v):
        v.set_value(jnp.zeros(2))
        return v

    nnx.while_loop(lambda v: v.sum() < 3, body, nnx.Param(jnp.float32(0)), **mode)


# ---------------------------------------------------------------- cond, switch
@case()
def cond_writes_either_way(nnx, mode):
    m = module(nnx)

    def yes(m, x):
        m.b[...] = m.b + x
        return m.b.sum()

    def no(m, x):
        m.w[...] = m.w - x
        return m.w.sum()

    choose = lambda p: nnx.cond(p, yes, no, m, jnp.float32(2), **mode)
    return choose(jnp.array(True)), choose(jnp.array(False)), choose(True), m


@case()
def cond_in_jit(nnx, mode):
    m = module(nnx)

    def yes(m):
        m.b[...] = m.b + 1

    @nnx.jit(**mode)
    def f(m, p):
        nnx.cond(p, yes, lambda m: None, m, **mode)
        return nnx.cond(p, lambda m: m.w.sum(), lambda m: m.b.sum(), m, **mode)

    return f(m, True), f(m, False), m


@case()
def cond_sets_the_same_attributes(nnx, mode):
    m = module(nnx)

    def yes(m):
        m.new, m.flag = nnx.Param(jnp.ones(2)), 1

    def no(m):
        m.new, m.flag = nnx.Param(jnp.zeros(2)), 1

    nnx.cond(True, yes, no, m, **mode)
    return m


@case()
def cond_makes_modules(nnx, mode):
    def no(x):
        m = module(nnx)
        m.b[...] = m.b + x
        return m

    return nnx.cond(False, lambda x: module(nnx), no, jnp.float32(3), **mode)


@case("live")
def cond_returns_its_argument(nnx, mode):
    m = module(nnx)
    return nnx.cond(False, lambda m: m, lambda m: m, m, **mode) is m


@case("live", "graph")
def cond_of_one_object_twice(nnx, mode):
    m = module(nnx)

    def yes(a, b):
        assert a is b
        b.b[...] = b.b + 1

    nnx.cond(True, yes, lambda a, b: None, m, m, **mode)
    return m


@case()
def cond_sets_metadata(nnx, mode):
    v = nnx.Param(jnp.float32(0))
    branch = lambda v: v.set_metadata(seen=True)
    nnx.cond(True, branch, branch, v, **mode)
    return v


@case()
def cond_draws_in_one_branch(nnx, mode):
    rngs = nnx.Rngs(0)
    return nnx.cond(True, lambda r: jax.random.normal(r(), ()), lambda r: 0.0, rngs, **mode), rngs


@case()
def cond_of_methods(nnx, mode):
    class M(nnx.Module):
        def f(self, x):
            return x + 1

    m = M()
    return nnx.cond(True, m.f, m.f, jnp.float32(1), **mode)


@case()
def switch_writes(nnx, mode):
    m = module(nnx)

    def branch(k):
        def f(m):
            m.b[...] = m.b + k
            return m.b * k

        return f

    branches = [branch(k) for k in range(3)]
    return [nnx.switch(jnp.array(i), branches, m, **mode) for i in (2, 7, -4)], m


@error("branch outputs must have the same pytree structure, but they differ", "live")
def cond_sets_an_attribute_in_one_branch(nnx, mode):
    def yes(m):
        m.new = nnx.Param(jnp.ones(2))

    nnx.cond(True, yes, lambda m: None, module(nnx), **mode)


@error("branch outputs must have the same pytree structure, but they differ", "live")
def cond_sets_different_settings(nnx, mode):
    def setter(value):
        def f(m):
            m.flag = value

        return f

    nnx.cond(True, setter(1), setter(2), module(nnx), **mode)


@error("branch outputs must have the same pytree structure, but they differ", "live")
def cond_returns_one_argument_or_the_other(nnx, mode):
    nnx.cond(True, lambda a, b: a, lambda a, b: b, module(nnx), module(nnx), **mode)


@error("branch outputs must have the same pytree structure, but they differ")
def cond_returns_other_structures(nnx, mode):
    nnx.cond(True, lambda x: (x, x), lambda x: [x, x], jnp.float32(1), **mode)


@error("branch outputs must have the same pytree structure, but they differ")
def cond_sets_metadata_in_one_branch(nnx, mode):
    nnx.cond(True, lambda v: v.set_metadata(seen=True), lambda v: None, nnx.Param(jnp.float32(0)), **mode)


@error("cond branches must have equal output types but they differ")
def cond_returns_other_shapes(nnx, mode):
    nnx.cond(True, lambda x: jnp.ones(2), lambda x: jnp.ones(3), jnp.float32(1), **mode)


@error("cond branches must have equal output types but they differ")
def cond_writes_another_shape(nnx, mode):
    nnx.cond(True, lambda v: v.set_value(jnp.zeros(2)), lambda v: None, nnx.Param(jnp.float32(0)), **mode)


@error("does not support Variable aliasing", "graph", "tree")
def cond_returns_its_argument_without_updates(nnx, mode):
    nnx.cond(True, lambda m: m, lambda m: m, module(nnx), **mode)


@error("Empty branch sequence")
def switch_of_nothing(nnx, mode):
    nnx.switch(0, [], 1.0, **mode)
