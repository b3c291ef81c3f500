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

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    **{
        name: getattr(jax.checkpoint_policies, name)
        for name in (
            "everything_saveable",
            "nothing_saveable",
            "dots_saveable",
            "checkpoint_dots",
            "dots_with_no_batch_dims_saveable",
            "checkpoint_dots_with_no_batch_dims",
        )
    },
}
DEVICE, HOST = "device", "pinned_host"


def policy_of(policy: str | Callable[..., bool] | None) -> Callable[..., Any] | None:
    """What is kept for the backward pass, by name; a function of `jax.checkpoint_policies` is its own.

        full              nothing: all is computed again
        dots              the results of matrix products without batch dims (those with weights)
        names:a,b         what `jax.ad_checkpoint.checkpoint_name(x, "a")` has named so
        offload           as `dots`, kept in the host's memory
        offload:a,b       as `names:a,b`, kept in the host's memory

    and the policies of JAX without arguments, by their names.

    Raises:
        ArgumentError: no policy has the name.
    """
    if not isinstance(policy, str):
        return policy
    kind, _, listed = policy.partition(":")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if kind == "names" and names:
        return jax.checkpoint_policies.save_only_these_names(*names)
    if kind == "offload" and names:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src=DEVICE, offload_dst=HOST
        )
    if policy == "offload":
        return jax.checkpoint_policies.offload_dot_with_no_batch_dims(DEVICE, HOST)
    if policy not in POLICIES:
        raise ArgumentError(
            "unknown policy of nnx.remat",
            got=repr(policy),
            expected=", ".join([*POLICIES, "names:a,b", "offload", "offload:a,b"]),
            fix="pass one of these names, or a function of jax.checkpoint_policies",
        )
    return POLICIES[policy]


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
        policy: a function of `jax.checkpoint_policies`, or a name, see `policy_of`.

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
