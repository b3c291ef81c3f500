# SPDX-License-Identifier: Apache-2.0
"""What a part of a traced computation costs: it is marked while it is traced, cut out of the jaxpr, and priced by XLA.

So the function is traced once, however many parts are priced. The equations of a marked part carry its tag in their
name stack; each of its outputs goes through an equation `name` that carries the tag too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Keep = Callable[[Any], bool]


def marked(tag: str, call: Callable[[], Any], is_leaf: Keep) -> Any:
    """`call()`, marked with a tag of letters, digits and `_`; objects that `is_leaf` tells are returned as they are."""
    with jax.named_scope(tag):
        output = call()
    return jax.tree.map(lambda x: checkpoint_name(x, tag) if isinstance(x, jax.Array) else x, output, is_leaf=is_leaf)


def region(jaxpr: jex.Jaxpr, tag: str) -> jex.ClosedJaxpr | None:
    """The part of a jaxpr, or of one inside it, that was marked with the tag; None if it was traced in vain."""
    outputs = [eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "name" and eqn.params["name"] == tag]
    if outputs:
        return _cut(jaxpr, tag, outputs)
    for inner in _inner(jaxpr):
        found = region(inner, tag)
        if found is not None:
            return found
    return None


def _inner(jaxpr: jex.Jaxpr) -> Iterator[jex.Jaxpr]:
    for eqn in jaxpr.eqns:
        yield from jex.jaxprs_in_params(eqn.params)


def _cut(jaxpr: jex.Jaxpr, tag: str, outputs: list[Any]) -> jex.ClosedJaxpr:
    """The equations under the tag that the outputs need; what they take from outside becomes their input."""
    wanted = {v for v in outputs if isinstance(v, jex.Var)}
    inside = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars) and tag in re.split(r"\W", str(eqn.source_info.name_stack)):
            inside.insert(0, eqn)
            wanted.difference_update(eqn.outvars)
            wanted.update(v for v in eqn.invars if isinstance(v, jex.Var))
    effects = frozenset().union(*(eqn.effects for eqn in inside))
    names = jaxpr.debug_info.with_unknown_names()
    return jex.ClosedJaxpr(jex.Jaxpr([], list(wanted), outputs, inside, effects, names), [])


def flops(part: jex.ClosedJaxpr, backward: bool = False) -> int:
    """The floating-point operations of a part; with `backward`, of its gradient by all its inputs as well."""
    run = jex.jaxpr_as_fun(part)
    inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in part.in_avals]
    by = [i for i, x in enumerate(inputs) if _is_inexact(x)]

    def run_back(*inputs: Any) -> Any:
        def outputs(chosen: list[Any]) -> list[Any]:
            replaced = dict(zip(by, chosen))
            return [y for y in run(*(replaced.get(i, x) for i, x in enumerate(inputs))) if _is_inexact(y)]

        ys, pullback = jax.vjp(outputs, [inputs[i] for i in by])
        return ys, pullback([jnp.ones_like(y) for y in ys])

    cost = jax.jit(run_back if backward else run).lower(*inputs).cost_analysis()
    return int((cost or {}).get("flops", 0))  # type: ignore[union-attr]


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
