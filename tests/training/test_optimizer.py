# SPDX-License-Identifier: Apache-2.0
"""Optimizers over live objects: forms of gradients, optax transformations, jit, and gradients that do not fit."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.graph.errors import StructureError
from batiste.training.optimizer import ModelAndOptimizer, OptArray, Optimizer, OptState, OptVariable, TrainState

X, Y = jnp.ones((4, 2)), jnp.arange(12.0).reshape(4, 3) / 10


class Model(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.array(0.0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.linear(x)


def loss_fn(model):
    return jnp.mean((model(X) - Y) ** 2)


def made(tx, **options):
    model = Model()
    return model, Optimizer(model, tx, wrt=nnx.Param, **options)


def ones(model):
    return jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))


def test_the_state_is_made_of_variables_with_the_metadata_of_the_parameters():
    model = nnx.Dict(a=nnx.Param(jnp.ones(3), note="x"), b=nnx.BatchStat(jnp.ones(2)))
    optimizer = Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    assert list(vars(optimizer)) == ["graph", "step", "tx", "opt_state", "wrt"]
    adam = optimizer.opt_state[0]
    assert type(adam.count) is OptArray
    assert type(adam.mu["a"]) is OptVariable
    assert adam.mu["a"].note == "x"
    assert "b" not in adam.mu
    assert type(optimizer.step) is OptState
    assert optimizer.step.dtype == jnp.uint32
    paths = nnx.to_flat_state(nnx.state(optimizer)).paths
    assert paths == (("opt_state", 0, "count"), ("opt_state", 0, "mu", "a"), ("opt_state", 0, "nu", "a"), ("step",))


TRANSFORMATIONS = {
    "sgd": optax.sgd(0.1),
    "adamw with a schedule and a mask": optax.adamw(
        optax.cosine_decay_schedule(0.1, 10), mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "injected hyperparameters": optax.inject_hyperparams(optax.adam)(0.1),
    "several steps": optax.MultiSteps(optax.adam(0.1), 2),
    "by label": optax.multi_transform(
        {"w": optax.adam(0.1), "b": optax.sgd(0.1)},
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "w" if "kernel" in str(path) else "b", params),
    ),
    "schedule free": optax.contrib.schedule_free_sgd(0.1),
    "without line search": optax.lbfgs(0.1, linesearch=None),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_any_transformation_gives_what_optax_gives_alone(name):
    tx = TRANSFORMATIONS[name]
    model, optimizer = made(tx)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)

    def loss_of(params):
        return jnp.mean((X @ params["linear"]["kernel"] + params["linear"]["bias"][None] - Y) ** 2)

    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss_fn)(model)))
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        params = optax.apply_updates(params, updates)
        step(model, optimizer)
    for got, expected in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(params)):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert optimizer.step[...] == 3


def test_a_transformation_needs_no_more_than_init_and_update():
    class Shrink:
        def init(self, params):
            return {"seen": 0}

        def update(self, grads, state, params):
            return jax.tree.map(lambda p: -p / 2, params), {"seen": state["seen"] + 1}

    model, optimizer = made(Shrink())
    before = model.linear.kernel[...]
    optimizer.update(model, ones(model))
    np.testing.assert_array_equal(model.linear.kernel, before / 2)
    assert optimizer.opt_state["seen"].get_value() == 1


FORMS = {
    "state of variables": lambda model: ones(model),
    "state of arrays": lambda model: nnx.as_pure(ones(model)),
    "nested dict": lambda model: nnx.to_pure_dict(ones(model)),
    "flat state merged": lambda model: nnx.from_flat_state(nnx.to_flat_state(ones(model))),
    "module": lambda model: jax.tree.map(jnp.ones_like, model),
    "state with more kinds": lambda model: jax.tree.map(jnp.ones_like, nnx.state(model)),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_come_in_several_forms(form):
    model, optimizer = made(optax.sgd(1.0))
    before = model.linear.kernel[...]
    updates = optimizer.update(model, FORMS[form](model))
    np.testing.assert_array_equal(model.linear.kernel, before - 1)
    assert model.calls[...] == 0
    assert jax.tree.structure(updates) == jax.tree.structure(nnx.as_pure(ones(model)))


@pytest.mark.parametrize(("graph", "updates"), [(True, True), (True, False), (False, False)])
def test_every_mode_trains(graph, updates):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(updates):
        model, optimizer = made(optax.adam(0.1))

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(loss_fn)(model)
            optimizer.update(model, grads)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    assert model.calls[...] == 20


@pytest.mark.parametrize("backing", [{}, {"ref": True}, {"hijax": True}])
def test_every_backing_of_parameters_trains(backing):
    model = nnx.Dict(p=nnx.Param(jnp.ones(3), **backing))
    optimizer = Optimizer(model, optax.sgd(1.0, momentum=0.9), wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, {"p": jnp.ones(3)}))
    for _ in range(2):
        step(model, optimizer)
    np.testing.assert_allclose(model["p"][...], jnp.full(3, -1.9), rtol=1e-6)
    np.testing.assert_allclose(optimizer.opt_state[0].trace["p"][...], jnp.full(3, 1.9), rtol=1e-6)


def test_a_plain_jax_transform_takes_and_returns_model_and_optimizer():
    model, optimizer = made(optax.sgd(1.0))

    @jax.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)
        return model, optimizer

    new_model, new_optimizer = step(model, optimizer, ones(model))
    np.testing.assert_array_equal(new_model.linear.bias, model.linear.bias - 1)
    assert (new_optimizer.step[...], optimizer.step[...]) == (1, 0)


def test_parameters_keep_their_dtype_and_the_state_its_structure():
    model = nnx.Linear(2, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = jax.tree.structure(optimizer)
    optimizer.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), ones(model)))
    assert model.kernel.dtype == jnp.bfloat16
    assert jax.tree.structure(optimizer) == before


def test_a_filter_of_paths_trains_only_these():
    model = Model()
    optimizer = Optimizer(model, optax.sgd(1.0), wrt=nnx.All(nnx.Param, nnx.PathContains("bias")))
    kernel, bias = model.linear.kernel[...], model.linear.bias[...]
    optimizer.update(model, ones(model))
    np.testing.assert_array_equal(model.linear.kernel, kernel)
    np.testing.assert_array_equal(model.linear.bias, bias - 1)
    hash(Optimizer(model, optax.sgd(1.0), wrt=[nnx.Param, "tag"]).wrt)


def test_a_shared_parameter_is_updated_once():
    shared = nnx.Param(jnp.ones(2))
    model = nnx.Dict(a=shared, b=shared)
    optimizer = Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: (m["a"] + m["b"]).sum())(model))
    np.testing.assert_array_equal(shared, -jnp.ones(2))


@pytest.mark.parametrize("graph", [True, False])
def test_extra_arguments_reach_a_line_search(graph):
    model, optimizer = made(optax.lbfgs())
    graphdef, rest = nnx.split(model, nnx.Param, ...)[::2]

    def value_fn(params):
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True))

    first = loss_fn(nnx.clone(model))
    for _ in range(3):
        value, grads = nnx.value_and_grad(loss_fn, graph=graph, graph_updates=graph)(model)
        optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)
    assert loss_fn(model) < first / 10


def test_the_deprecated_pair_of_model_and_optimizer():
    model = Model()
    both = ModelAndOptimizer(model, optax.sgd(1.0))
    assert list(vars(both)) == ["graph", "step", "tx", "opt_state", "wrt", "model"]
    before = model.linear.bias[...]
    both.update(ones(model))
    np.testing.assert_array_equal(both.model.linear.bias, before - 1)


def test_signatures_are_public():
    assert str(inspect.signature(Optimizer.__init__)).startswith("(self, model: 'M', tx: 'Any', *, wrt: 'Any', graph:")
    assert list(inspect.signature(Optimizer.update).parameters) == ["self", "model", "grads", "kwargs"]
    assert list(inspect.signature(ModelAndOptimizer.update).parameters) == ["self", "grads", "kwargs"]


WRONG = [
    (lambda m: nnx.State({}), r"linear/bias is missing; linear/kernel is missing: got State"),
    (lambda m: nnx.State({**ones(m), "x": nnx.Param(1.0)}), r"x is unknown"),
    (lambda m: jax.tree.map(lambda x: x[None], ones(m)), r"linear/bias has shape \(1, 3\), expected \(3,\)"),
    (lambda m: jax.tree.map(lambda x: x[:1], ones(m)), r"linear/kernel has shape \(1, 3\), expected \(2, 3\)"),
    (
        lambda m: jax.tree.map(lambda v: nnx.BatchStat(v[...]), ones(m), is_leaf=lambda x: isinstance(x, nnx.Variable)),
        r"linear/bias is a BatchStat, which the filter does not match.*got State of BatchStat",
    ),
    (lambda m: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), r"linear/bias is missing.*bias is unknown.*got Linear of Param"),
    (lambda m: None, r"linear/bias is missing.*got NoneType"),
]


@pytest.mark.parametrize(("grads", "words"), WRONG)
def test_gradients_that_do_not_fit_change_nothing_and_are_named(grads, words):
    model, optimizer = made(optax.adam(0.1))
    before = jax.tree.leaves((model, optimizer))
    with pytest.raises(StructureError, match=rf"(?s)Gradients and parameters do not fit.*{words}.*Fix: differentiate"):
        optimizer.update(model, grads(model))
    for a, b in zip(before, jax.tree.leaves((model, optimizer))):
        np.testing.assert_array_equal(a, b)


def test_a_filter_that_matches_nothing_is_named():
    model = Model()
    optimizer = Optimizer(model, optax.sgd(0.1), wrt=nnx.Cache)
    assert optimizer.update(model, nnx.State({})) == nnx.State({})
    with pytest.raises(StructureError, match=r"the filter OfType\(.*Cache.*\) matches no Variable"):
        optimizer.update(model, ones(model))


def test_missing_arguments_are_named():
    model, optimizer = made(optax.sgd(0.1))
    with pytest.raises(TypeError, match="Missing required argument `wrt`"):
        Optimizer(model, optax.sgd(0.1))
    with pytest.raises(TypeError, match="Missing required argument `grads`"):
        optimizer.update(ones(model))


def test_a_long_list_of_misfits_is_cut():
    model = nnx.List([nnx.Param(jnp.ones(1)) for _ in range(20)])
    with pytest.raises(StructureError, match="7 is missing; and 12 more"):
        Optimizer(model, optax.sgd(0.1), wrt=nnx.Param).update(model, nnx.State({}))


# ---------------------------------------------------------------- TrainState


def test_train_state_is_a_pytree_that_steps():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    state = TrainState.create(graphdef, params=params, tx=optax.sgd(1.0, momentum=0.9))
    next_state = jax.jit(lambda s: s.apply_gradients(jax.tree.map(jnp.ones_like, s.params)))(state)
    assert next_state.step == 1
    np.testing.assert_array_equal(next_state.params["bias"], -jnp.ones(3))
    np.testing.assert_array_equal(next_state.opt_state[0].trace["bias"], jnp.ones(3))
    np.testing.assert_array_equal(state.params["bias"], jnp.zeros(3))


def test_train_state_takes_more_fields():
    class Mine(TrainState):
        stats: nnx.State

    graphdef, params, stats = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    state = Mine.create(graphdef, params=params, tx=optax.sgd(1.0), stats=stats)
    new_stats = jax.tree.map(lambda x: x + 1, stats)
    next_state = state.apply_gradients(state.params, stats=new_stats)
    np.testing.assert_array_equal(next_state.stats["mean"], jnp.ones(3))
    assert len(jax.tree.leaves(state)) == 2 + 2 + 1


def test_train_state_calls_the_model_with_states_by_name_or_value():
    class Mine(TrainState):
        rest: nnx.State

    graphdef, params, rest = nnx.split(Model(), nnx.Param, ...)
    state = Mine.create(graphdef, params=params, tx=optax.sgd(1.0), rest=rest)
    expected = X @ params["linear"]["kernel"][...] + params["linear"]["bias"][None]
    for chosen in (("params", "rest"), ("params", nnx.clone(rest))):
        out, (_, after) = state.apply(*chosen)(X)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        assert after["calls"][...] >= 1
    with pytest.raises(AttributeError, match="nope"):
        state.apply("nope")
