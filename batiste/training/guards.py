# SPDX-License-Identifier: Apache-2.0
"""Guards: what a training step does about values that are not finite or that spike, decided on the device.

    ok = finite(loss, norm of the gradients, optimizer) and (loss, norm) ≤ mean + sigma · deviation
    parameters, optimizer, averages ← update      if ok, else what they were
    each number of a parameter ← what it was      if the update makes it not finite all the same

All but the last is known before the update, which is then not made at all, and the last is part of the update: so a
step pays for no second copy of anything, and a run that skipped a batch is, bit for bit, a run without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from batiste.graph import List, Pytree, Variable, data
from batiste.graph.errors import ArgumentError, BatisteError

from .dynamic_scale import adapted

__all__ = ["FINE", "NONFINITE", "SPIKE", "Guard", "LossScale", "NonFiniteError", "StepState"]

FINE, NONFINITE, SPIKE = 0, 1, 2
"""What a guard says of a step: the metric `verdict`."""

Policy = Literal["skip", "rollback", "raise", "off"]
SpikePolicy = Literal["skip", "clip", "rollback", "raise", "off"]

LEAST = 0.05  # a deviation below this share of the mean is taken for this share: a flat curve has no spikes


class StepState(Variable):
    """What a training step carries from call to call, beside the model and the optimizer."""


class NonFiniteError(BatisteError, ArithmeticError):
    """A guard stopped the training; the model is as it was before the batch that was the reason.

    Attributes:
        step: the number of the first step that was refused, where the loop knows it.
        batch: its batch, where the loop still has it; `why_nan` of `batiste.debug` can replay it.
    """

    step: int | None = None
    batch: Any = None


class Guard(Pytree):
    """Refuses steps whose values are not finite or spike, without asking the host.

    Loss, gradients and the optimizer's state are looked at whole. An update of finite ones that overflows in some
    numbers of a parameter leaves these numbers as they were, and is not counted unless the first one is among them.

    Args:
        nonfinite: `skip` the step; `rollback` to the last snapshot; `raise`, which freezes everything before the bad
            batch until the host looks (`check`, which `fit` calls); `off`.
        spike: the same choices, or `clip`: the gradient is scaled down to its usual norm.
        sigma: how many deviations above the running mean a loss or a gradient's norm is a spike.
        window: over how many steps mean and deviation run; spikes are looked for after as many.
        patience: so many refused steps on end are not bad batches but a broken run, which stops as with `raise`. So
            many spikes on end are the new level, which is accepted.
        every: of rollback, the number of good steps between snapshots, which stay on the device.

    Attributes:
        skipped, spikes, clipped, rollbacks: how often, as Variables.
    """

    def __init__(
        self,
        nonfinite: Policy = "skip",
        spike: SpikePolicy = "off",
        *,
        sigma: float = 6.0,
        window: int = 128,
        patience: int = 10,
        every: int = 100,
    ):
        for name, value, known in (
            ("nonfinite", nonfinite, ("skip", "rollback", "raise", "off")),
            ("spike", spike, ("skip", "clip", "rollback", "raise", "off")),
        ):
            if value not in known:
                raise ArgumentError(f"unknown policy for {name}", at="Guard", got=repr(value),
                                    expected=", ".join(known), fix=f"pass {name}={known[0]!r}")  # fmt: skip
        self.nonfinite, self.spike = nonfinite, spike
        self.sigma, self.window, self.patience, self.every = sigma, window, patience, every
        self.skipped, self.spikes, self.clipped, self.rollbacks = (_count() for _ in range(4))
        self.streak, self.good, self.halted = _count(), _count(), StepState(jnp.array(False))
        self.mean, self.square = StepState(jnp.zeros(2, jnp.float32)), StepState(jnp.zeros(2, jnp.float32))
        self.snapshot: Any = data(None)

    def prepare(self, carried: Sequence[Variable]) -> None:
        """Makes room for the snapshot; called once, before the step is compiled."""
        if self.snapshot is None and "rollback" in (self.nonfinite, self.spike):
            self.snapshot = List([StepState(jax.tree.map(jnp.copy, v.get_value())) for v in carried])

    def limit(self) -> jax.Array:
        """limit[2] = mean + sigma · deviation, of the loss and of the gradient's norm; infinite in the beginning."""
        mean = self.mean[...]
        deviation = jnp.sqrt(jnp.maximum(self.square[...] - mean**2, 0.0))
        limit = mean + self.sigma * jnp.maximum(deviation, LEAST * jnp.abs(mean))
        return jnp.where(self.good[...] >= self.window, limit, jnp.inf)

    def shrink(self, loss: jax.Array, norm: jax.Array) -> jax.Array:
        """The factor for the gradients: below one where a spike is to be clipped."""
        if self.spike != "clip":
            return jnp.float32(1)
        spiking = jnp.any(_figures(loss, norm) > self.limit())
        self.clipped[...] += spiking.astype(jnp.int32)
        usual = jnp.minimum(1.0, self.mean[...][1] / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        return jnp.where(spiking, usual, 1.0)

    def judge(self, loss: jax.Array, norm: jax.Array, made: Iterable[Any]) -> tuple[jax.Array, jax.Array]:
        """The verdict on a step before its update, and whether the update may be made.

        Args:
            made: what the step wrote so far, and the state of the optimizer.
        """
        figures = _figures(loss, norm)
        finite = jnp.isfinite(figures).all() & all_finite(made)
        spiking = finite & jnp.any(figures > self.limit())
        verdict = jnp.where(spiking, SPIKE, FINE) if self.spike != "off" else jnp.int32(FINE)
        verdict = jnp.where(finite, verdict, NONFINITE if self.nonfinite != "off" else FINE).astype(jnp.int32)
        return verdict, ~(self._refuses(verdict) | self.halted[...])

    def contain(self, targets: Sequence[Variable], before: Sequence[Any]) -> jax.Array:
        """Leaves each number that an update made not finite as it was; returns whether the update seems sound.

        To look at all before any is written would take another walk through all parameters, so the first number of each
        decides for all: where the gradients and the state of the optimizer are finite, a rate or a decay is not, and
        that meets all alike. With a snapshot to go back to, everything is looked at, and nothing need be kept.
        """
        if self.nonfinite == "off":
            return jnp.array(True)
        after = [v.get_value() for v in targets]
        if self.nonfinite == "rollback":
            return all_finite(after)
        sound = all_finite(x.ravel()[:1] for x in jax.tree.leaves(after))
        for variable, new, old in zip(targets, after, before):
            variable.set_value(jax.tree.map(lambda a, b: jnp.where(sound & jnp.isfinite(a), a, b), new, old))
        return sound

    def settle(
        self, verdict: jax.Array, sound: jax.Array, loss: jax.Array, norm: jax.Array, carried: Sequence[Variable]
    ) -> jax.Array:
        """Counts, keeps or restores the snapshot, and learns what is usual; returns the final verdict.

        Args:
            sound: whether what the update made was finite.
        """
        verdict = jnp.where(sound, verdict, NONFINITE)
        refused, frozen = self._refuses(verdict), self.halted[...]
        chosen = {NONFINITE: self.nonfinite, SPIKE: self.spike}
        halt, back = (sum(verdict == n for n, policy in chosen.items() if policy == word) > 0
                      for word in ("raise", "rollback"))  # fmt: skip
        back = back & ~frozen
        self.halted[...] = frozen | halt | (refused & (self.streak[...] + 1 >= self.patience) & (verdict == NONFINITE))
        if self.snapshot is not None:
            take = ~(refused | frozen) & ((self.good[...] + 1) % self.every == 0)
            _overwrite_if(back, carried, self.snapshot)
            _overwrite_if(take, self.snapshot, carried)
        self.skipped[...] += (refused & ~frozen).astype(jnp.int32)
        self.spikes[...] += ((verdict == SPIKE) & ~frozen).astype(jnp.int32)
        self.rollbacks[...] += jnp.int32(back)
        figures = _figures(loss, norm)
        finite = (verdict != NONFINITE) & jnp.isfinite(figures).all()
        self._learn(figures, finite, refused, finite & jnp.any(figures > self.limit()))
        return verdict

    def _refuses(self, verdict: jax.Array) -> jax.Array:
        return ((verdict == SPIKE) & (self.spike != "clip")) | (verdict == NONFINITE)

    def _learn(self, figures: Any, finite: Any, refused: Any, spiking: Any) -> None:
        """Mean and mean of squares over the window, of good steps alone; a level that stays is the new one."""
        streak = jnp.where(refused, self.streak[...] + 1, 0)
        level = spiking & (streak >= self.patience)
        good = jnp.where(level, 0, self.good[...]) + (finite & ~spiking).astype(jnp.int32)
        weight = jnp.where(finite & ~spiking, 1.0 / jnp.clip(good, 1, self.window), 0.0)
        figures = jnp.where(finite, figures, 0.0)
        self.mean[...] += weight * (figures - self.mean[...])
        self.square[...] += weight * (figures**2 - self.square[...])
        self.good[...], self.streak[...] = good, jnp.where(level, 0, streak)

    def counts(self) -> dict[str, int]:
        """How often what happened, as numbers: this waits for the device."""
        return {name: int(getattr(self, name)[...]) for name in ("skipped", "spikes", "clipped", "rollbacks")}

    def check(self) -> None:
        """Waits for the device, and raises if the guard has stopped the training.

        Raises:
            NonFiniteError: it has.
        """
        if bool(self.halted[...]):
            raise halted(self)

    def go_on(self) -> None:
        """Lets steps be taken again after the guard has stopped them."""
        self.halted[...], self.streak[...] = jnp.array(False), jnp.array(0, jnp.int32)


def halted(guard: Guard, step: int | None = None, batch: Any = None) -> NonFiniteError:
    """The error of a guard that has stopped the training."""
    error = NonFiniteError(
        "the guard stopped the training: a loss, a gradient or what an update made was not finite or spiked",
        at=None if step is None else f"step {step}",
        got=", ".join(f"{count} {name}" for name, count in guard.counts().items()),
        fix="look at the batch (error.batch) with batiste.debug.why_nan; the model is as it was before it. "
        "Guard(nonfinite='skip') leaves single batches out, guard.go_on() goes on",
    )
    error.step, error.batch = step, batch
    return error


class LossScale(Pytree):
    """gradients = ∂(scale · loss) / scale: small gradients stay above the smallest number of float16

    A step whose gradients overflow is left out and halves the scale; after `interval` steps without, it doubles.

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.2.
    """

    def __init__(self, scale: float = 2.0**15, *, interval: int = 2000, factor: float = 2.0, least: float = 1.0):
        self.interval, self.factor, self.least = interval, factor, least
        self.scale, self.steps = StepState(jnp.float32(scale)), _count()

    def adapt(self, finite: jax.Array) -> None:
        """After a step whose gradients were finite, or not."""
        self.scale[...], self.steps[...] = adapted(
            self.scale[...], self.steps[...], finite, interval=self.interval - 1, grow=self.factor,
            shrink=1 / self.factor, least=self.least,
        )  # fmt: skip


def all_finite(values: Iterable[Any]) -> jax.Array:
    """Whether every float in these trees is finite, and so is the sum over dim 0, in float32 at least.

    A sum takes half the time of a conjunction: what is not finite makes it not finite.
    """
    leaves = [x for x in jax.tree.leaves(list(values)) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    sums = [jnp.sum(x, axis=0 if jnp.ndim(x) else None, dtype=jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]
    return jnp.stack([jnp.isfinite(total).all() for total in sums]).all() if sums else jnp.array(True)


def _overwrite_if(chosen: jax.Array, variables: Sequence[Variable], source: Sequence[Variable]) -> None:
    """Writes the values of `source` into `variables` if they are chosen.

    As a loop of one or no turn, not as a `cond`: XLA lets a loop's values lie where they are, and copies a branch's.
    """
    values = [[v.get_value() for v in side] for side in (variables, source)]
    kept = lax.fori_loop(0, chosen.astype(jnp.int32), lambda _, kept: values[1], values[0])
    for variable, value in zip(variables, kept):
        variable.set_value(value)


def _figures(loss: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.stack([loss.astype(jnp.float32), norm.astype(jnp.float32)])


def _count() -> StepState:
    return StepState(jnp.array(0, dtype=jnp.int32))
