# SPDX-License-Identifier: Apache-2.0
"""What every layer asks of its arguments, and the errors when it is not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from batiste.graph import Rngs
from batiste.graph.errors import ArgumentError, RngError, ShapeError


def check_sizes(layer: Any, **sizes: Any) -> None:
    """Raises an ArgumentError unless every size is a whole number, 0 or more."""
    for name, size in sizes.items():
        if not hasattr(size, "__index__") or size < 0:
            raise ArgumentError(f"{type(layer).__name__} got wrong {name}", got=repr(size),
                                expected="a whole number, 0 or more",
                                fix="write an int; use // where you divide")  # fmt: skip


def check_last_dim(layer: Any, x: jax.Array, size: int, argument: str) -> None:
    """Raises a ShapeError unless `x` has the shape (..., size); `argument` is what the layer was built with."""
    if x.ndim == 0 or x.shape[-1] != size:
        name = type(layer).__name__
        wanted = f"build it with {argument}={x.shape[-1]}" if x.ndim else "add the missing dims"
        raise ShapeError(f"{name} got a wrong last dim", at=layer, got=x.shape, expected=f"(..., {size})",
                         fix=f"give {name} an input of {size} features, or {wanted}")  # fmt: skip


def params_stream(layer: Any, rngs: Any) -> Callable[[], jax.Array]:
    """`rngs.params`, the stream that parameters are drawn from."""
    if not isinstance(rngs, Rngs) and not hasattr(rngs, "params"):
        name = type(layer).__name__
        raise RngError(f"{name} needs random streams to draw its parameters from", got=f"rngs={rngs!r}",
                       expected="an Rngs", fix=f"{name}(..., rngs=nnx.Rngs(0))")  # fmt: skip
    return rngs.params


def decided(layer: Any, argument: str, *choices: Any) -> Any:
    """The first of `choices` (of the call, of the layer) that is not None.

    Raises:
        ArgumentError: all are None: the layer was told neither way.
    """
    for choice in choices:
        if choice is not None:
            return choice
    name = type(layer).__name__
    raise ArgumentError(
        f"No `{argument}` argument was provided to {name}", at=layer,
        fix=f"pass {argument}=True or False to {name}(...), to the call, or to nnx.view(model, {argument}=...)",
    )  # fmt: skip
