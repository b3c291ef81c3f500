# SPDX-License-Identifier: Apache-2.0
"""Gradients of a large batch, computed a part at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from batiste.graph import Param, state
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.jaxcompat import key_name
from batiste.graph.structure import show_path
from batiste.transforms.autodiff import DiffState, value_and_grad
from batiste.transforms.axes import Carry, StateAxes
from batiste.transforms.loops import scan


def accumulated(loss: Callable[..., Any], parts: int, *, wrt: Any = Param, has_aux: bool = False,
                weighted: bool = False) -> Callable[..., Any]:  # fmt: skip
    """`f(model, *batch) -> (value, gradients)`: those of the mean of `loss` over `parts` equal parts of the batch

    As `nnx.value_and_grad(loss)`, but only one part's intermediate values exist at a time. Sums are kept in float32,
    gradients are returned in the dtypes of the Variables. What the loss writes into the model (statistics, random
    streams) goes from one part to the next. Part i holds the examples i, i + parts, i + 2 parts, …, so that every
    device goes on with the examples that it has.

    Args:
        loss: `loss(model, *batch) -> value`, a mean over its examples; every array of the batch has the examples first.
        parts: how many; it divides the number of examples.
        wrt: a filter, which Variables are differentiated.
        has_aux: `loss` returns `(value, more)`; the function returns `((value, more), gradients)`, each `more` stacked.
        weighted: `loss` returns `(sum, weight)` in place of the value; the result is Σ sum / Σ weight, whatever the
            weights of the parts: what a loss over tokens with padding needs. With `has_aux`: `((sum, weight), more)`.

    Raises:
        ArgumentError: `parts` is below one.
        ShapeError: `parts` does not divide the number of examples.

    >>> from batiste import nnx
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> loss = lambda model, x: (model(x) ** 2).mean()
    >>> value, gradients = accumulated(loss, 4)(model, jnp.ones((8, 3)))
    >>> gradients["kernel"].shape
    (3, 1)
    """
    if parts < 1:
        raise ArgumentError("a batch has at least one part", got=f"parts={parts}", fix="pass parts=1 or more")

    def of_part(model: Any, *batch: Any) -> tuple[Any, tuple[Any, Any]]:
        out = loss(model, *batch)
        value, more = out if has_aux else (out, None)
        total, weight = value if weighted else (value, 1.0)
        return total, (jnp.float32(weight), more)

    differentiate = value_and_grad(of_part, argnums=DiffState(0, wrt), has_aux=True)

    @functools.wraps(loss)
    def f(model: Any, *batch: Any) -> tuple[Any, Any]:
        structure: list[Any] = []

        def add(sums: Any, model: Any, batch: Any) -> tuple[Any, Any]:
            (total, (weight, more)), gradients = differentiate(model, *batch)
            leaves, treedef = jax.tree.flatten(gradients)
            structure.append(treedef)
            new = [s + x.astype(jnp.float32) for s, x in zip(sums, [total, weight, *leaves])]
            return new, more

        wanted = jax.tree.leaves(state(model, wrt))
        start = [jnp.zeros((), jnp.float32)] * 2 + [jnp.zeros(x.shape, jnp.float32) for x in wanted]
        over = scan(add, in_axes=(Carry, StateAxes({...: Carry}), 0), out_axes=(Carry, 0))
        (total, weight, *sums), more = over(start, model, _in_parts(batch, parts))
        gradients = jax.tree.unflatten(structure[0], [(s / weight).astype(x.dtype) for s, x in zip(sums, wanted)])
        value = total / weight
        return ((value, more) if has_aux else value), gradients

    return f


def _in_parts(batch: tuple[Any, ...], parts: int) -> tuple[Any, ...]:
    """(examples, ...) -> (parts, examples / parts, ...)"""

    def cut(keys: Any, x: Any) -> Any:
        shape = jnp.shape(x)
        if not shape or shape[0] % parts:
            raise ShapeError(f"{parts} parts do not divide the examples of the batch",
                             at=show_path(tuple(map(key_name, keys))), got=shape, expected=f"({parts} k, ...)",
                             fix="choose another number of parts, or pad the batch and give weights")  # fmt: skip
        return jnp.moveaxis(jnp.reshape(x, (shape[0] // parts, parts, *shape[1:])), 1, 0)

    return jax.tree_util.tree_map_with_path(cut, batch)
