# SPDX-License-Identifier: Apache-2.0
"""A pipeline: a stack of equal blocks divided over devices, through which microbatches go one behind the other.

tick       0    1    2    3    4       stage s works on microbatch t - s at tick t; it is idle, and computes what
stage 0    a    b    c    .    .       nobody reads, in (stages - 1) of (microbatches + stages - 1) ticks
stage 1    .    a    b    c    .
stage 2    .    .    a    b    c
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from batiste.graph import merge, split
from batiste.graph.errors import ShapeError
from batiste.graph.placement import current_mesh

Block = Callable[[Any, Array], Array]


def pipeline(block: Block, *, microbatches: int, axis: str = "pipeline", remat: bool = True) -> Block:
    """y = block(p[L-1], … block(p[1], block(p[0], x))), the L layers divided over a mesh axis

    The result is a function of the stacked parameters, each leaf with a leading dim of L layers, and of x[B, …]. Where
    the mesh in context has no such axis, it scans over the layers.

    Args:
        block: `(parameters of one layer, x) -> y`, y of the shape of x.
        microbatches: into how many parts the batch is cut: the more, the less time the stages are idle.
        remat: keep the inputs of each stage alone, and compute the rest again in the backward pass.

    Raises:
        ShapeError: the layers are no multiple of the stages, or the batch is none of the microbatches.

    >>> doubled = pipeline(lambda p, x: p * x, microbatches=2)
    >>> doubled(2 * jnp.ones(3), jnp.ones(4))
    Array([8., 8., 8., 8.], dtype=float32)

    Source: Huang et al. 2019, "GPipe", section 2.3.
    """

    def layers(parameters: Any, x: Array) -> Array:
        return lax.scan(lambda x, p: (block(p, x), None), x, parameters)[0]

    several = jax.checkpoint(layers) if remat else layers

    def run(parameters: Any, x: Array) -> Array:
        mesh = current_mesh()
        stages = 1 if mesh.empty else mesh.shape.get(axis, 1)
        depth = jnp.shape(jax.tree.leaves(parameters)[0])[0]
        if depth % stages:
            raise ShapeError(f"{depth} layers cannot be divided over the {stages} stages of {axis}",
                             fix="choose a number of layers that is a multiple of the stages")  # fmt: skip
        if x.shape[0] % microbatches:
            raise ShapeError("the batch cannot be cut into microbatches", got=x.shape,
                             expected=f"a multiple of {microbatches}")  # fmt: skip
        if stages == 1:
            return several(parameters, x)
        passing = jax.shard_map(
            lambda p, xs: _stage(several, p, xs, stages, axis), mesh=mesh,
            in_specs=(PartitionSpec(axis), PartitionSpec()), out_specs=PartitionSpec(), axis_names={axis},
        )  # fmt: skip
        return _joined(jax.jit(passing)(parameters, _cut(x, microbatches)))

    return run


def pipelined(layers: Any, x: Array, *, microbatches: int, axis: str = "pipeline", remat: bool = True) -> Array:
    """`x` after the layers of an object whose Variables are stacked, such as `stack.layers`: see `pipeline`.

    What the layers write to their Variables is lost.
    """
    graphdef, state = split(layers)
    block = pipeline(lambda p, x: merge(graphdef, p)(x), microbatches=microbatches, axis=axis, remat=remat)
    return block(state, x)


def _cut(x: Array, microbatches: int) -> Array:
    """x[B, …] as [microbatches, B / microbatches, …], the rows dealt out in turn: each keeps its division over data."""
    return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)


def _joined(xs: Array) -> Array:
    return jnp.swapaxes(xs, 0, 1).reshape(-1, *xs.shape[2:])


def _stage(layers: Block, parameters: Any, xs: Array, stages: int, axis: str) -> Array:
    """What one stage does: at each tick, its layers on what its predecessor sent one tick ago."""
    me, count = lax.axis_index(axis), len(xs)
    xs = lax.pcast(xs, axis, to="varying")
    to_next = [(i, i + 1) for i in range(stages - 1)]

    def tick(sent: Array, t: Array) -> tuple[Array, Array]:
        y = layers(parameters, jnp.where(me == 0, xs[jnp.minimum(t, count - 1)], sent))
        return lax.ppermute(y, axis, to_next), y

    _, ys = lax.scan(tick, jnp.zeros_like(xs[0]), jnp.arange(count + stages - 1))
    done = ys[stages - 1 :]  # of the last stage; the others' are of no use
    return lax.psum(jnp.where(me == stages - 1, done, jnp.zeros_like(done)), axis)
