# SPDX-License-Identifier: Apache-2.0
"""custom_vjp of live objects: what the rules get, what they may return, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import AliasError, ArgumentError, AutodiffError, MissingRuleError, ShapeError

LIVE = dict(graph=True, graph_updates=True)
MODES = [LIVE, dict(graph=True, graph_updates=False), dict(graph=False, graph_updates=False)]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["live", "graph", "tree"])
copies = pytest.mark.parametrize("mode", MODES[1:], ids=["graph", "tree"])


class Wave(nnx.Module):
    """amplitude * sin(phase); counts its calls."""

    def __init__(self, phase=1.0, amplitude=2.0):
        self.phase = nnx.Param(jnp.array(phase))
        self.amplitude = nnx.Param(jnp.array(amplitude))
        self.calls = nnx.BatchStat(jnp.array(0.0))

    def __call__(self):
        self.calls[...] += 1
        return jnp.sin(self.phase[...]) * self.amplitude[...]


def ruled(f, fwd, bwd, mode, **options):
    wrapped = nnx.custom_vjp(f, **mode, **options)
    wrapped.defvjp(fwd, bwd)
    return wrapped


def wave(mode, scale=1.0):
    """`Wave.__call__` with its own derivative, times `scale`."""

    def bwd(residuals, g):
        cos, sin, m = residuals
        updates, g = g if mode == LIVE else ((m,), g)
        gradient = jax.tree.map(jnp.zeros_like, updates[0])
        gradient.phase[...] = scale * g * cos * m.amplitude[...]
        gradient.amplitude[...] = scale * g * sin
        return (gradient,)

    return ruled(lambda m: m(), lambda m: (m(), (jnp.cos(m.phase[...]), jnp.sin(m.phase[...]), m)), bwd, mode)


# ---------------------------------------------------------------- the rule is used
@every_mode
def test_a_right_rule_gives_the_right_gradient(mode):
    ours = nnx.grad(wave(mode), **mode)(Wave())
    expected = nnx.grad(lambda m: m(), **mode)(Wave())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)


@every_mode
def test_the_rule_decides(mode):
    once, thrice = nnx.grad(wave(mode), **mode)(Wave()), nnx.grad(wave(mode, 3.0), **mode)(Wave())
    np.testing.assert_allclose(thrice.phase[...], 3 * once.phase[...], rtol=1e-6)


@every_mode
def test_without_differentiation_the_function_itself_runs(mode):
    def refuse(*args):
        raise AssertionError

    m = Wave()
    f = ruled(lambda m: m(), refuse, refuse, mode)
    np.testing.assert_allclose(f(m), jnp.sin(1.0) * 2, rtol=1e-6)
    assert float(m.calls[...]) == 1.0


@every_mode
def test_updates_come_back_with_and_without_differentiation(mode):
    m, f = Wave(), wave(mode)
    calls = m.calls
    f(m)
    nnx.grad(f, **mode)(m)
    nnx.jit(f, **mode)(m)
    nnx.jit(nnx.grad(f, **mode), **mode)(m)
    nnx.grad(nnx.jit(f, **mode), **mode)(m)
    assert m.calls is calls and float(calls[...]) == 5.0


@every_mode
def test_residuals_may_hold_shared_objects(mode):
    def bwd(residuals, g):
        a, b = residuals
        assert a["m"] is b and a["n"] == "text"
        return (jax.tree.map(jnp.ones_like, g[0][0] if mode == LIVE else b),)

    f = ruled(lambda m: m.phase * 2, lambda m: (m.phase * 2, ({"m": m, "n": "text"}, m)), bwd, mode)
    assert float(nnx.grad(f, **mode)(Wave()).amplitude[...]) == 1.0


def test_live_objects_may_be_shared():
    def bwd(residuals, g):
        (first, second), out = g
        assert list(second) == []
        first = jax.tree.map(jnp.zeros_like, first)
        first.phase[...] = 7 * out
        return first, second

    f = ruled(lambda a, b: a.phase * b.amplitude, lambda a, b: (a.phase * b.amplitude, None), bwd, LIVE)
    assert float(nnx.grad(lambda m: f(m, m))(Wave()).phase[...]) == 7.0


def test_live_objects_may_grow():
    m = Wave()

    def grow(m):
        m.extra = nnx.BatchStat(jnp.array(3.0))
        return m.phase * 2

    f = ruled(grow, lambda m: (grow(m), None), lambda _, g: (jax.tree.map(jnp.ones_like, g[0][0]),), LIVE)
    nnx.grad(f)(m)
    assert float(m.extra[...]) == 3.0


def test_what_happens_to_a_live_variable_later_goes_through_the_rule():
    f = ruled(lambda m: m(), lambda m: (m(), None), lambda _, g: (g[0][0],), LIVE)
    assert float(nnx.grad(lambda m: f(m) + 5 * m.phase[...])(Wave()).phase[...]) == 5.0


@copies
def test_what_happens_to_another_variable_later_goes_around_the_rule(mode):
    f = ruled(lambda m: m(), lambda m: (m(), m), lambda m, g: (None,), mode)
    assert float(nnx.grad(lambda m: f(m) + 5 * m.phase[...], **mode)(Wave()).phase[...]) == 5.0


@copies
def test_cotangents_of_updates_on_demand(mode):
    seen = []

    def bwd(m, g, *, updates_g):
        seen.append(updates_g)
        return (m,)

    f = ruled(lambda m: m(), lambda m: (m(), m), bwd, mode)
    nnx.grad(lambda m: f(m) + 4 * m.calls[...], **mode)(Wave())
    ((updates,),) = seen
    assert type(updates) is Wave and updates.phase is None and float(updates.calls[...]) == 4.0


@every_mode
def test_none_is_a_zero(mode):
    f = ruled(lambda m, x: m.phase * x, lambda m, x: (m.phase * x, x), lambda x, g: (None, x), mode)
    gradient, by_x = nnx.grad(f, argnums=(0, 1), **mode)(Wave(), 3.0)
    assert float(gradient.phase[...]) == 0.0 and float(by_x) == 3.0


@every_mode
def test_static_arguments_come_first(mode):
    def bwd(name, count, residuals, g):
        assert (name, count) == ("sin", 3)
        return (residuals * count,)

    f = ruled(
        lambda name, x, count: getattr(jnp, name)(x) * count,
        lambda name, x, count: (x, x),
        bwd,
        mode,
        nondiff_argnums=(2, 0),
    )
    assert float(nnx.grad(f, argnums=1, **mode)("sin", 2.0, 3)) == 6.0
    assert float(jax.grad(lambda x: f("sin", count=3, x=x))(2.0)) == 6.0


def test_a_filter_says_what_is_differentiated():
    only_phase = nnx.DiffState(0, nnx.PathContains("phase"))

    def bwd(m, g):
        _, out = g
        return (nnx.State({"phase": nnx.Param(out * 9)}),)

    f = ruled(lambda m: m(), lambda m: (m(), m), bwd, LIVE, nondiff_argnums=(only_phase,))
    assert float(nnx.grad(f, argnums=only_phase)(Wave()).phase[...]) == 9.0
    assert float(nnx.grad(f)(Wave()).amplitude[...]) == 0.0
    assert float(nnx.jit(nnx.grad(f))(Wave()).phase[...]) == 9.0


@every_mode
def test_a_decorated_method(mode):
    class Model(Wave):
        @nnx.custom_vjp(**mode)
        def double(self, x):
            """2 x"""
            return self.phase * x * 2

        double.defvjp(lambda self, x: (self.phase * x * 2, None), lambda _, g: (None, jnp.array(5.0)))

    assert float(Model().double(3.0)) == 6.0 and Model.double.__doc__ == "2 x"
    assert float(jax.grad(lambda x: Model().double(x))(3.0)) == 5.0


@every_mode
def test_the_rule_is_differentiable(mode):
    f = wave(mode)
    slope = lambda m: nnx.grad(f, **mode)(m).phase[...]  # amplitude * cos(phase)
    second = nnx.grad(slope, **mode)(Wave())
    np.testing.assert_allclose(second.phase[...], -2 * jnp.sin(1.0), rtol=1e-6)


@every_mode
def test_under_vmap(mode):
    f = ruled(lambda m, x: m.phase * x, lambda m, x: (m.phase * x, x), lambda x, g: (None, x * 3), mode)
    by_x = nnx.vmap(nnx.grad(f, argnums=1, **mode), in_axes=(None, 0), **mode)(Wave(), jnp.arange(3.0))
    np.testing.assert_array_equal(by_x, jnp.arange(3.0) * 3)


def test_symbolic_zeros():
    seen = []

    def fwd(x, m):
        seen.append((x.perturbed, m.phase.get_raw_value().perturbed))
        return x.value * 2, None

    f = nnx.custom_vjp(lambda x, m: x * 2)
    f.defvjp(fwd, lambda _, g: (4.0, None), symbolic_zeros=True)
    m = Wave()
    assert float(nnx.grad(f)(3.0, m)) == 4.0 and seen == [(True, False)]
    assert float(m.phase[...]) == 1.0


# ---------------------------------------------------------------- wrong uses
def test_a_rule_is_needed():
    with pytest.raises(MissingRuleError, match="No VJP defined for custom_vjp function wave") as error:
        nnx.custom_vjp(wave)(Wave())
    assert isinstance(error.value, ValueError) and isinstance(error.value, AttributeError)


@every_mode
@pytest.mark.parametrize("result", [3.0, (), (1.0, 2.0)], ids=["no tuple", "none", "two"])
def test_one_cotangent_per_argument(mode, result):
    f = ruled(lambda x: x * 2, lambda x: (x * 2, None), lambda _, g: result, mode)
    with pytest.raises(AutodiffError, match="Custom VJP bwd rule must produce an output with the same container"):
        nnx.grad(f, **mode)(1.0)


@every_mode
@pytest.mark.parametrize(
    ("result", "words"),
    [
        (3.0, "Expected State or Variable, got float"),
        (nnx.State({"phase": jnp.array(1.0)}), "has no value at"),
        (nnx.State({"phase": jnp.array(1.0), "phrase": jnp.array(1.0)}), "has no value|nothing asked for"),
    ],
    ids=["a number", "incomplete", "misspelt"],
)
def test_a_cotangent_looks_like_its_argument(mode, result, words):
    f = ruled(lambda m: m(), lambda m: (m(), None), lambda _, g: (result,), mode)
    with pytest.raises(AutodiffError, match=words):
        nnx.grad(f, **mode)(Wave())


@every_mode
def test_a_cotangent_has_the_shape_of_its_argument(mode):
    f = ruled(lambda m: m(), lambda m: (m(), m), lambda m, g: (jax.tree.map(lambda x: jnp.ones(2), m),), mode)
    with pytest.raises(ShapeError, match=r"0/amplitude: got \(2,\), expected \(\)"):
        nnx.grad(f, **mode)(Wave())


def test_a_cotangent_for_what_is_not_differentiated():
    only_phase = nnx.DiffState(0, nnx.PathContains("phase"))
    f = ruled(lambda m: m(), lambda m: (m(), m), lambda m, g: g[0], LIVE, nondiff_argnums=(only_phase,))
    with pytest.raises(AutodiffError, match="a value for something that is not differentiated at amplitude"):
        nnx.grad(f, argnums=only_phase)(Wave())


@copies
def test_both_functions_change_the_same_variables(mode):
    f = ruled(lambda m: m(), lambda m: (m.phase * 1, m), lambda m, g: (m,), mode)
    with pytest.raises(AutodiffError, match=r"(?s)fwd must.*no Variable.*changes of 0/calls"):
        nnx.grad(nnx.jit(f, **mode), **mode)(Wave())


def test_objects_are_no_static_arguments():
    f = ruled(lambda m, x: x, lambda m, x: (x, None), lambda *a: (1.0,), LIVE, nondiff_argnums=(0,))
    with pytest.raises(AutodiffError, match="Passing integers to nondiff_argnums for graph nodes"):
        f([Wave()], 1.0)


@copies
def test_without_live_objects_nothing_is_shared(mode):
    f = ruled(lambda a, b: a(), lambda a, b: (a(), None), lambda *a: (None, None), mode)
    m = Wave()
    with pytest.raises(AliasError, match="Duplicate"):
        f(m, m)
    with pytest.raises(ArgumentError, match="`nondiff_argnums` cannot contain `DiffState`"):
        nnx.custom_vjp(wave, nondiff_argnums=(nnx.DiffState(0, nnx.Param),), **mode)


def test_one_object_under_two_filters():
    only_phase = nnx.DiffState(0, nnx.PathContains("phase"))
    f = ruled(lambda a, b: a(), lambda a, b: (a(), None), lambda *a: (None, None), LIVE, nondiff_argnums=(only_phase,))
    m = Wave()
    with pytest.raises(AliasError, match=r"(?s)Inconsistent aliasing.*0/amplitude.*1/amplitude"):
        f(m, m)


def test_bound_methods_are_refused():
    with pytest.raises(ArgumentError, match="does not support bound methods"):
        nnx.custom_vjp(Wave().__call__)
