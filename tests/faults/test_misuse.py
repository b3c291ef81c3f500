# SPDX-License-Identifier: Apache-2.0
"""Misuse of live objects: each case gives the right result, or an error (a warning, where JAX lets no error through)
that says where and what to do."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import linen, nnx
from batiste.debug import TooManyProgramsError, limit_programs, why_nan
from batiste.graph.errors import (
    AliasError,
    ArgumentError,
    BatisteError,
    CapturedError,
    CarryError,
    ShapeError,
    StructureError,
    TraceContextError,
)

X = jnp.ones((1, 2))
P = jax.sharding.PartitionSpec


class Counter(nnx.Module):
    def __init__(self):
        self.n, self.cache, self.k = nnx.Variable(jnp.zeros(())), None, 0
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.n[...] += 1
        return self.linear(x).sum()


def tied() -> nnx.List:
    layers = nnx.List([nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2)])
    layers[1].kernel = layers[0].kernel
    return layers


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("d",))


# ---------------------------------------------------------------- updates inside transforms of JAX, on a copy

LOST = {
    "jit": (lambda m: jax.jit(lambda m, x: m(x))(m, X), "Counter/n"),
    "grad": (lambda m: jax.grad(lambda m, x: m(x))(m, X), "Counter/n"),
    "vmap": (lambda m: jax.vmap(lambda m, x: m(x), (None, 0))(m, X[None]), "Counter/n"),
    "checkpoint": (lambda m: jax.checkpoint(lambda m, x: m(x))(m, X), "Counter/n"),
    "eval_shape": (lambda m: jax.eval_shape(lambda m, x: m(x), m, X), "Counter/n"),
    "shard_map": (
        lambda m: jax.shard_map(lambda m, x: m(x), mesh=one_device(), in_specs=(P(), P()), out_specs=P(),
                                check_vma=False)(m, X), "Counter/n"),
    "random masks": (
        lambda _: jax.jit(lambda d, x: d(x))(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), X), "Dropout/rngs/count"),
    "statistics": (
        lambda _: jax.jit(lambda b, x: b(x))(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), X), "BatchNorm/mean"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_an_update_that_is_lost_is_told_of(case: str) -> None:
    run, path = LOST[case]
    model = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(model)
        gc.collect()
    texts = [str(w.message) for w in seen if issubclass(w.category, nnx.LostUpdateWarning)]
    assert any(f"'{path}'" in text and "plain JAX transform" in text and "Fix: " in text for text in texts), texts
    assert float(model.n[...]) == 0


# ---------------------------------------------------------------- errors


def keep_tracer(transform: Callable) -> None:
    model = Counter()

    def f(x):
        model.cache = x * 2
        return x

    transform(f)(X)


def keep_tracer_in_the_argument() -> None:
    def f(model, x):
        model.cache = x * 2
        return x

    nnx.jit(f)(Counter(), X)


def keep_tracer_in_a_list() -> None:
    kept = nnx.List([])

    def f(x):
        kept.append(x * 2)
        return x

    jax.jit(f)(X)


def loop_around(transform: Callable) -> None:
    model = Counter()
    transform(lambda carry, _: (carry + model(X), None))


def cycle() -> Counter:
    model = Counter()
    model.me = model
    return model


def deep_cycle() -> Counter:
    model = Counter()
    model.parts = nnx.List([nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))])
    model.parts[0].a.parent = model
    return model


def count_up() -> None:
    model = Counter()
    step = limit_programs(nnx.jit(lambda model, x: model.linear(x)), 3)
    for model.k in range(9):
        step(model, X)


def gradients_of_another_shape() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.State({"kernel": nnx.Param(jnp.ones(1)), "bias": nnx.Param(jnp.ones(2))}))


def missing_leaf() -> None:
    graphdef, state = nnx.split(Counter())
    del state["linear"]["kernel"]
    nnx.merge(graphdef, state)


def linen_applied(x: Any, *names: str) -> None:
    model = linen.BatchNorm(use_running_average=False) if "batch" in names else linen.Dense(2)
    model.apply(model.init(jax.random.key(0), X), x)


def written(change: Callable[[Counter], Any]) -> None:
    change(Counter())


closed_over = r"Cannot mutate Variable from a different trace level at n"
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "tracer kept on an argument": (keep_tracer_in_the_argument, StructureError, r"at Counter\.cache"),
    "tracer kept by nnx.jit": (lambda: keep_tracer(nnx.jit), TraceContextError, "Cannot mutate 'Counter'"),
    "tracer kept by jax.jit": (lambda: keep_tracer(jax.jit), TraceContextError, "Cannot mutate 'Counter'"),
    "tracer kept by jax.vmap": (lambda: keep_tracer(jax.vmap), TraceContextError, "Cannot mutate 'Counter'"),
    "tracer kept in a list": (keep_tracer_in_a_list, TraceContextError, "Cannot mutate 'List'"),
    "written through a closure, jax.lax.scan": (
        lambda: loop_around(lambda f: jax.lax.scan(f, 0.0, None, length=3)), TraceContextError, closed_over),
    "written through a closure, nnx.scan": (
        lambda: loop_around(lambda f: nnx.scan(f, length=3)(0.0, None)), TraceContextError, closed_over),
    "written through a closure, nnx.jit": (
        lambda: loop_around(lambda f: nnx.jit(lambda x: f(x, None)[0])(0.0)), TraceContextError, closed_over),
    "written through a closure, nnx.jit in nnx.jit": (
        lambda: loop_around(lambda f: nnx.jit(lambda x: nnx.jit(lambda x: f(x, None)[0])(x))(0.0)), TraceContextError,
        closed_over),
    "written through a closure, nnx.grad": (
        lambda: loop_around(lambda f: nnx.grad(lambda x: f(x, None)[0])(0.0)), TraceContextError, closed_over),
    "written through a closure, nnx.remat": (
        lambda: loop_around(lambda f: nnx.grad(nnx.remat(lambda x: f(x, None)[0]))(0.0)), TraceContextError,
        closed_over),
    "written through a closure, jax.checkpoint": (
        lambda: loop_around(lambda f: jax.checkpoint(lambda x: f(x, None)[0])(0.0)), TraceContextError, closed_over),
    "written through a closure, jax.lax.cond": (
        lambda: loop_around(lambda f: jax.lax.cond(True, lambda x: f(x, None)[0], lambda x: x, 0.0)),
        TraceContextError, closed_over),
    "written through a closure, nnx.while_loop": (
        lambda: loop_around(lambda f: nnx.while_loop(lambda x: x < 1, lambda x: f(x, None)[0], 0.0)),
        TraceContextError, closed_over),
    "a module that holds itself, jax.jit": (
        lambda: jax.jit(lambda model, x: model(x))(cycle(), X), StructureError, "at Counter/me"),
    "a part that holds its parent, jax.grad": (
        lambda: jax.grad(lambda model, x: model(x))(deep_cycle(), X), StructureError,
        "holds itself, and so is no tree at"),
    "shared under two axes": (
        lambda: (lambda m: nnx.vmap(lambda a, b: a.n + b.n, in_axes=(None, 0))(m, m))(Counter()), AliasError, "0/n"),
    "a bound method": (lambda: nnx.jit(Counter().__call__)(X), ArgumentError, "bound methods"),
    "a captured object is returned": (
        lambda: (lambda model: nnx.jit(lambda x: model)(X))(Counter()), CapturedError, "at out/linear/bias"),
    "a static number that counts": (count_up, TooManyProgramsError, r"model\.k: 2 -> 3"),
    "a carry of another shape": (
        lambda: nnx.scan(lambda c, _: (jnp.ones(3), None), length=2)(jnp.zeros(2), None), CarryError,
        r"at argument 0: got float32\[3\], expected float32\[2\]"),
    "an array where a setting was": (
        lambda: written(lambda m: setattr(m, "k", X)), StructureError, r"at Counter\.k"),
    "layers in a plain list": (
        lambda: written(lambda m: setattr(m, "layers", [m.linear])), StructureError, r"at Counter\.layers"),
    "a value of another shape": (
        lambda: written(lambda m: m.linear.kernel.__setitem__(..., jnp.ones((5, 5)))), ShapeError,
        r"cannot write into a Param.*got \(5, 5\), expected what broadcasts to \(2, 2\)"),
    "a row of another shape": (
        lambda: written(lambda m: m.linear.kernel.__setitem__(0, jnp.ones(3))), ShapeError, r"broadcasts to \(2,\)"),
    "gradients of another shape": (gradients_of_another_shape, StructureError, r"kernel has shape \(1,\)"),
    "a leaf is missing": (missing_leaf, StructureError, "missing: linear/kernel"),
    "update of a part that is not there": (
        lambda: nnx.update(Counter(), {"x": {"kernel": X}}), StructureError, "at x/kernel"),
    "Linen: statistics may not change": (
        lambda: linen_applied(X, "batch"), BatisteError, 'Cannot update variable "mean"'),
    "Linen: another width": (lambda: linen_applied(jnp.ones((1, 3))), BatisteError, 'parameter "kernel" in "/"'),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_says_where_and_what_to_do(case: str) -> None:
    run, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        run()
    said = str(caught.value)
    assert isinstance(caught.value, BatisteError)
    assert re.search(text, said), said
    assert re.search(r"\bFix: \S", said) and len(said.splitlines()) <= 15, said


def test_after_a_cycle_was_refused_all_goes_on() -> None:
    for _ in range(5):
        with pytest.raises(StructureError, match="holds itself"):
            jax.tree.leaves(cycle())
    nested = X
    for _ in range(300):
        nested = [nested]
    assert len(jax.tree.leaves(nested)) == 1


# ---------------------------------------------------------------- right results


def shared_twice() -> None:
    model = Counter()
    nnx.jit(lambda a, b: a(X) + b(X))(model, model)
    assert float(model.n[...]) == 2


def tied_gradient() -> None:
    grads = nnx.grad(lambda m: (m[0].kernel[...] ** 2 + m[1].kernel[...] ** 2).sum())(layers := tied())
    np.testing.assert_allclose(grads[0]["kernel"][...], 4 * layers[0].kernel[...])


def tied_update() -> None:
    layers = tied()
    optimizer = nnx.Optimizer(layers, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(layers, nnx.grad(lambda m: (m[0].kernel[...] * m[1].kernel[...]).sum())(layers))
    assert layers[0].kernel is layers[1].kernel


def donated() -> None:
    model = Counter()
    expected = model.linear(X)
    nnx.jit(lambda model, x: model(x), donate_argnums=0)(model, X)
    np.testing.assert_array_equal(model.linear(X), expected)


def a_branch_writes() -> None:
    model = Counter()
    nnx.cond(True, lambda m, x: m(x), lambda m, x: x.sum(), model, X)
    assert float(model.n[...]) == 1


def a_shard_writes() -> None:
    model = Counter()
    nnx.shard_map(lambda m, x: m(x), mesh=one_device(), in_specs=(P(), P()), out_specs=P())(model, X)
    assert float(model.n[...]) == 1


def nested_transforms_write() -> None:
    model = Counter()
    nnx.jit(nnx.grad(nnx.remat(nnx.jit(lambda m, x: m(x)))))(model, X)
    assert float(model.n[...]) == 1


def a_cycle_in_a_graph_transform() -> None:
    model = deep_cycle()
    nnx.jit(lambda m, x: m(x))(model, X)
    assert float(model.n[...]) == 1 and model.parts[0].a.parent is model


def an_error_leaves_all_as_it_was() -> None:
    model = Counter()
    with pytest.raises(ZeroDivisionError):
        nnx.jit(lambda m, x: m(x) / (1 // 0))(model, X)
    assert float(model.n[...]) == 0


def members_of_an_ensemble_differ() -> None:
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs)))
    kernels = np.asarray(make(nnx.Rngs(0)).kernel[...])
    assert len({kernel.tobytes() for kernel in kernels}) == 3


def copies_are_copies() -> None:
    model = Counter()
    for other in (copy.deepcopy(model), nnx.clone(model), pickle.loads(pickle.dumps(model))):
        other(X)
        assert float(other.n[...]) == 1
    assert float(model.n[...]) == 0


def an_index_out_of_range_is_found() -> None:
    found = why_nan(nnx.jit(lambda m, ids: m(ids)), nnx.Embed(10, 2, rngs=nnx.Rngs(0)), jnp.array([3, 999]))
    assert found is not None and (found.operation, found.index) == ("gather", (1, 0)) and "Embed" in found.module


RIGHT = [
    shared_twice,
    tied_gradient,
    tied_update,
    donated,
    a_branch_writes,
    a_shard_writes,
    nested_transforms_write,
    a_cycle_in_a_graph_transform,
    an_error_leaves_all_as_it_was,
    members_of_an_ensemble_differ,
    copies_are_copies,
    an_index_out_of_range_is_found,
]


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.__name__)
def test_the_result_is_right(case: Callable[[], None]) -> None:
    case()


def test_there_are_at_least_forty_cases() -> None:
    assert len(LOST) + len(ERRORS) + len(RIGHT) >= 40
