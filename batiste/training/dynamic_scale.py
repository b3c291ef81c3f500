# SPDX-License-Identifier: Apache-2.0
"""DynamicScale: gradients in half precision, of a loss that is scaled up as far as they stay finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from batiste import struct


class DynamicScaleResult(NamedTuple):
    """What a function made by `DynamicScale.value_and_grad` returns."""

    dynamic_scale: DynamicScale
    finite: Any
    aux: Any
    grad: Any


class DynamicScale(struct.PyTreeNode):
    """grad = float32(∂(scale · loss)) / scale, with a scale that adapts.

    The scale grows by `growth_factor` after `growth_interval` steps with finite gradients, and shrinks by
    `backoff_factor` after a step without; the caller leaves out the update of such a step.

    >>> result = DynamicScale(scale=8.0).value_and_grad(lambda x: x**2)(3.0)
    >>> result.finite.item(), result.aux.item(), result.grad.item()
    (True, 9.0, 6.0)

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
    """

    growth_factor: float = struct.field(pytree_node=False, default=2.0)
    backoff_factor: float = struct.field(pytree_node=False, default=0.5)
    growth_interval: int = struct.field(pytree_node=False, default=2000)
    fin_steps: Any = 0
    scale: Any = 65536.0
    minimum_scale: float | None = struct.field(pytree_node=False, default=jnp.finfo(jnp.float32).tiny)  # pyright: ignore[reportAssignmentType]

    def value_and_grad(
        self,
        fun: Callable[..., Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        axis_name: str | None = None,
    ) -> Callable[..., DynamicScaleResult]:
        """Like `jax.value_and_grad`; the function returns a `DynamicScaleResult`.

        Args:
            axis_name: the gradients are averaged over this axis, so that all devices agree whether they are finite.
        """

        def scaled(*args):
            value = fun(*args)
            return (self.scale * value[0], value[1]) if has_aux else self.scale * value

        scaled_grad = jax.value_and_grad(scaled, argnums, has_aux)

        def grad_fn(*args):
            value, grad = scaled_grad(*args)
            value = (value[0] / self.scale, value[1]) if has_aux else value / self.scale
            grad = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32) / self.scale, grad)
            if axis_name is not None:
                grad = lax.pmean(grad, axis_name)
            finite = jnp.array(True)
            for g in jax.tree.leaves(grad):
                finite &= jnp.all(jnp.isfinite(g))
            return DynamicScaleResult(self._after(finite), finite, value, grad)

        return grad_fn

    def _after(self, finite: jax.Array) -> DynamicScale:
        """The scale for the next step."""
        scale, steps = adapted(
            self.scale, self.fin_steps, finite, interval=self.growth_interval, grow=self.growth_factor,
            shrink=self.backoff_factor, least=self.minimum_scale,
        )  # fmt: skip
        return self.replace(fin_steps=steps, scale=scale)


def adapted(
    scale: Any, steps: Any, finite: jax.Array, *, interval: int, grow: float, shrink: float, least: float | None
) -> tuple[jax.Array, jax.Array]:
    """The scale for the next step, and how many steps with finite gradients it has seen.

    A finite step after `interval` others makes the scale `grow`; one that is not finite makes it `shrink`.
    """
    full = steps == interval
    grown = jnp.where(full & finite, jnp.minimum(scale * grow, jnp.finfo(jnp.float32).max), scale)
    scale = jnp.where(finite, grown, scale * shrink)
    if least is not None:
        scale = jnp.maximum(scale, least)
    return scale, jnp.where(full | ~finite, 0, steps + 1)
