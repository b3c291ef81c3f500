# SPDX-License-Identifier: Apache-2.0
"""Ways through a stack of equal layers: scanned or unrolled, with or without intermediates computed again.

A way is a *drive*: it calls `body(start, lane) -> (start, out)` once per layer, as `jax.lax.scan` does, and differs
from it in the program that comes out alone. `start` is a pair (what goes round, what stays the same).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from batiste.graph.errors import ArgumentError

from .remat import policy_of

Run = Literal["scan", "unroll"]
Remat = str | Callable[..., bool] | None
RUNS = ("scan", "unroll")


def drive_of(run: Run, remat: Remat) -> Callable[[Callable, Any, Any], tuple[Any, Any]]:
    """The drive of these settings, in the place of `jax.lax.scan`.

    Args:
        run: `scan` (one copy of the layer in the program) or `unroll` (a copy per layer, traced once).
        remat: None, a policy as of `remat`, or `sqrt`: the layers in about √n groups, of which only the inputs are
            kept; the backward pass goes through a group once more, layer by layer.

    Raises:
        ArgumentError: there is no such way.
    """
    if run not in RUNS:
        raise ArgumentError("unknown way through a stack", got=repr(run), expected=" or ".join(map(repr, RUNS)),
                            fix='set run="scan"')  # fmt: skip
    if remat == "sqrt":
        return functools.partial(_in_groups, run)
    if remat is not None:
        policy_of(remat)  # a wrong one is refused here
    return functools.partial(_plainly, run, remat)


def _plainly(run: Run, remat: Remat, body: Callable, start: Any, lanes: Any) -> tuple[Any, Any]:
    through = _scanned if run == "scan" else _unrolled
    if remat is None and run == "scan":
        return jax.lax.scan(body, start, lanes)  # the very body: JAX keeps its program
    carry, fixed = start
    carry, out = through(_step(body, remat, run), carry, fixed, lanes)
    return (carry, fixed), out


@functools.lru_cache(maxsize=512)
def _step(body: Callable, remat: Remat, run: Run) -> Callable:
    """One layer: `(carry, fixed, lane) -> (carry, out)`. Unrolled, it is a program of its own, so traced once."""

    def step(carry, fixed, lane):
        (carry, _), out = body((carry, fixed), lane)
        return carry, out

    if remat is not None:
        # Inside a scan there is nothing to merge with; unrolled, XLA would undo the recomputation.
        step = jax.checkpoint(step, prevent_cse=run == "unroll", policy=policy_of(remat))
    return jax.jit(step) if run == "unroll" else step


def _scanned(step: Callable, carry: Any, fixed: Any, lanes: Any) -> tuple[Any, Any]:
    return jax.lax.scan(lambda carry, lane: step(carry, fixed, lane), carry, lanes)


def _unrolled(step: Callable, carry: Any, fixed: Any, lanes: Any) -> tuple[Any, Any]:
    n = length_of(lanes)
    leaves, structure = jax.tree.flatten(lanes)
    outs = []
    for lane in zip(*(_slices(x, n) for x in leaves)):
        carry, out = step(carry, fixed, jax.tree.unflatten(structure, lane))
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def _slices(x: Any, n: int) -> list[Any]:
    """The n entries of `x` along its first axis."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return [x[i] for i in range(n)]
    # One split and not n slices: its gradient is one concatenation.
    return [part.reshape(x.shape[1:]) for part in jax.lax.split(x, [1] * n)]


def _in_groups(run: Run, body: Callable, start: Any, lanes: Any) -> tuple[Any, Any]:
    n = length_of(lanes)
    size = next(size for size in range(math.isqrt(n), 0, -1) if n % size == 0)  # the divisor next below √n
    groups = jax.tree.map(lambda x: x.reshape(n // size, size, *x.shape[1:]), lanes)
    through = _scanned if run == "scan" else _unrolled
    carry, fixed = start
    carry, out = through(_group(body, run), carry, fixed, groups)
    return (carry, fixed), jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), out)


@functools.lru_cache(maxsize=512)
def _group(body: Callable, run: Run) -> Callable:
    """A group of layers: only what goes into it is kept, and in its backward pass what goes into each layer."""
    through = _scanned if run == "scan" else _unrolled
    return jax.checkpoint(functools.partial(through, _step(body, "full", run)), prevent_cse=run == "unroll")


def length_of(lanes: Any) -> int:
    return jax.tree.leaves(lanes)[0].shape[0]
