# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of optimizers, averages, metrics and tables: `(name, function that provokes the error)`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from batiste import nnx


class Model(nnx.Module):
    def __init__(self):
        self.encoder = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        self.decoder = nnx.Linear(8, 4, rngs=nnx.Rngs(1))
        self.statistics = nnx.BatchStat(jnp.zeros(8))


def optimizer_of(model, wrt=nnx.Param):
    return nnx.Optimizer(model, optax.adam(1e-3), wrt=wrt)


def gradients_of(model):
    return jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))


def update(change: Callable, wrt=nnx.Param) -> None:
    """One step with changed gradients."""
    model = Model()
    optimizer_of(model, wrt).update(model, change(gradients_of(model)))


def accuracy(logits, labels, **options) -> None:
    nnx.metrics.Accuracy(**options).update(logits=jnp.ones(logits), labels=labels)


def average(of, over) -> None:
    nnx.EMA(of, 0.9, only=nnx.Param).update(over)


def without(grads, name):
    return nnx.State({key: value for key, value in grads.items() if key != name})


def as_statistics(grads):
    return jax.tree.map(lambda v: nnx.BatchStat(v[...]), grads, is_leaf=lambda x: isinstance(x, nnx.Variable))


CASES: list[tuple[str, Callable[[], object]]] = [
    ("gradients lack a part of the model", lambda: update(lambda grads: without(grads, "decoder"))),
    ("gradients of less than the optimizer trains", lambda: update(lambda g: g, wrt=[nnx.Param, nnx.BatchStat])),
    ("optimizer that trains nothing", lambda: update(lambda g: g, wrt=nnx.LoRAParam)),
    ("gradients of transposed arrays", lambda: update(lambda grads: jax.tree.map(jnp.transpose, grads))),
    ("gradients of another kind", lambda: update(as_statistics)),
    ("gradients of another model", lambda: update(lambda grads: nnx.Linear(4, 8, rngs=nnx.Rngs(0)))),
    ("no gradients", lambda: update(lambda grads: None)),
    ("optimizer without wrt", lambda: nnx.Optimizer(Model(), optax.adam(1e-3))),
    ("update without the model", lambda: optimizer_of(Model()).update(gradients_of(Model()))),
    ("averages of another model", lambda: average(Model(), nnx.Linear(4, 8, rngs=nnx.Rngs(0)))),
    ("averages of bare arrays", lambda: nnx.EMA({"kernel": jnp.ones(3)}, 0.9)),
    ("metric without its argument", lambda: nnx.metrics.Average("loss").update(values=1.0)),
    ("a mask that does not fit", lambda: nnx.metrics.Average().update(values=jnp.ones((8, 2)), mask=jnp.ones(8))),
    ("accuracy of one-hot labels", lambda: accuracy((8, 10), jnp.ones((8, 10), int))),
    ("binary accuracy of classes", lambda: accuracy((8, 10), jnp.ones(8, int), threshold=0.5)),
    ("accuracy of real labels", lambda: accuracy((8, 10), jnp.ones(8))),
    ("accuracy of another batch", lambda: accuracy((8, 10), jnp.ones(7, int))),
    ("metric called as a method", lambda: nnx.MultiMetric(compute=nnx.metrics.Average())),
    ("table of a method that is not there", lambda: nnx.tabulate(Model(), jnp.ones((2, 4)))),
]
