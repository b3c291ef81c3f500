# SPDX-License-Identifier: Apache-2.0
"""train_step: one compiled step of gradient descent over live objects, put together from parts.

gradients = ∂ loss(model, batch)          of all that `optimizer.wrt` selects, in parts, scaled, clipped
model, optimizer ← optimizer.update       if the guard agrees
average ← EMA of the model
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from batiste.graph import Param, Pytree, Variable, iter_graph, to_predicate
from batiste.graph.errors import ArgumentError, CallError
from batiste.graph.structure import show_path
from batiste.precision import Policy
from batiste.precision import policy as policy_named
from batiste.transforms.autodiff import DiffState, value_and_grad
from batiste.transforms.branches import cond
from batiste.transforms.compile import jit

from .accumulate import accumulated
from .ema import EMA
from .guards import FINE, Guard, LossScale, all_finite

__all__ = ["TrainStep", "Trainable", "global_norm", "train_step"]

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, init=False)
class Trainable:
    """A filter: the parameters whose path fits one of the patterns; the rest is frozen.

    It is the optimizer's `wrt`, which is what `train_step` differentiates: one selector for both.

    >>> from batiste import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    >>> [path for path, _ in nnx.to_flat_state(nnx.state(model, Trainable("layers/1/*")))]
    [('layers', 1, 'bias'), ('layers', 1, 'kernel')]
    """

    patterns: tuple[str, ...]
    kind: type

    def __init__(self, *patterns: str, kind: type = Param):
        object.__setattr__(self, "patterns", patterns)
        object.__setattr__(self, "kind", kind)

    def __call__(self, path: tuple[Any, ...], x: Any) -> bool:
        return isinstance(x, self.kind) and any(fnmatchcase(show_path(path), p) for p in self.patterns)


class Extras(Pytree):
    """What a step carries beside model and optimizer: the guard, the loss scale, the averages. Any may be None."""

    def __init__(self, guard: Guard | None, scale: LossScale | None, ema: EMA | None):
        self.guard, self.scale, self.ema = guard, scale, ema


class TrainStep:
    """`metrics = step(model, optimizer, batch)`; made by `train_step`.

    Attributes:
        extras: guard, loss scale and EMA with their Variables, to look at, to save and to replace.
        compiled: the jitted `(model, optimizer, extras, batch) -> metrics`; it can be lowered and inspected.
        update: the same, not compiled.
    """

    def __init__(self, loss: Callable[..., Any], extras: Extras, *, clip: float | None, parts: int, donate: bool):
        self.loss, self.extras, self.clip, self.parts, self.donate = loss, extras, clip, parts, donate
        self.compiled = jit(self._named(loss), donate_argnums=(0, 1, 2) if donate else None)
        self._owned: list[weakref.ref] = []

    def __call__(self, model: Any, optimizer: Any, batch: Any) -> Metrics:
        if [id(ref()) for ref in self._owned] != [id(model), id(optimizer), id(self.extras)]:
            self.prepare(model, optimizer)
        return self.compiled(model, optimizer, self.extras, batch)

    @property
    def guard(self) -> Guard | None:
        return self.extras.guard

    @property
    def ema(self) -> EMA | None:
        return self.extras.ema

    def update(self, model: Any, optimizer: Any, extras: Extras, batch: Any) -> Metrics:
        """One step, on whatever trace level the arguments are."""
        guard, scale, ema = extras.guard, extras.scale, extras.ema
        carried = variables_of((model, optimizer, ema))
        before = [v.get_value() for v in carried]
        (loss, metrics), gradients = self._differentiate(optimizer.wrt, scale)(model, batch)
        if scale is not None:
            gradients = jax.tree.map(lambda g: (g / scale.scale[...]).astype(g.dtype), gradients)
            loss = loss / scale.scale[...]
        norm = global_norm(gradients)
        metrics = {"loss": loss, "grad_norm": norm, **metrics}
        factor = jnp.float32(1) if self.clip is None else jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
        if guard is not None:
            factor = jnp.minimum(factor, guard.shrink(loss, norm))
        if self.clip is not None or (guard is not None and guard.spike == "clip"):
            gradients = jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients)
        go, verdict = jnp.array(True), jnp.int32(FINE)
        if scale is not None:
            go = all_finite([gradients])
            excused = ~go & (scale.scale[...] > scale.least)  # a smaller scale may mend it: not for the guard
            _put_back(~go, carried, before)
            if guard is not None:
                norm = jnp.where(excused, guard.mean[...][1], norm)
            scale.adapt(go)
            metrics["loss_scale"] = scale.scale[...]
        if guard is not None:
            changed = [v.get_value() for v, old in zip(carried, before) if v.get_value() is not old]
            verdict, allowed = guard.judge(loss, norm, changed + [v.get_value() for v in variables_of(optimizer)])
            _put_back(~allowed, carried, before)
            go = go & allowed
        learn = partial(_learn, gradients, guard)
        if guard is None and scale is None:
            learn(model, optimizer, ema)
            return metrics
        sound = cond(go, learn, lambda *_: jnp.array(True), model, optimizer, ema)
        if guard is not None:
            metrics["verdict"] = guard.settle(verdict, sound, loss, norm, carried)
            metrics["halted"] = guard.halted[...]
        return metrics

    def _named(self, loss: Callable[..., Any]) -> Callable[..., Metrics]:
        def step(model: Any, optimizer: Any, extras: Any, batch: Any) -> Metrics:
            return self.update(model, optimizer, extras, batch)

        step.__name__ = step.__qualname__ = f"train_step_of_{getattr(loss, '__name__', 'loss')}"
        return step

    def _differentiate(self, wrt: Any, scale: LossScale | None) -> Callable[..., Any]:
        """`f(model, batch) -> ((loss, metrics), gradients)`"""

        def scaled(model: Any, batch: Any) -> tuple[jax.Array, Metrics]:
            value, metrics = with_metrics(self.loss(model, batch))
            return (value if scale is None else value * scale.scale[...].astype(value.dtype)), metrics

        if self.parts == 1:
            return value_and_grad(scaled, argnums=DiffState(0, wrt), has_aux=True)
        both = accumulated(scaled, self.parts, wrt=wrt, has_aux=True)

        def averaged(model: Any, batch: Any) -> Any:
            (value, metrics), gradients = both(model, batch)
            return (value, jax.tree.map(lambda x: x.mean(0), metrics)), gradients

        return averaged

    def prepare(self, model: Any, optimizer: Any) -> None:
        """Gives the objects buffers of their own, which nobody misses when they are given away; room for a snapshot.

        The first step on a model does this by itself.
        """
        if not all(isinstance(x, Pytree) for x in (model, optimizer)):
            raise CallError("a training step takes live objects", got=f"{type(model).__name__} and "
                            f"{type(optimizer).__name__}", expected="a module and an Optimizer, then the batch",
                            fix="call step(model, optimizer, batch); nnx.bridge.ToNNX(module) makes a module of the "
                            "functional face one")  # fmt: skip
        carried = variables_of((model, optimizer, self.extras.ema))
        if self.guard is not None:
            self.guard.prepare(carried)
        if self.donate:
            for variable in variables_of((model, optimizer, self.extras)):
                variable.set_value(jax.tree.map(jnp.copy, variable.get_value()))
        self._owned = [weakref.ref(x) for x in (model, optimizer, self.extras)]


def train_step(
    loss: Callable[..., Any],
    *,
    clip: float | None = None,
    parts: int = 1,
    guard: Guard | bool | None = True,
    scale: LossScale | bool | None = None,
    ema: EMA | None = None,
    policy: Policy | str | None = None,
    donate: bool = True,
) -> TrainStep:
    """A compiled `step(model, optimizer, batch) -> metrics` of `loss(model, batch) -> value` or `(value, metrics)`

    What `optimizer.wrt` selects is differentiated and updated, in place. The metrics stay on the device: `loss`,
    `grad_norm` (before clipping), those of the loss, and what guard and loss scale have to say.

    Args:
        loss: a mean over the examples of the batch; its metrics are a dict of scalars.
        clip: the largest global norm of the gradients.
        parts: the batch is taken in so many parts, of which one is in memory at a time.
        guard: what to do about values that are not finite; True for `Guard()`, which skips such steps; None for
            nothing.
        scale: of the loss, for float16; True for `LossScale()`, which the policy `float16` switches on.
        ema: an average of the model, made by `EMA(model, decay)`.
        policy: in which dtypes the loss is computed.
        donate: the buffers of model and optimizer are given to the step and reused. Before the first step they are
            copied, so that nothing else loses its own; what is taken from the model later (`nnx.state(model)`) is
            valid until the next step, unless it is copied.

    Raises:
        ArgumentError: `parts` is below one, or `clip` not above zero.

    >>> from batiste import nnx
    >>> import optax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    >>> step = train_step(lambda model, batch: (model(batch) ** 2).mean(), clip=1.0)
    >>> losses = [float(step(model, optimizer, jnp.ones((4, 2)))["loss"]) for _ in range(50)]
    >>> losses[-1] < 0.1 * losses[0]
    True
    """
    if clip is not None and clip <= 0:
        raise ArgumentError("gradients are clipped to a norm above zero", got=f"clip={clip}", fix="pass clip=1.0")
    if parts < 1:
        raise ArgumentError("a batch has at least one part", got=f"parts={parts}", fix="pass parts=1 or more")
    mixed = policy_named(policy) if isinstance(policy, str) else policy
    if mixed is not None:
        scale = True if scale is None and mixed.compute == jnp.float16 else scale
        loss = mixed.wrap(loss)
    extras = Extras(Guard() if guard is True else guard or None, LossScale() if scale is True else scale or None, ema)
    return TrainStep(loss, extras, clip=clip, parts=parts, donate=donate)


def with_metrics(out: Any) -> tuple[jax.Array, Metrics]:
    """`(value, metrics)` of what a loss returned.

    Raises:
        CallError: it is neither a number nor such a pair.
    """
    value, metrics = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    if isinstance(value, tuple) or not isinstance(metrics, dict) or jnp.shape(value) != ():
        kinds = ", ".join(type(x).__name__ for x in (out if isinstance(out, tuple) else (out,)))
        raise CallError(
            "a loss returns a number, or a number and a dict of metrics",
            got=kinds,
            fix="return loss.mean(), {'accuracy': accuracy}",
        )
    return jnp.asarray(value), metrics


def variables_of(tree: Any) -> list[Variable]:
    """The Variables below some objects, each once."""
    return [x for _, x in iter_graph(tree, graph=True) if isinstance(x, Variable)]


def selected(model: Any, wrt: Any) -> list[Variable]:
    """The Variables of a model that a filter selects, each once."""
    wanted = to_predicate(wrt)
    return [x for path, x in iter_graph(model, graph=True) if isinstance(x, Variable) and wanted(path, x)]


def global_norm(tree: Any) -> jax.Array:
    """√ Σ x², over all values of a tree, summed in float32"""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def _learn(gradients: Any, guard: Guard | None, model: Any, optimizer: Any, ema: EMA | None) -> jax.Array:
    """Updates parameters and averages; returns whether all that was made is finite, as the guard sees it."""
    targets = selected(model, optimizer.wrt)
    before = [v.get_value() for v in targets]
    optimizer.update(model, gradients)
    sound = jnp.array(True) if guard is None else guard.contain(targets, before)
    if ema is not None:
        ema.update(model)
    return sound


def _put_back(refused: jax.Array, carried: list[Variable], before: list[Any]) -> None:
    for variable, old in zip(carried, before):
        if (new := variable.get_value()) is not old:
            variable.set_value(jax.tree.map(lambda a, b: jnp.where(refused, b, a), new, old))
