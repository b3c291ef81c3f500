# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit floats with delayed scaling, as parts of a model: scales come from the greatest of the last calls.

So that no array is read twice. The gradient of a result is scaled by its own greatest value: what a part learns is
learnt in the forward pass, and any optimizer and any training step will do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste.graph import Module, Variable, data, iter_graph

from .fp8 import OVERWRITE_WITH_GRADIENT, as_tuples, scaled_dot, update_fp8_meta
from .policy import KEEP, fitting, own_product


class Fp8State(Variable, collection=OVERWRITE_WITH_GRADIENT):
    """A scale, or the greatest values of the last calls."""


class DelayedDot(Module):
    """`jax.lax.dot_general` in 8 bits: operands e4m3, scaled by the greatest of the last calls, gradients e5m2

    Args:
        history: how many calls.
        lead: the leading dims of a stack of layers, each of which has a state of its own.

    Attributes:
        use_running_average: the state is used and not changed; `model.eval()` sets it.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3.

    >>> dot, x = DelayedDot(), jnp.array([[1.0, 2.0, 3.0]])
    >>> [dot(x, x.T, (((1,), (0,)), ((), ()))).round(2).item() for _ in range(2)]
    [14.0, 13.649999618530273]
    """

    def __init__(self, history: int = 16, lead: tuple[int, ...] = ()):
        self.input_amax_history, self.kernel_amax_history = (
            Fp8State(jnp.zeros((*lead, history), jnp.float32)) for _ in range(2)
        )
        self.input_scale, self.kernel_scale = (Fp8State(jnp.ones((*lead, 1), jnp.float32)) for _ in range(2))
        self.use_running_average = False

    def __call__(self, lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None,
                 preferred_element_type: DTypeLike | None = None, *, out_sharding: Any = None) -> Array:  # fmt: skip
        scales = self._scale("input", lhs), self._scale("kernel", rhs)
        dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)
        y: Any = scaled_dot(lhs, rhs, *scales, as_tuples(dimension_numbers), dtype)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def _scale(self, name: str, x: Array) -> Array:
        """The scale for an operand; the history learns its greatest value."""
        scale, history = getattr(self, f"{name}_scale"), getattr(self, f"{name}_amax_history")
        if self.use_running_average:
            return scale[...]
        new, greatest = update_fp8_meta(jax.lax.stop_gradient(x), jnp.float8_e4m3fn, scale[...], history[...])
        scale[...], history[...] = new, greatest
        return new


class DelayedEinsum(DelayedDot):
    """`jax.numpy.einsum` of two operands in 8 bits, with the state of a `DelayedDot`"""

    def __call__(  # type: ignore[override]
        self, equation: str, lhs: Array, rhs: Array, *, preferred_element_type: DTypeLike | None = None, **options: Any
    ) -> Array:
        scales = self._scale("input", lhs)[0], self._scale("kernel", rhs)[0]
        operands = (x.astype(jnp.float32) / scale for x, scale in zip((lhs, rhs), scales))  # einsum may swap them
        y = jnp.einsum(equation, *operands, _dot_general=_unscaled_dot, **options) * (scales[0] * scales[1])
        return y.astype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype))


def _unscaled_dot(lhs: Array, rhs: Array, dimension_numbers: Any, *args: Any, **options: Any) -> Array:
    one = jnp.ones(1, jnp.float32)
    return scaled_dot(lhs, rhs, one, one, as_tuples(dimension_numbers), jnp.float32)


def delayed(model: Any, *, history: int = 16, keep: tuple[str, ...] = KEEP) -> None:
    """Gives every layer that multiplies as JAX does a `DelayedDot` of its own, in place

    The new Variables, of kind `Fp8State`, are saved and restored with the model. Policies leave these products alone.

    Args:
        keep: patterns of modules that are left as they are, as of a `Policy`.

    >>> from batiste import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> delayed(model)
    >>> type(model.dot_general).__name__, model(jnp.ones((1, 2))).shape
    ('DelayedDot', (1, 3))
    """
    kept = fitting(model, keep)
    for path, part in list(iter_graph(model)):
        if isinstance(part, Module) and path not in kept and (name := own_product(part)):
            shape = vars(part)["kernel"].shape
            lead = shape[: len(shape) - kernel_rank(part)]
            setattr(part, name, data((DelayedDot if name == "dot_general" else DelayedEinsum)(history, lead)))


def kernel_rank(part: Any) -> int:
    """How many dims the kernel of one layer has; in a stack of layers it has more."""
    if hasattr(part, "kernel_shape"):
        return len(part.kernel_shape)
    sizes = (getattr(part, "batch_axis", ()), part.in_features, part.out_features)
    return sum(1 if isinstance(size, int) else len(size) for size in sizes)
