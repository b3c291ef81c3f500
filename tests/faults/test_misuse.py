# SPDX-License-Identifier: Apache-2.0
"""Misuse of live objects: each case gives the right result, or an error, or a warning where programs live from what is
asked for. Errors and warnings say where in the model, inside which transform, in which line, and what to do."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import linen, nnx, serialization
from batiste.debug import TooManyProgramsError, limit_programs, why_nan
from batiste.graph import pytree, trees
from batiste.graph.errors import (
    AliasError,
    ArgumentError,
    BatisteError,
    CapturedError,
    CarryError,
    ShapeError,
    StaleCaptureWarning,
    StateMismatchWarning,
    StructureError,
    TraceContextError,
    UntiedWarning,
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


def tied() -> Any:
    layers: Any = nnx.List([nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2)])
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
    assert all(re.search(rf"In: \S+ \((?:{re.escape(__file__)}|\S+\.py):\d+\)", text) for text in texts), texts
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


def keep_tracer_in_a_plain_list() -> None:
    model: Any = Counter()
    model.kept = nnx.data([])

    def f(x):
        model.kept.append(x * 2)
        return x

    jax.jit(f)(X)
    nnx.jit(lambda model, x: model(x))(model, X)


def nested_too_deep() -> None:
    model = nnx.Dict()
    for _ in range(2000):
        model = nnx.Dict(inner=model)
    jax.tree.leaves(model)


def loop_around(transform: Callable) -> None:
    model = Counter()
    transform(lambda carry, _: (carry + model(X), None))


def cycle() -> Counter:
    model = Counter()
    model.me = model
    return model


def deep_cycle() -> Any:
    model: Any = Counter()
    part: Any = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model.parts = nnx.List([nnx.Dict(a=part)])
    part.parent = model
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
    "tracer kept in a plain list": (keep_tracer_in_a_plain_list, TraceContextError, r"has ended at args/0/kept/0"),
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
    "a module of 2000 levels": (nested_too_deep, StructureError, r"nested too deep .* got 2001, .*setrecursionlimit"),
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
    assert re.search(text, said, re.DOTALL), said
    shown = "".join(traceback.format_exception_only(caught.value)).partition("-----")[0]
    assert len(re.findall(r"\bFix: \S", shown)) == 1 and len(shown.splitlines()) <= 15, shown
    assert re.search(rf"^  In: \S+ \({re.escape(__file__)}:\d+\)", shown, re.MULTILINE), shown


AROUND = {
    "tracer kept by nnx.jit": "nnx.jit",
    "tracer kept by jax.jit": "jax.jit",
    "tracer kept by jax.vmap": "jax.vmap",
    "written through a closure, jax.lax.scan": "jax.lax.scan",
    "written through a closure, nnx.scan": "nnx.scan",
    "written through a closure, nnx.jit in nnx.jit": "nnx.jit > nnx.jit",
    "written through a closure, nnx.grad": "nnx.grad",
    "written through a closure, nnx.remat": "nnx.grad > nnx.remat",
    "written through a closure, jax.checkpoint": "jax.checkpoint",
    "written through a closure, jax.lax.cond": "jax.lax.cond",
    "written through a closure, nnx.while_loop": "nnx.while_loop",
}


@pytest.mark.parametrize("case", AROUND)
def test_an_error_names_the_transforms_around_it(case: str) -> None:
    run, kind, _ = ERRORS[case]
    with pytest.raises(kind) as caught:
        run()
    note, *_ = caught.value.__notes__  # JAX adds some of its own
    assert note.endswith(f"inside {AROUND[case]}")


# ---------------------------------------------------------------- warnings: what is asked for is done


def fresh() -> nnx.Dict:
    return nnx.Dict(part=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def state_of(out: int) -> Any:
    return nnx.state(nnx.Dict(part=nnx.Linear(2, out, rngs=nnx.Rngs(0))))


def restored(values: Any) -> Any:
    return serialization.from_bytes({"a": {"w": X}}, serialization.to_bytes(values))


def read_by_a_closure() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.array(3.0)))
    f = nnx.jit(lambda x: model.w * x)
    assert f(1.0) == 3
    model.w[...] = 30.0
    assert f(1.0) == 30


def closure_over_another_object() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.array(3.0)))
    f = nnx.jit(lambda x: nnx.grad(lambda model: (model.w[...] ** 2) * x)(model)["w"][...])
    assert f(1.0) == 6
    model = nnx.Dict(w=nnx.Param(jnp.array(5.0)))
    assert f(1.0) == 10


def members_from_one_stream() -> None:
    nnx.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs), in_axes=None, axis_size=3)(nnx.Rngs(0))


def one_mask_for_all() -> None:
    nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones((3, 2)))


WARNED: dict[str, tuple[Callable[[], Any], type[Warning], str]] = {
    "update with another shape": (
        lambda: nnx.update(fresh(), state_of(3)), StateMismatchWarning,
        r"Param at part/kernel .* got float32\[2,3\], expected float32\[2,2\]"),
    "update with whole numbers": (
        lambda: nnx.update(fresh(), {"part": {"kernel": jnp.ones((2, 2), jnp.int8)}}), StateMismatchWarning,
        r"part/kernel .* got int8\[2,2\]"),
    "update with a text": (
        lambda: nnx.update(fresh(), {"part": {"kernel": "ones"}}), StateMismatchWarning, "got the str 'ones'"),
    "update with a misspelt name": (
        lambda: nnx.update(fresh(), {"part": {"kernle": X}}), StateMismatchWarning,
        r"adds 'kernle' to the Linear at part.*\n  Fix: write 'kernel'"),
    "update with a part that is not there": (
        lambda: nnx.update(fresh(), {"other": X}), StateMismatchWarning, "adds 'other' to the Dict at <root>"),
    "merge of another shape": (
        lambda: nnx.merge(nnx.split(fresh())[0], state_of(3)), StateMismatchWarning, r"part/kernel .* float32\[2,3\]"),
    "from_bytes of another shape": (
        lambda: restored({"a": {"w": jnp.ones((3, 5))}}), StateMismatchWarning, r"\./a/w .* got float32\[3,5\]"),
    "from_bytes of whole numbers": (
        lambda: restored({"a": {"w": jnp.ones((1, 2), jnp.int8)}}), StateMismatchWarning, r"\./a/w .* got int8\[1,2\]"),
    "from_bytes of a text": (lambda: restored({"a": {"w": "x"}}), StateMismatchWarning, r"\./a/w .* got the str 'x'"),
    "from_bytes of a dict": (
        lambda: restored({"a": {"w": {"b": 1}}}), StateMismatchWarning, r"\./a/w .* got the dict"),
    "from_bytes of more": (
        lambda: restored({"a": {"w": X, "b": 1}}), StateMismatchWarning, r"parts at \./a that the target lacks.*: b"),
    "tied weights in jax.tree.map": (
        lambda: jax.tree.map(lambda x: x, nnx.Dict(a=tied())), UntiedWarning,
        "the List has one Param at a/0/kernel and at a/1/kernel"),
    "tied weights in jax.grad": (
        lambda: jax.grad(lambda m: (m[0].kernel * m[1].kernel).sum())(tied()), UntiedWarning,
        "the List has one Param at 0/kernel and at 1/kernel"),
    "a captured Variable changed": (
        read_by_a_closure, StaleCaptureWarning, r"compiles <lambda> again: the Param .*Read in: .*inside nnx\.jit"),
    "a captured object was replaced": (closure_over_another_object, StaleCaptureWarning, "compiles <lambda> again"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_a_warning_says_where_and_what_to_do(case: str) -> None:
    run, kind, text = WARNED[case]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    found = [w for w in seen if issubclass(w.category, kind) and re.search(text, str(w.message), re.DOTALL)]
    assert found, [str(w.message) for w in seen]
    assert all("Fix: " in str(w.message) and w.filename == __file__ for w in found)


@pytest.mark.parametrize(
    ("use", "stream"), [(members_from_one_stream, "argument 0/default"), (one_mask_for_all, "argument 0/rngs")],
    ids=["an ensemble from one stream", "one mask for all examples"],
)  # fmt: skip
def test_shared_random_numbers_are_told_of(use: Callable[[], None], stream: str, caplog: Any) -> None:
    use()
    (text,) = caplog.messages
    assert f"axis of the stream is None: {stream}. " in text and "nnx.split_rngs" in text and f"({__file__}:" in text


def stacked() -> None:
    model, other = fresh(), fresh()
    both = jax.tree.map(lambda *xs: jnp.stack(xs), nnx.state(model), nnx.state(other))
    nnx.update(model, both)
    nnx.merge(nnx.split(other)[0], both)


def of_another_precision() -> None:
    nnx.update(fresh(), jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(fresh())))


def tied_and_only_read() -> None:
    layers = tied()
    jax.jit(lambda layers: layers[0].kernel * layers[1].kernel)(layers)
    jax.tree.map(lambda x: x, nnx.state(layers))
    layers[1].kernel = nnx.Param(jnp.ones((1, 1)))
    jax.tree.map(lambda x: x, layers)


def parts_put_back() -> None:
    layer = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.pop(layer, nnx.BatchStat))


def read_and_unchanged() -> None:
    model = fresh()
    f = nnx.jit(lambda x: model.part(x))
    for _ in range(3):
        f(X)


def a_stream_per_member() -> None:
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs)))
    make(nnx.Rngs(0))


@pytest.mark.parametrize(
    "use",
    [stacked, of_another_precision, tied_and_only_read, parts_put_back, read_and_unchanged, a_stream_per_member],
    ids=lambda use: use.__name__,
)
def test_what_is_meant_is_not_warned_of(use: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use()


def test_a_cycle_that_comes_later_is_found() -> None:
    for path in (("a",), ("a", "b")):
        for kept in (nnx.data([]), nnx.Dict()):
            model = nnx.Dict(x=kept)
            for name in path:
                model = nnx.Dict({name: model})
            assert jax.tree.leaves(model) == []
            inner = functools.reduce(getattr, reversed(path), model).x
            inner.append(model) if isinstance(inner, list) else setattr(inner, "up", model)
            with pytest.raises(StructureError, match="the Dict holds itself"):
                jax.tree.leaves(model)


def test_an_object_is_walked_once() -> None:
    model, walks = Counter(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytree, "look_for_cycles", lambda x: (walks.append(x), trees.look_for_cycles(x)))
        for _ in range(3):
            jax.tree.leaves(model)
        assert walks == [model]
        model.other = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        jax.tree.leaves(model)
        assert walks == [model, model]


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


def a_parameter_is_replaced() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    model.kernel = nnx.Param(jnp.zeros((2, 2)))
    optimizer.update(model, nnx.grad(lambda m: m.kernel[...].sum())(model))
    np.testing.assert_array_equal(model.kernel, np.full((2, 2), -0.5))


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
    assert found is not None and (found.operation, found.index) == ("gather", (1, 0)) and "Embed" in str(found.module)


RIGHT = [
    shared_twice,
    tied_gradient,
    tied_update,
    a_parameter_is_replaced,
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


def test_there_are_at_least_sixty_five_cases() -> None:
    assert len(LOST) + len(ERRORS) + len(WARNED) + len(RIGHT) >= 65
