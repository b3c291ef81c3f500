# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms of modules: names, sharing, state that goes in and comes back, programs, errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import batiste.linen as nn
from batiste.errors import (
    CallCompactUnboundModuleError,
    JaxTransformError,
    NameInUseError,
    TransformedMethodReturnValueError,
    TransformTargetError,
)
from batiste.graph.errors import ArgumentError, CallError
from batiste.linen.lifted import SeveralScopesError
from batiste.linen.transforms import _HashableProxy

KEY, X = jax.random.key(0), jnp.ones((2, 3))
SPLIT = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
LIFTS = {
    "remat": nn.remat,
    "jit": nn.jit,
    "fold_rngs": nn.fold_rngs,
    "map_variables": functools.partial(nn.map_variables, mutable=True),
}
every_lift = pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)


def model(body: Any) -> nn.Module:
    """A module whose compact call is `body(self, x)`."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(self, x)

    return Model()


def names(module: nn.Module) -> list[str]:
    return sorted(module.init(KEY, X)["params"])


class User(nn.Module):
    table: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.table(x))


# ---------------------------------------------------------------- names


@every_lift
def test_a_function_counts_names_as_if_it_was_called_as_it_is(lift):
    def body(self, x):
        return nn.Dense(3)(nn.Dense(3)(x))

    def whole(lift):
        return model(lambda self, x: nn.Dense(3)(lift(body)(self, lift(body)(self, nn.Dense(3)(x)))))

    assert names(whole(lift)) == names(whole(lambda f: f))


def test_a_jitted_function_of_many_modules_counts_names_also_without_a_trace():
    jitted = nn.jit(lambda self, x: nn.Dense(3)(x))
    module = model(lambda self, x: nn.Dense(2)(jitted(self, x)))
    variables = module.init(KEY, X)
    for _ in range(3):
        assert module.apply(variables, X).shape == (2, 2)


def test_names_made_inside_are_free_outside_only_by_another_number():
    module = model(lambda self, x: nn.Dense(3)(nn.vmap(lambda self, x: nn.Dense(3)(x), **SPLIT)(self, x)))
    with pytest.raises(ValueError):  # the variables of `self` are mapped: those outside would not be
        module.apply(module.init(KEY, X), jnp.ones((4, 3)))
    assert names(module) == ["Dense_0", "Dense_1"]


def test_the_class_has_the_fields_and_the_text_of_the_target():
    lifted = nn.vmap(nn.Dense, **SPLIT)
    assert (lifted.__name__, lifted.__doc__) == ("VmapDense", nn.Dense.__doc__)
    assert lifted(4, use_bias=False).features == 4
    assert repr(lifted(4)).startswith("VmapDense(")


def test_a_class_with_some_arguments_given_stays_one():
    lifted = nn.vmap(functools.partial(nn.Dense, features=4), **SPLIT)
    assert jax.tree.map(jnp.shape, lifted().init(KEY, X))["params"]["kernel"] == (2, 3, 4)
    assert lifted(features=5).features == 5


def test_compact_name_scope_is_entered_once():
    class Model(nn.Module):
        @nn.remat
        @nn.compact_name_scope
        def up(self, x):
            return nn.Dense(3)(x)

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(self.up(x))

    params = Model().init(KEY, X)["params"]
    assert {name: sorted(tree) for name, tree in params.items()} == {
        "up": ["Dense_0"],
        "Dense_0": ["bias", "kernel"],
    }


def test_names_of_fields_are_taken_inside():
    class Clash(nn.Module):
        table: Any

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="table")(x)

    with pytest.raises(NameInUseError, match="table"):
        nn.remat(Clash)(nn.Dense(3)).init(KEY, X)


# ---------------------------------------------------------------- what goes through


@every_lift
def test_a_module_that_is_shared_stays_one(lift):
    lifted = lift(User)

    def body(self, x):
        table = nn.Dense(3, name="table")
        return lifted(table, name="a")(lifted(table, name="b")(x)) + table(x)

    assert names(model(body)) == ["a", "b", "table"]


@pytest.mark.parametrize("name", ["remat", "jit", "fold_rngs"])
def test_variables_may_be_arguments_and_fields(name):
    class Counter(nn.Module):
        seen: Any

        def __call__(self, x):
            self.seen["count"].value += 1
            return x

    def add(self, count, x):
        count.value += x.sum()
        return x

    def body(self, x):
        count = self.variable("state", "count", jnp.zeros, ())
        lift = getattr(nn, name)
        lift(Counter)({"count": count})(lift(add)(self, count, x))
        return count.value

    y, variables = model(body).init_with_output(KEY, X)
    assert y == variables["state"]["count"] == 7


def test_setup_runs_inside_and_not_outside():
    class Model(nn.Module):
        def setup(self):
            self.scale = self.param("scale", nn.initializers.normal(), (3,))

        def __call__(self, x):
            return x * self.scale

    assert nn.vmap(Model, **SPLIT)().init(KEY, X)["params"]["scale"].shape == (2, 3)


def test_intermediates_are_captured_once():
    class Model(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(3)(x)

    variables = Model().init(KEY, X)
    _, state = Model().apply(variables, X, capture_intermediates=True)
    assert jax.tree.map(jnp.shape, state["intermediates"]) == {
        "__call__": ((2, 3),),
        "CheckpointDense_0": {"__call__": ((2, 3),)},
    }


def test_bound_methods_are_functions_of_their_module():
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)

        def plus(self, x):
            return self.dense(x)

        def minus(self, x):
            return -self.dense(x)

        def __call__(self, x):
            return nn.cond(x.sum() > 0, self.plus, self.minus, self, x)

    y, variables = Model().init_with_output(KEY, X)
    assert jnp.allclose(y, -Model().apply(variables, X, method="minus"))


def test_boxes_learn_of_the_axis_outside():
    dense = nn.add_metadata_axis(nn.Dense, {"params": 0})
    assert dense.__name__ == "Map_variablesDense"
    assert dense(3).init(KEY, X)["params"]["kernel"].shape == (3, 3)
    assert nn.add_metadata_axis(nn.Dense, {"params": None}) is nn.Dense


def test_named_call_is_the_method_with_a_name():
    class Model(nn.Module):
        @nn.named_call
        def __call__(self, x):
            return x + 1

    assert (Model().apply({}, X) == 2).all()


# ---------------------------------------------------------------- programs


def test_equal_modules_share_a_program_and_other_settings_do_not():
    traces = []

    class Layer(nn.Module):
        width: int
        act: Any = jnp.sin

        @nn.jit
        @nn.compact
        def __call__(self, x):
            traces.append(self.width)
            return self.act(nn.Dense(self.width)(x))

    module = model(lambda self, x: [Layer(3)(x), Layer(3)(x), Layer(4)(x), Layer(4, act=jnp.cos)(x)])
    variables = module.init(KEY, X)
    assert traces == [3, 4, 4]
    traces.clear()
    for _ in range(2):
        module.apply(variables, X)
    assert traces == [3, 4, 4]


def test_a_proxy_tells_types_settings_and_sharing_apart():
    one, same, other = nn.Dense(3), nn.Dense(3), nn.Dense(4)
    of = _HashableProxy.from_module
    assert of(one) == of(same) and hash(of(one)) == hash(of(same))
    assert of(one) != of(other) != of(nn.LayerNorm())
    assert of(User(one)) == of(User(same)) != of(User(other))
    assert of(User((one, one))) != of(User((one, same)))
    mask = jnp.ones(3)  # it has no hash
    assert of(User(mask)) == of(User(mask)) != of(User(jnp.ones(3)))
    assert of(User({"a": 1})) != of(User({"a": True}))
    assert eval(repr(of(User(1)).key[0][1])) == (True, False, 0, ())


def test_static_arguments_are_counted_with_the_module():
    class Layer(nn.Module):
        @functools.partial(nn.jit, static_argnums=(2,), static_argnames="scale")
        def __call__(self, x, negative, scale=1):
            return -x if negative else x * (2 if scale == 2 else 1)

    assert (Layer().apply({}, X, True) == -1).all()
    assert (Layer().apply({}, X, False, scale=2) == 2).all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("target", [nn.Dense(3), 3])
@pytest.mark.parametrize("name", ["vmap", "scan", "jit"])
def test_a_wrong_target_is_refused(name, target):
    with pytest.raises(TransformTargetError, match="pass the class"):
        getattr(nn, name)(target)


def test_a_function_needs_a_module_first():
    with pytest.raises(CallError, match=r"first argument.*got int"):
        nn.remat(lambda self, x: x)(3, X)
    with pytest.raises(CallError, match=r"first argument.*got Array"):
        nn.grad(lambda self, x: x, X, X)


def test_unbound_modules_have_nothing_to_lift():
    with pytest.raises(CallCompactUnboundModuleError):
        nn.remat(nn.Dense)(3)(X)
    with pytest.raises(ArgumentError, match="needs a module with variables"):
        nn.cond(True, lambda self, x: x, lambda self, x: x, nn.Dense(3), X)


def test_modules_and_variables_cannot_be_returned():
    for make in (lambda self, x: nn.Dense(3), lambda self, x: [self.variable("state", "a", jnp.zeros, ())]):
        with pytest.raises(TransformedMethodReturnValueError, match="cannot return Modules or Variables"):
            model(lambda self, x, make=make: nn.remat(make)(self, x)).init(KEY, X)


def test_a_module_that_is_closed_over_is_told_from_one_that_is_passed():
    def body(self, x):
        dense = nn.Dense(3)
        return nn.jit(lambda self, x: dense(x))(self, x)

    with pytest.raises(JaxTransformError):
        model(body).init(KEY, X)


def test_arguments_that_cannot_be_static_are_named():
    class Layer(nn.Module):
        @functools.partial(nn.jit, static_argnums=(2,))
        def __call__(self, x, sizes):
            return x

    with pytest.raises(ValueError, match="hash"):
        Layer().apply({}, X, [1, 2])


def test_transforms_of_one_scope_say_so():
    def body(self, x):
        user = User(nn.Dense(3))
        return nn.vjp(lambda user, x: user(x), user, x)[0]

    with pytest.raises(SeveralScopesError, match="multi_scope=True"):
        model(body).init(KEY, X)


def test_methods_are_named_in_a_list_or_a_dict():
    with pytest.raises(ArgumentError, match="None, tuple, list, or dict"):
        nn.vmap(nn.Dense, methods="__call__")
    with pytest.raises(AttributeError, match="missing"):
        nn.vmap(nn.Dense, methods=["missing"])


def test_arguments_by_name_have_no_axis():
    class Layer(nn.Module):
        def __call__(self, x, scale=1.0):
            return x * scale

    with pytest.warns(RuntimeWarning, match="kwargs are not supported in vmap, so scale"):
        y = nn.vmap(Layer, variable_axes={}, split_rngs={})().apply({}, X, scale=2.0)
    assert (y == 1).all()
