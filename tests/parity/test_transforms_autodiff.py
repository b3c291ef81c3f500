# SPDX-License-Identifier: Apache-2.0
"""Derivatives, custom rules, remat and tracing give what the installed Flax gives: structures, values, final states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax.experimental import checkify

from batiste import nnx as batiste_nnx

MODES = {
    "live": dict(graph=True, graph_updates=True),
    "graph": dict(graph=True, graph_updates=False),
    "tree": dict(graph=False, graph_updates=False),
}
CASES = []


def case(*modes):
    """Registers a scenario `f(nnx, mode, made)` for these modes, or for all; `made` has the module types below."""

    def register(f):
        CASES.extend(pytest.param(f, mode, id=f"{f.__name__}-{mode}") for mode in modes or MODES)
        return f

    return register


def modules(nnx):
    """The same small modules, of either library."""

    class Pair(nnx.Module):
        def __init__(self, x=3.0, y=5.0):
            self.x = nnx.Param(jnp.array(x), tag="a")
            self.y = nnx.BatchStat(jnp.array(y))

    class Mixed(Pair):
        def __init__(self):
            super().__init__()
            self.count = nnx.Variable(jnp.array(0))
            self.scale = nnx.data(jnp.array(2.0))
            self.size = 7

    class Tower(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Pair(2.0), Pair(4.0)])
            self.extra = nnx.Dict(a=nnx.Param(jnp.array(1.5)))

        def __call__(self):
            return self.layers[0].x * self.layers[1].x * self.extra["a"]

    return type("Made", (), dict(Pair=Pair, Mixed=Mixed, Tower=Tower))


def describe(nnx, x):
    """`(structure, arrays)` of a result, without the names of either library's own types."""
    if isinstance(x, nnx.Variable):
        metadata = {k: v for k, v in x.get_metadata().items() if k not in ("hijax", "ref", "eager_sharding")}
        structure, arrays = describe(nnx, x.get_raw_value())
        return (type(x).__name__, tuple(sorted(metadata.items())), structure), arrays
    if isinstance(x, nnx.Module):
        items = {k: v for k, v in vars(x).items() if not k.startswith("_")}
        return gather(nnx, type(x).__name__, items)
    if isinstance(x, nnx.State):
        return gather(nnx, "State", dict(x))
    if isinstance(x, dict):
        return gather(nnx, "dict", x)
    if isinstance(x, (tuple, list)):
        return gather(nnx, type(x).__name__, dict(enumerate(x)))
    if isinstance(x, (jax.Array, np.ndarray)) and x.dtype != jax.dtypes.float0:
        return (x.shape, str(x.dtype)), [np.asarray(x)]
    if isinstance(x, (np.ndarray, jax.ShapeDtypeStruct)):
        return (x.shape, str(x.dtype)), []
    return repr(x), []


def gather(nnx, kind, items):
    parts = {k: describe(nnx, items[k]) for k in sorted(items, key=str)}
    structure = (kind, tuple((k, part[0]) for k, part in parts.items()))
    return structure, [a for part in parts.values() for a in part[1]]


# ---------------------------------------------------------------- grad
def loss(m):
    m.y[...] = m.y + 1
    return m.x**2 * m.y


@case()
def grad_of_a_module(nnx, mode, made):
    m = made.Pair()
    return nnx.grad(loss, **mode)(m), m


@case()
def value_and_grad_of_a_module(nnx, mode, made):
    m = made.Pair()
    return nnx.value_and_grad(loss, **mode)(m), m


@case()
def grad_with_aux(nnx, mode, made):
    m = made.Pair()
    return nnx.grad(lambda m: (loss(m), {"a": m.y * 2, "b": nnx.Param(m.x + 1, new=1)}), has_aux=True, **mode)(m), m


@case()
def value_and_grad_with_aux(nnx, mode, made):
    return nnx.value_and_grad(lambda m: (loss(m), [m.y * 2]), has_aux=True, **mode)(made.Pair())


@case()
def grad_of_arrays(nnx, mode, made):
    return nnx.grad(lambda x: x["a"] ** 2 * x["b"][0], **mode)({"a": 3.0, "b": [2.0]})


@case()
def grad_of_two_arguments(nnx, mode, made):
    return nnx.grad(lambda x, m: x**2 * m.x, argnums=(1, 0), **mode)(3.0, made.Pair())


@case()
def grad_of_one_in_a_tuple(nnx, mode, made):
    return nnx.grad(lambda x, m: x**2 * m.x, argnums=(1,), **mode)(3.0, made.Pair())


@case()
def grad_of_a_tree_with_modules(nnx, mode, made):
    args = {"a": 3.0, "m": made.Pair(), "l": [made.Pair(7.0)]}
    return nnx.grad(lambda x: x["a"] ** 2 * x["m"].x * x["l"][0].x, **mode)(args)


@case()
def grad_of_a_nested_module(nnx, mode, made):
    return nnx.grad(lambda m: m(), **mode)(made.Tower())


@case()
def grad_of_a_lone_variable(nnx, mode, made):
    return nnx.grad(lambda x: x**2, **mode)(nnx.BatchStat(jnp.array(3.0), tag=1))


@case()
def grad_of_a_state(nnx, mode, made):
    state = nnx.state(made.Pair())
    return nnx.grad(loss, **mode)(state), state


@case()
def grad_of_a_state_of_arrays(nnx, mode, made):
    return nnx.grad(lambda s: s.x**2, **mode)(nnx.State({"x": jnp.array(3.0)}))


@case("live")
def grad_by_kind(nnx, mode, made):
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.BatchStat), **mode)(made.Pair())


@case("live")
def grad_by_path(nnx, mode, made):
    return nnx.grad(lambda m: m(), argnums=nnx.DiffState(0, nnx.PathContains("extra")), **mode)(made.Tower())


@case("live")
def grad_by_tag_and_of_an_array(nnx, mode, made):
    chosen = (nnx.DiffState(0, nnx.WithTag("a")), 1)
    return nnx.grad(lambda m, x: m.x * x, argnums=chosen, **mode)(made.Pair(), 2.0)


@case("live")
def grad_of_nothing(nnx, mode, made):
    return nnx.grad(lambda m: m.x * 1, argnums=nnx.DiffState(0, nnx.Cache), **mode)(made.Pair())


@case("live")
def grad_of_arrays_in_a_module(nnx, mode, made):
    only_arrays = nnx.DiffState(0, nnx.Not(nnx.OfType(nnx.Variable)))
    return nnx.grad(lambda m: m.x * m.scale, argnums=only_arrays, **mode)(made.Mixed())


@case("live")
def grad_leaves_integers_out(nnx, mode, made):
    return nnx.grad(lambda m: m.x * m.scale, **mode)(made.Mixed())


@case("graph", "tree")
def grad_with_integers(nnx, mode, made):
    return nnx.grad(lambda m: m.x * m.scale, allow_int=True, **mode)(made.Mixed())


@case()
def grad_of_complex_numbers(nnx, mode, made):
    return nnx.grad(lambda x: x**2, holomorphic=True, **mode)(3.0 + 1j)


@case()
def grad_of_an_integer(nnx, mode, made):
    return nnx.grad(lambda x: x * 2.0, allow_int=True, **mode)(3)


@case()
def grad_with_keywords(nnx, mode, made):
    other = made.Pair(2.0)
    return nnx.grad(lambda m, n: loss(n) * m.x, **mode)(made.Pair(), n=other), other


@case()
def grad_with_static_arguments(nnx, mode, made):
    return nnx.grad(lambda m, n, s: sum(m.x for _ in range(n)) * len(s), **mode)(made.Pair(), 3, "ab")


@case()
def grad_advances_streams(nnx, mode, made):
    rngs = nnx.Rngs(0)
    return nnx.grad(lambda x, r: x * jax.random.normal(r()), **mode)(2.0, rngs), rngs.default.count[...]


@case("live", "graph")
def grad_of_shared_variables(nnx, mode, made):
    m, n = made.Pair(), made.Pair()
    n.x = m.x
    return nnx.grad(lambda a, b: a.x * b.x, argnums=(0, 1), **mode)(m, n)


@case("live", "graph")
def grad_of_one_module_twice(nnx, mode, made):
    m = made.Pair()
    m.z = m.x
    return nnx.grad(lambda a, b: a.x * b.z, argnums=(0, 1), **mode)(m, m)


@case()
def grad_does_not_or_does_change_structure(nnx, mode, made):
    m = made.Pair()

    def f(m):
        m.new = nnx.Param(m.x * 2)
        m.y.set_metadata(seen=True)
        return m.x**2

    return nnx.grad(f, **mode)(m), m


@case()
def grad_of_a_changed_parameter(nnx, mode, made):
    m = made.Pair()
    return nnx.grad(lambda m: (m.x.set_value(m.x * 2), m.x**2)[1], **mode)(m), m


@case()
def grad_of_grad(nnx, mode, made):
    inner = nnx.grad(lambda m: m.x**3, **mode)
    return nnx.grad(lambda m: sum(jax.tree.leaves(inner(m))), **mode)(made.Pair())


@case()
def jit_of_grad_of_jit(nnx, mode, made):
    m = made.Pair()
    return nnx.jit(nnx.grad(nnx.jit(loss, **mode), **mode), **mode)(m), m


@case()
def grad_as_a_decorator(nnx, mode, made):
    @nnx.grad(has_aux=True, **mode)
    def f(m):
        return m.x**2, 3.0

    return f(made.Pair())


@case()
def grad_of_a_layer(nnx, mode, made):
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m, x: (m(x) ** 2).sum(), **mode)(layer, jnp.arange(6.0).reshape(2, 3))
    return grads["kernel"] if isinstance(grads, nnx.State) else grads.kernel


# ------------------------------------------------------------ vjp, jvp
@case("graph", "tree")
def vjp_of_a_module(nnx, mode, made):
    m = made.Mixed()
    out, pullback = nnx.vjp(lambda m, x: loss(m) * x, m, 2.0, **mode)
    return out, pullback(3.0), m


@case("graph", "tree")
def vjp_with_aux(nnx, mode, made):
    out, pullback, aux = nnx.vjp(lambda m: ({"a": m.x * 2, "b": m.y * 3}, m.x + 1), made.Pair(), has_aux=True, **mode)
    return out, pullback({"a": 1.0, "b": 2.0}), aux


@case("graph", "tree")
def vjp_without_arguments(nnx, mode, made):
    out, pullback = nnx.vjp(lambda m, x: m.x * x, **mode)(made.Pair(), 2.0)
    return out, pullback(1.0)


@case("tree")
def vjp_of_a_result_with_objects(nnx, mode, made):
    out, pullback = nnx.vjp(lambda m: made.Pair(m.x * 2, m.y * 3), made.Pair(), **mode)
    return out, pullback(out)


@case("graph")
def vjp_of_shared_variables(nnx, mode, made):
    m = made.Pair()
    return nnx.vjp(lambda a, b: a.x * b.x, m, m, **mode)[1](1.0)


@case("graph", "tree")
def jvp_of_a_module(nnx, mode, made):
    m = made.Pair()
    ones = jax.tree.map(jnp.ones_like, m)
    return nnx.jvp(lambda m, x: loss(m) * x, (m, 2.0), (ones, 0.5), **mode), m


@case("graph", "tree")
def jvp_with_aux(nnx, mode, made):
    ones = jax.tree.map(jnp.ones_like, made.Pair())
    return nnx.jvp(lambda m: (m.x**2, {"a": m.y * 1}), (made.Pair(),), (ones,), has_aux=True, **mode)


@case("graph", "tree")
def jvp_of_a_result_with_objects(nnx, mode, made):
    ones = jax.tree.map(jnp.ones_like, made.Pair())
    return nnx.jvp(lambda m: made.Pair(m.x * 2, m.y * 3), (made.Pair(),), (ones,), **mode)


@case("graph", "tree")
def jvp_of_grad(nnx, mode, made):
    ones = jax.tree.map(jnp.ones_like, made.Pair())
    return nnx.jvp(nnx.grad(lambda m: m.x**3 * m.y, **mode), (made.Pair(),), (ones,), **mode)


# ------------------------------------------------------------ remat
@case()
def remat_keeps_updates(nnx, mode, made):
    m = made.Pair()
    return nnx.remat(loss, **mode)(m), m


@case()
def grad_of_remat(nnx, mode, made):
    m = made.Pair()
    policy = jax.checkpoint_policies.nothing_saveable
    return nnx.grad(nnx.remat(loss, policy=policy, prevent_cse=False, **mode), **mode)(m), m


@case()
def remat_with_static_arguments(nnx, mode, made):
    f = nnx.remat(lambda m, n: sum(m.x for _ in range(n)), static_argnums=(1,), **mode)
    return nnx.grad(f, **mode)(made.Pair(), 3)


@case()
def remat_makes_objects(nnx, mode, made):
    return nnx.remat(lambda m: made.Pair(m.x * 2, m.y * 2), **mode)(made.Pair())


# ------------------------------------------------------------ tracing
@case()
def eval_shape_of_a_constructor(nnx, mode, made):
    return nnx.eval_shape(made.Mixed, **mode)


@case()
def eval_shape_leaves_arguments_alone(nnx, mode, made):
    m = made.Pair()
    return nnx.eval_shape(lambda m, x: (loss(m), m.x * x), m, x=jnp.ones(3), **mode), m


@case("live")
def eval_shape_returns_arguments(nnx, mode, made):
    return nnx.eval_shape(lambda m: m, made.Mixed(), **mode)


@case("graph", "tree")
def make_jaxpr_of_a_module(nnx, mode, made):
    return str(nnx.make_jaxpr(lambda m, x: m.x * x, **mode)(made.Pair(), 2.0))


@case("graph", "tree")
def make_jaxpr_with_static_arguments(nnx, mode, made):
    return str(nnx.make_jaxpr(lambda m, n: m.x * n, static_argnums=1, **mode)(made.Pair(), 2))


@case()
def checkify_keeps_updates(nnx, mode, made):
    def f(m, x):
        checkify.check(x > 3, "{x} is small", x=x)
        return loss(m) * x

    m = made.Pair()
    error, out = nnx.checkify(f, **mode)(m, jnp.array(2.0))
    return error.get(), out, m


@case()
def checkify_finds_nans_under_jit(nnx, mode, made):
    f = nnx.jit(lambda m: jnp.log(m.x), **mode)
    return nnx.checkify(f, errors=checkify.float_checks, **mode)(made.Pair(-1.0))[0].get()


# ------------------------------------------------------------ custom_vjp
def rule(nnx, mode, f, **options):
    """`f` with a rule that returns what it was given, and a list of that."""
    seen = []
    wrapped = nnx.custom_vjp(f, **mode, **options)

    def fwd(*args):
        return wrapped(*args), tuple(x for x in args if not isinstance(x, str))

    def bwd(*args):
        *static, residuals, g = args
        seen.append((static, residuals, g))
        like = g[0] if mode["graph_updates"] else residuals
        return tuple(jax.tree.map(jnp.ones_like, x) for x in like)

    wrapped.defvjp(fwd, bwd)
    return wrapped, seen


@case()
def custom_vjp_of_a_module(nnx, mode, made):
    f, seen = rule(nnx, mode, lambda m: m.x * m.y)
    m = made.Pair()
    return f(m), nnx.grad(f, **mode)(m), seen, m


@case()
def custom_vjp_changes_variables(nnx, mode, made):
    f, seen = rule(nnx, mode, loss)
    m = made.Pair()
    return nnx.grad(lambda m: f(m) + m.y * 2 + m.x * 3, **mode)(m), seen, m


@case()
def custom_vjp_of_nested_modules(nnx, mode, made):
    f, seen = rule(nnx, mode, lambda a, b: a() * b["m"].x)
    return nnx.grad(f, argnums=(0, 1), **mode)(made.Tower(), {"m": made.Pair()}), seen


@case()
def custom_vjp_of_a_variable(nnx, mode, made):
    f, seen = rule(nnx, mode, lambda v: v * 2)
    return nnx.grad(f, **mode)(nnx.Param(jnp.array(3.0), tag=1)), seen


@case()
def custom_vjp_with_a_static_argument(nnx, mode, made):
    f, seen = rule(nnx, mode, lambda m, s: m.x * len(s), nondiff_argnums=(1,))
    return nnx.grad(f, **mode)(made.Pair(), "abc"), seen


@case("live")
def custom_vjp_by_path(nnx, mode, made):
    only_x = nnx.DiffState(0, nnx.PathContains("x"))
    f = nnx.custom_vjp(lambda m: m.x * m.y, nondiff_argnums=(only_x,), **mode)

    def bwd(residuals, g):
        (state,) = jax.tree.map(jnp.ones_like, g[0])
        del state["y"]
        return (state,)

    f.defvjp(lambda m: (f(m), None), bwd)
    return nnx.grad(f, argnums=only_x, **mode)(made.Pair())


@case("graph", "tree")
def custom_vjp_hands_out_cotangents_of_updates(nnx, mode, made):
    seen = []
    f = nnx.custom_vjp(loss, **mode)

    def bwd(m, g, *, updates_g):
        seen.append(updates_g)
        return (jax.tree.map(jnp.ones_like, m),)

    f.defvjp(lambda m: (f(m), m), bwd)
    return nnx.grad(lambda m: f(m) + m.y * 2, **mode)(made.Pair()), seen


@case()
def custom_vjp_of_a_result_with_objects(nnx, mode, made):
    f, seen = rule(nnx, mode, lambda m: {"a": nnx.Intermediate(m.x * 2), "b": m.y * 2})
    return nnx.grad(lambda m: f(m)["a"][...] * 3, **mode)(made.Pair()), seen


@case()
def custom_vjp_under_jit_both_ways(nnx, mode, made):
    f, _ = rule(nnx, mode, loss)
    m, n = made.Pair(), made.Pair()
    return nnx.jit(nnx.grad(f, **mode), **mode)(m), nnx.grad(nnx.jit(f, **mode), **mode)(n), m, n


@case()
def custom_vjp_of_arrays_under_vmap(nnx, mode, made):
    f = nnx.custom_vjp(lambda x: x * 2, **mode)
    f.defvjp(lambda x: (x * 2, x), lambda x, g: (x * 3,))
    return jax.vmap(jax.grad(f))(jnp.arange(3.0))


@case()
def custom_vjp_with_symbolic_zeros(nnx, mode, made):
    f = nnx.custom_vjp(lambda x: x * 2, **mode)
    f.defvjp(lambda x: (x.value * 2, x.perturbed), lambda res, g: (4.0,), symbolic_zeros=True)
    return nnx.grad(f, **mode)(2.0)


@pytest.mark.parametrize(("scenario", "mode"), CASES)
def test_the_same_as_flax(scenario, mode):
    (structure, arrays), (expected_structure, expected) = (
        describe(nnx, scenario(nnx, MODES[mode], modules(nnx))) for nnx in (batiste_nnx, flax_nnx)
    )
    assert structure == expected_structure
    for a, b in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
