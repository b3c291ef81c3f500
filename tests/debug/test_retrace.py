# SPDX-License-Identifier: Apache-2.0
"""Twelve causes of a new compilation are named by path, with what was and what is; equal calls are left alone."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.debug import RetraceWarning, TooManyProgramsError, limit_programs, why_recompiled
from batiste.graph.errors import ArgumentError
from batiste.training.optimizer import Optimizer

X = np.ones((2, 3), np.float32)


class Scaled(nnx.Module):
    def __init__(self):
        self.linear, self.dropout = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.scale, self.step = 1.0, 0

    def __call__(self, x):
        return self.dropout(self.linear(x)) * self.scale


def changed(change):
    model = Scaled()
    change(model)
    return model


jitted = nnx.jit(lambda model, x, mask=None, *, extra=(), n=1: model(x), static_argnames="n")
A, B = jax.nn.relu, jax.nn.gelu
CAUSES = {
    "shape": ((Scaled(), X[:1]), {}, "x", "float32[2,3]", "float32[1,3]"),
    "dtype": ((Scaled(), X.astype(np.int32)), {}, "x", "float32[2,3]", "int32[2,3]"),
    "weak type": ((Scaled(), X), {"mask": 1.0}, "mask", "absent", "Python float"),
    "static attribute": ((changed(lambda m: setattr(m, "step", 1)), X), {}, "model.step", "0", "1"),
    "mode": ((changed(lambda m: m.eval()), X), {}, "model/dropout.deterministic", "False", "True"),
    "part taken away": ((changed(lambda m: setattr(m.linear, "bias", None)), X), {}, "model/linear/bias",
                        "Param float32[3]", "None"),
    "part added": ((changed(lambda m: setattr(m, "new", nnx.Param(jnp.ones(1)))), X), {}, "model/new", "absent",
                   "Param float32[1]"),
    "parameter's dtype": ((changed(lambda m: m.linear.kernel.set_value(jnp.ones((3, 3), jnp.bfloat16))), X), {},
                          "model/linear/kernel", "Param float32[3,3]", "Param bfloat16[3,3]"),
    "kind": ((changed(lambda m: setattr(m.linear, "bias", nnx.BatchStat(jnp.zeros(3)))), X), {}, "model/linear/bias",
             "Param float32[3]", "BatchStat float32[3]"),
    "metadata": ((changed(lambda m: m.linear.bias.set_metadata(note="new")), X), {}, "model/linear/bias.note", "absent",
                 "'new'"),
    "structure": ((Scaled(), X), {"extra": (1.0,)}, "extra", "absent", "tuple of 1"),
    "static argument": ((Scaled(), X), {"n": 2}, "n", "absent", "static 2"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_named(cause: str) -> None:
    args, kwargs, path, before, now = CAUSES[cause]
    f = limit_programs(jitted, 1)
    f(Scaled(), X)
    f(Scaled(), np.zeros_like(X))
    with pytest.raises(TooManyProgramsError) as caught:
        f(*args, **kwargs)
    line = next(line for line in str(caught.value).splitlines() if line.strip().startswith(path))
    assert before in line.split(" -> ")[0] and now in line.split(" -> ")[1], str(caught.value)
    assert caught.value.fix and len(str(caught.value).splitlines()) <= 15


def test_a_lambda_that_is_made_anew_and_settings_of_jax() -> None:
    f = limit_programs(jax.jit(lambda x, act: act(x), static_argnums=1))
    f(X, A), f(X, B)
    assert list(why_recompiled(f)) == ["act"] and "gelu" in str(why_recompiled(f))
    with jax.default_matmul_precision("float32"):
        f(X, B)
    assert why_recompiled(f) == {"jax.config.jax_default_matmul_precision": ("None", "float32")}
    f(x=X, act=B)
    assert "x (passed)" in why_recompiled(f)


def test_a_training_loop_gives_no_false_alarm_and_counts_as_the_compiler_does() -> None:
    model = Scaled()
    optimizer = Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    traces = 0

    @functools.partial(limit_programs, n=2)
    @nnx.jit
    def step(model, optimizer, x):
        nonlocal traces
        traces += 1
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    for n in (2, 2, 4, 2, 4):
        step(model, optimizer, jnp.ones((n, 3)))
    assert traces == len(step.programs) == 2
    with pytest.raises(TooManyProgramsError, match=r"x: float32\[4,3\] -> float32\[5,3\]"):
        step(model, optimizer, jnp.ones((5, 3)))
    assert traces == 2, "the refused call was not traced"
    step(model, optimizer, jnp.ones((4, 3)))
    assert step.lower(model, optimizer, jnp.ones((4, 3))) is not None


def test_warnings_instead() -> None:
    f = limit_programs(jax.jit(lambda x: x), 1, on_limit="warn")
    f(1.0)
    with pytest.warns(RetraceWarning, match="compiled for the 2. time") as seen:
        f(1)
    assert "x: Python float -> Python int" in str(seen[0].message) and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(2), f(2.0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: limit_programs(jitted, 0), "got n=0"),
        (lambda: limit_programs(jitted, 1, on_limit="no"), "got 'no', expected 'raise' or 'warn'"),
        (lambda: why_recompiled(jitted), "were not noted"),
    ],
)
def test_wrong_use_is_named(wrong, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        wrong()
