# SPDX-License-Identifier: Apache-2.0
"""remat: intermediate values are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from batiste.graph.boundary import Boundary, Mode
from batiste.graph.errors import ArgumentError
from batiste.graph.variable import MISSING

from .arguments import by_position, static_places
from .compile import refuse_bound_method

POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


def policy_of(policy: str | Callable[..., bool] | None) -> Callable[..., bool] | None:
    """The policy of this name in `jax.checkpoint_policies`; a function is its own.

    Raises:
        ArgumentError: no policy has the name.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ArgumentError(
            "unknown policy of nnx.remat",
            got=repr(policy),
            expected=", ".join(POLICIES),
            fix="pass one of these names, or a function of jax.checkpoint_policies",
        )
    return getattr(jax.checkpoint_policies, policy)


def remat(
    f: Any = MISSING,
    *,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: str | Callable[..., bool] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`f` whose intermediates are computed again when it is differentiated, but for those that `policy` saves.

    Args:
        policy: a function of `jax.checkpoint_policies`, or its name.

    Raises:
        ArgumentError: `f` is a bound method, or no policy has this name.
    """
    if f is MISSING:
        return functools.partial(
            remat,
            prevent_cse=prevent_cse,
            static_argnums=static_argnums,
            policy=policy,
            graph=graph,
            graph_updates=graph_updates,
        )
    mode = Mode.of("remat", graph, graph_updates)
    refuse_bound_method(f, "remat")
    saved = policy_of(policy)
    static = static_places(f, static_argnums)

    @functools.wraps(f)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        call, xs = by_position(f, args, kwargs, static(args, kwargs))
        boundary = Boundary(call, mode)
        groups = boundary.enter(xs)
        crossing = boundary.crossing

        @functools.wraps(f)
        def run(*groups):
            return crossing.run(groups), crossing.note

        return boundary.leave(*jax.checkpoint(run, prevent_cse=prevent_cse, policy=saved)(*groups))

    return recomputed
