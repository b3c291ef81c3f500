# SPDX-License-Identifier: Apache-2.0
"""Modules of the functional face: naming, sharing, binding, collections, streams, and the errors of wrong use."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.linen as nn
from batiste import errors, struct
from batiste.configurations import config
from batiste.core import FrozenDict, freeze

KEY, X = jax.random.key(0), jnp.ones((2, 3))
ones = nn.initializers.ones


class MLP(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x)))


class Called(nn.Module):
    inner: Any

    def __call__(self, x):
        return self.inner(x)

    def twice(self, x):
        return 2 * self.inner(x)


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("stats", "count", lambda: 0)
        count.value += 1
        return count.value


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def paths(variables: Any) -> set[str]:
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}


# ---------------------------------------------------------------- settings
def test_a_module_is_a_dataclass_with_equality_hash_and_repr():
    assert MLP(3) == MLP(3) != MLP(4)
    assert hash(MLP(3)) == hash(MLP(3))
    assert repr(MLP(3)) == "MLP(\n    # attributes\n    width = 3\n)"
    assert MLP(3).clone(width=5).width == 5


def test_a_subclass_adds_fields():
    class Deep(MLP):
        depth: int = 2

    assert (Deep(8, 3).width, Deep(8, 3).depth, Deep(name="x").name) == (8, 3, "x")
    assert paths(Deep(8).init(KEY, X)) == paths(MLP(8).init(KEY, X))


def test_a_bound_module_has_no_hash():
    with pytest.raises(TypeError, match="hold variables"):
        hash(MLP().bind({}))


# ---------------------------------------------------------------- names
def test_submodules_in_containers_are_named_after_them():
    class Model(nn.Module):
        layers: Any

        def setup(self):
            self.more = {"a": nn.Dense(1), "b": [nn.Dense(1)]}

        def __call__(self, x):
            assert isinstance(self.layers, tuple) and isinstance(self.more, FrozenDict)
            return self.layers[0](x) + self.layers[1](x) + self.more["a"](x) + self.more["b"][0](x)

    names = ("layers_0", "layers_1", "more_a", "more_b_0")
    expected = {f"{layer}/{part}" for layer in names for part in ("kernel", "bias")}
    assert paths(Model([nn.Dense(1), nn.Dense(1)]).init(KEY, X)) == expected


def test_one_instance_is_one_set_of_variables():
    one = nn.Dense(3)

    class Both(nn.Module):
        left: Any
        right: Any

        def __call__(self, x):
            return self.left(x) + self.right(x)

    assert paths(Both(Called(one), Called(one)).init(KEY, X)) == {"left/inner/kernel", "left/inner/bias"}


def test_a_module_may_be_called_again():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            mlp = MLP(width=3)
            return mlp(x) + mlp(x)

    assert paths(Twice().init(KEY, X)) == {f"MLP_0/Dense_{i}/{part}" for i in (0, 1) for part in ("kernel", "bias")}


def test_modules_may_share_a_scope():
    class Outer(nn.Module):
        def setup(self):
            self.inner = MLP()
            nn.share_scope(self, self.inner)

        def __call__(self, x):
            return self.inner(x)

    variables = Outer().init(KEY, X)
    assert paths(variables) == paths(MLP().init(KEY, X))
    np.testing.assert_array_equal(Outer().apply(variables, X), MLP().apply(variables, X))


def test_a_module_takes_the_scope_of_a_sibling_that_it_shares_with():
    class Sharing(nn.Module):
        inner: Any

        def setup(self):
            nn.share_scope(self, self.inner)

        def __call__(self, x):
            return self.inner(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Sharing(nn.Dense(2, name="a"))(x) + Sharing(nn.Dense(2))(x)

    assert set(Outer().init(KEY, X)["params"]) == {"a", "Dense_0"}


@pytest.mark.parametrize(("keeps", "name"), [(True, "own"), (False, "inner")])
def test_an_adopted_module_may_keep_its_name(keeps, name):
    class Keeping(Called):
        preserve_adopted_names = keeps

    assert set(Keeping(nn.Dense(2, name="own")).init(KEY, X)["params"]) == {name}
    with config.temp_flip_flag("preserve_adopted_names", keeps):
        assert set(Called(nn.Dense(2, name="own")).init(KEY, X)["params"]) == {name}


def test_modules_in_a_struct_dataclass_are_named_after_its_fields():
    @struct.dataclass
    class Pair:
        a: Any
        b: Any

    class Model(nn.Module):
        pair: Pair

        def __call__(self, x):
            return self.pair.a(x) + self.pair.b[0](x)

    one = nn.Dense(2)
    assert set(Model(Pair(one, [nn.Dense(2)])).init(KEY, X)["params"]) == {"pair_a", "pair_b_0"}
    assert set(Model(Pair(one, [one])).init(KEY, X)["params"]) == {"pair_a"}


def test_a_submodule_may_be_named_as_the_method():
    model = Called(nn.Dense(2))
    variables = model.init(KEY, X)
    np.testing.assert_array_equal(model.apply(variables, X, method="inner"), model.apply(variables, X))


def test_modules_are_freed_when_the_call_is_over():
    seen = []

    def note(call, args, kwargs, context):
        seen.append(weakref.ref(context.module))
        return call(*args, **kwargs)

    gc.collect()
    gc.disable()
    try:
        with nn.intercept_methods(note):
            Called(MLP()).init(KEY, X)
        assert len(seen) == 4 and all(module() is None for module in seen)
    finally:
        gc.enable()


def test_a_method_may_have_a_name_scope_of_its_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x) + self.helper(x) + self.helper(x)

        @nn.compact_name_scope
        def helper(self, x):
            return nn.Dense(2, use_bias=False)(x)

    assert paths(Model().init(KEY, X)) == {"Dense_0/kernel", "Dense_0/bias", "helper/Dense_0/kernel"}


# ---------------------------------------------------------------- variables
def test_apply_returns_only_what_may_change():
    variables = Counter().init(KEY, X)
    assert variables == {"stats": {"count": 1}}
    assert Counter().apply(variables, X, mutable=["stats"]) == (2, {"stats": {"count": 2}})
    assert variables == {"stats": {"count": 1}}
    with pytest.raises(errors.ModifyScopeVariableError, match=r'"count" in "/".*"stats" is immutable'):
        Counter().apply(variables, X)


def test_variables_may_be_frozen():
    variables = MLP().init(KEY, X)
    np.testing.assert_array_equal(MLP().apply(freeze(variables), X), MLP().apply(variables, X))


def test_variables_come_out_frozen_where_the_flag_says_so():
    with config.temp_flip_flag("return_frozendict", True):
        variables = MLP().init(KEY, X)
        assert isinstance(variables, FrozenDict)
        assert isinstance(MLP().apply(variables, X, mutable=["params"])[1], FrozenDict)


def test_a_variable_may_be_a_tree():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            pair = self.param("pair", lambda key: {"a": jnp.ones(3), "b": {"c": jnp.zeros(1)}})
            return x + pair["a"][None]

    variables = Model().init(KEY, X)
    assert shapes(variables) == {"params": {"pair": {"a": (3,), "b": {"c": (1,)}}}}
    np.testing.assert_array_equal(Model().apply(variables, X), X + 1)


def test_bind_and_unbind():
    model = Called(nn.Dense(2))
    variables = model.init(KEY, X)
    bound = model.bind(variables)
    np.testing.assert_array_equal(bound.inner(X), model.apply(variables, X))
    np.testing.assert_array_equal(bound.twice(X), model.apply(variables, X, method="twice"))
    inner, inner_variables = bound.inner.unbind()
    np.testing.assert_array_equal(inner.apply(inner_variables, X), bound(X))
    assert shapes(inner_variables) == {"params": {"kernel": (3, 2), "bias": (2,)}}


def test_lazy_init_needs_only_shapes():
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    lazily, fully = MLP().lazy_init(KEY, x), MLP().init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, lazily, fully)

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param("mean", lambda key: x.mean())

    with pytest.raises(errors.LazyInitError, match=r"float32\[2,3\]"):
        Wrong().lazy_init(KEY, x)


def test_sown_and_captured_values():
    model = nn.Sequential([nn.Dense(1), nn.relu])
    y, state = model.apply(model.init(KEY, X), X, capture_intermediates=True)
    np.testing.assert_array_equal(state["intermediates"]["__call__"][0], y)
    assert shapes(state) == {"intermediates": {"__call__": ((2, 1),), "layers_0": {"__call__": ((2, 1),)}}}


def test_a_perturbation_has_the_gradient_of_what_it_is_added_to():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (self.perturb("x", 3 * x) ** 2).sum()

    variables = Model().init(KEY, X)
    np.testing.assert_allclose(jax.grad(Model().apply)(variables, X)["perturbations"]["x"], 6 * X)
    assert Model().apply({}, X) == Model().apply(variables, X)
    for given in ({}, {"y": 1.0}):
        with pytest.raises(ValueError, match="missing perturbation variable x"):
            Model().apply({"perturbations": given}, X)


def test_module_paths():
    assert {path: type(module).__name__ for path, module in MLP().module_paths(KEY, X).items()} == {
        "": "MLP",
        "Dense_0": "Dense",
        "Dense_1": "Dense",
    }


# ---------------------------------------------------------------- around calls
def test_interceptors_surround_every_call_the_first_outermost():
    seen = []

    def note(number):
        def interceptor(call, args, kwargs, context):
            seen.append((number, type(context.module).__name__, context.method_name))
            return call(*args, **kwargs)

        return nn.intercept_methods(interceptor)

    with note(1), note(2):
        MLP().init(KEY, X)
    assert seen[:4] == [
        (1, "MLP", "__call__"),
        (2, "MLP", "__call__"),
        (1, "Dense", "__call__"),
        (2, "Dense", "__call__"),
    ]


def test_batch_apply_merges_leading_dims_and_leaves_smaller_arguments():
    y = nn.BatchApply(lambda x, b: x + b)(jnp.ones((2, 3, 4)), 1.0)
    np.testing.assert_array_equal(y, 2 * jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="at least one input"):
        nn.BatchApply(jnp.sum)(1.0)


# ---------------------------------------------------------------- wrong use
class Unnamed(nn.Module):
    def __call__(self, x):
        return nn.Dense(2)(x)


class SameName(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.param("a", ones, ())
        return nn.Dense(2, name="a")(x)


class SetsField(nn.Module):
    width: int = 1

    def setup(self):
        self.width = 2

    def __call__(self, x):
        return x


class SetsLate(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.seen = x
        return x


class NoSuper(nn.Module):
    def __post_init__(self):
        pass

    def __call__(self, x):
        return x


class JitOverScope(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.jit(lambda x: nn.Dense(2)(x))(x)


WRONG = [
    (lambda: nn.Dense(2)(X), errors.CallCompactUnboundModuleError, "unbound"),
    (lambda: nn.Dense(2).variables, ValueError, "Can't access variables on unbound modules"),
    (lambda: nn.Dense(2).unbind(), errors.CallUnbindOnUnboundModuleError, "unbind"),
    (lambda: nn.Dense.init(KEY, X), errors.InvalidInstanceModuleError, "instance"),
    (lambda: nn.Dense(2).init(0, X), errors.InvalidRngError, "Module Dense"),
    (lambda: nn.Dense(2).init({"params": 0}, X), ValueError, "First argument.*``jax.PRNGKey``"),
    (lambda: nn.Dense(2).apply({}, X, rngs={"dropout": 0}), ValueError, "``rngs`` argument.*``jax.PRNGKey``"),
    (lambda: nn.Dense(2).init(jax.random.split(KEY), X), errors.InvalidRngError, "Module Dense"),
    (lambda: nn.Dense(2).init({"dropout": KEY}, X), errors.InvalidRngError, 'needs PRNG for "params"'),
    (lambda: nn.Dropout(0.5, deterministic=False).apply({}, X), errors.InvalidRngError, 'needs PRNG for "dropout"'),
    (lambda: nn.Dense(2).init(KEY, X, method="fly"), AttributeError, 'has no attribute "fly"'),
    (lambda: nn.Dense(2).init(KEY, X, method=3), errors.ApplyModuleInvalidMethodError, "3"),
    (lambda: nn.Dense(2).apply({}, X), errors.ScopeCollectionNotFound, '"kernel" from collection "params"'),
    (lambda: nn.Dense(2).apply({"params": {"bias": X}}, X), errors.ScopeParamNotFoundError, '"kernel" in scope "/"'),
    (lambda: nn.Dense(2).apply({"params": {"params": {}}}, X),
     errors.ApplyScopeInvalidVariablesStructureError, "params"),
    (lambda: nn.Dense(2).apply({"params": X}, X), errors.ApplyScopeInvalidVariablesTypeError, "dictionary"),
    (lambda: nn.Dense(2).apply({"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, X),
     errors.ScopeParamShapeError, r"\(3, 2\).*\(2, 2\)"),
    (lambda: nn.Dense(2).apply({}, X, mutable=3), errors.InvalidFilterError, "3"),
    (lambda: Unnamed().init(KEY, X), errors.AssignSubModuleError, "Dense"),
    (lambda: SameName().init(KEY, X), errors.NameInUseError, 'submodule "a" in Module SameName'),
    (lambda: SetsField().init(KEY, X), errors.SetAttributeInModuleSetupError, "frozen"),
    (lambda: SetsLate().init(KEY, X), errors.SetAttributeFrozenModuleError, "SetsLate"),
    (lambda: NoSuper().init(KEY, X), errors.IncorrectPostInitOverrideError, "super"),
    (lambda: JitOverScope().init(KEY, X), errors.JaxTransformError, "transforms"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_use_raises_the_class_that_names_it(number):
    use, error, text = WRONG[number]
    with pytest.raises(error, match=text):
        use()


def test_a_reserved_field_is_refused():
    with pytest.raises(errors.ReservedModuleAttributeError, match="name"):

        class Named(nn.Module):
            name: int


def test_a_class_of_a_module_that_was_never_entered():
    """As programs have it that load their plugins by hand."""
    names = {"__name__": "nowhere", "nn": nn}
    source = compile("class Plugin(nn.Module):\n    size: int = 3", "plugin.py", "exec", dont_inherit=True)
    exec(source, names)
    assert names["Plugin"](4).size == 4
