# SPDX-License-Identifier: Apache-2.0
"""Training with either library: the same numbers in models, optimizers, averages and metrics, the same tables."""

from __future__ import annotations

import re
from types import SimpleNamespace

import flax.errors
import flax.nnx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import configurations as flags

import batiste.configurations
import batiste.errors
import batiste.struct
from batiste import nnx
from tests.parity.case import integers, normal

LIBRARIES = (nnx, flax.nnx)


def regression(lib):
    """A small model with batch statistics, and its loss."""
    rngs = lib.Rngs(0)
    layers = [lib.Linear(4, 8, rngs=rngs), lib.relu, lib.BatchNorm(8, rngs=rngs), lib.Linear(8, 2, rngs=rngs)]
    return lib.Sequential(*layers), lambda model, x, y: jnp.mean((model(x) - y) ** 2)


TRANSFORMATIONS = {
    "sgd with momentum": optax.sgd(optax.exponential_decay(0.1, 2, 0.5), momentum=0.9),
    "adam": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.01, 2, 5)),
    "adamw": optax.adamw(optax.cosine_decay_schedule(0.01, 5), weight_decay=0.1),
    "every second step": optax.MultiSteps(optax.adam(0.01), 2),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_five_steps_give_the_same_model_and_optimizer(name):
    def trained(lib):
        model, loss_fn = regression(lib)
        optimizer = lib.Optimizer(model, TRANSFORMATIONS[name], wrt=lib.Param)
        ema = lib.EMA(model, 0.8, only=lib.Param)

        @lib.jit
        def step(model, optimizer, ema, x, y):
            loss, grads = lib.value_and_grad(loss_fn)(model, x, y)
            optimizer.update(model, grads)
            ema.update(model)
            return loss

        losses = [step(model, optimizer, ema, normal(16, 4) + i, normal(16, 2)) for i in range(5)]
        states = (lib.state(model), lib.state(optimizer), lib.state(ema), lib.state(ema.apply_to(model)))
        return losses, [lib.to_flat_state(state) for state in states]

    (losses, states), (their_losses, their_states) = map(trained, LIBRARIES)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
    for ours, theirs in zip(states, their_states):
        assert ours.paths == theirs.paths
        for path, a, b in zip(ours.paths, ours.leaves, theirs.leaves):
            assert type(a).__name__ == type(b).__name__
            assert a.get_value().dtype == b.get_value().dtype
            np.testing.assert_allclose(a.get_value(), b.get_value(), rtol=1e-5, atol=1e-5, err_msg=str(path))


METRICS = {
    "average": lambda m: (m.Average(), [{"values": normal(5)}, {"values": 2.5}, {"values": integers(2, 3, below=9)}]),
    "masked": lambda m: (m.Average("x"), [{"x": jnp.asarray(normal(4)), "mask": jnp.array([True, False, True, True])}]),
    "accuracy": lambda m: (
        m.Accuracy(),
        [
            {"logits": jnp.asarray(normal(7, 3)), "labels": integers(7, below=3)},
            {"logits": jnp.asarray(normal(2, 5, 3)), "labels": integers(2, 5, below=3)},
        ],
    ),
    "binary accuracy": lambda m: (
        m.Accuracy(threshold=0.2),
        [{"logits": jnp.asarray(normal(9)), "labels": integers(9, below=2)}],
    ),
    "welford": lambda m: (m.Welford(), [{"values": normal(5)}, {"values": normal(2, 3) + 10}]),
    "several": lambda m: (
        m.MultiMetric(loss=m.Average("loss"), spread=m.Welford("loss")),
        [{"loss": normal(5)}, {"loss": normal(6)}],
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_accumulate_the_same(name):
    def computed(lib):
        metric, batches = METRICS[name](lib.metrics)
        for batch in batches:
            metric.update(**batch)
        return lib.to_flat_state(lib.state(metric)), metric.compute(), metric.reset(), lib.state(metric)

    (ours, value, _, fresh), (theirs, their_value, _, their_fresh) = map(computed, LIBRARIES)
    assert ours.paths == theirs.paths
    for a, b in zip(jax.tree.leaves((ours, value, fresh)), jax.tree.leaves((theirs, their_value, their_fresh))):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("call", ["x", "values", "labels"])
def test_metrics_refuse_the_same(call):
    def refusal(lib):
        m = lib.metrics
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
            {
                "x": lambda: m.Average("x").update(y=1),
                "values": lambda: m.Average().update(values=1.0, mask=jnp.array(True)),
                "labels": lambda: m.Accuracy().update(logits=jnp.ones((3, 2)), labels=jnp.ones(3)),
            }[call]()
        return error.value

    ours, theirs = map(refusal, LIBRARIES)
    assert isinstance(ours, type(theirs))
    assert str(theirs) in str(ours)


# ---------------------------------------------------------------- what users read

CONSOLE = {"force_terminal": False, "width": 200}


def shown(text: str) -> str:
    """A text without the addresses of functions and the paths of modules, which differ."""
    return re.sub(r"<(class|function) [^>]*>|0x[0-9a-f]+", "<...>", text)


OBJECTS = {
    "linear": lambda lib: lib.Linear(2, 3, rngs=lib.Rngs(0)),
    "variable": lambda lib: lib.Param(jnp.arange(6.0).reshape(2, 3), note="x"),
    "model": lambda lib: regression(lib)[0],
    "state": lambda lib: lib.state(regression(lib)[0]),
    "containers": lambda lib: lib.List([lib.Dict(a=lib.Param(1), b=lib.List([])), 3]),
    "streams": lambda lib: lib.Rngs(0, params=1),
    "dropout": lambda lib: lib.Dropout(0.5, rngs=lib.Rngs(0)),
    "metrics": lambda lib: lib.metrics.Welford(),
    "large": lambda lib: lib.Param(jax.ShapeDtypeStruct((1000, 1000), jnp.float32)),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_reprs_have_the_same_layout(name):
    ours, theirs = (shown(repr(OBJECTS[name](lib))) for lib in LIBRARIES)
    assert ours == theirs


@pytest.mark.parametrize("options", [{}, {"depth": 1}])
def test_tables_are_the_same(options):
    def table(lib):
        return lib.tabulate(regression(lib)[0], jnp.ones((4, 4)), console_kwargs=CONSOLE, **options)

    assert table(nnx) == table(flax.nnx)


@pytest.mark.parametrize("name", ["linear", "dropout"])
def test_costs_are_the_same(name):
    def table(lib):
        options = {"compute_flops": True, "compute_vjp_flops": True, "console_kwargs": CONSOLE}
        return lib.tabulate(OBJECTS[name](lib), jnp.ones((3, 2)), **options)

    assert table(nnx) == table(flax.nnx)


# ---------------------------------------------------------------- names beside nnx


def test_errors_take_the_same_arguments_and_keep_the_words():
    for name in batiste.errors.__all__:
        theirs, ours = getattr(flax.errors, name), getattr(batiste.errors, name)
        words = [f"<{i}>" for i in range(theirs.__init__.__code__.co_argcount - 1)]
        if name == "CursorFindError":
            words = [SimpleNamespace(_path=f"<{i}>") for i in range(2)]
        if name == "ApplyScopeInvalidVariablesStructureError":
            words = [{"params": {"a": 1}}]
        key_words = set(re.findall(r"[`<\w>']{4,}", str(theirs(*words)).partition("(https")[0]))
        missing = [word for word in key_words if word not in str(ours(*words))]
        assert len(missing) <= len(key_words) / 2, f"{name}: {missing}"


def test_flags_have_the_same_names_and_defaults():
    theirs = {name: getattr(flags.config, name) for name in flags.config._values}
    assert {name: getattr(batiste.configurations.config, name) for name in theirs} == theirs
    holders = {name for name, x in vars(flags).items() if isinstance(x, flags.FlagHolder)}
    assert holders <= set(batiste.configurations.__all__)


def test_pytree_dataclasses_flatten_alike():
    def flat(lib):
        @lib.dataclass
        class Point:
            x: float
            y: float = lib.field(pytree_node=False, default=2.0)

        class Node(lib.PyTreeNode):
            x: float
            y: Point = lib.field(default_factory=lambda: Point(3.0))

        return jax.tree_util.tree_flatten_with_path((Point(1.0), Node(1.0)))

    (ours, _), (theirs, _) = flat(batiste.struct), flat(flax.struct)
    assert ours == theirs
