# SPDX-License-Identifier: Apache-2.0
"""What a value of a model says of itself, and how it is sent to its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from batiste.graph import Variable
from batiste.graph.jaxcompat import Tracer, is_ref
from batiste.graph.placement import put

VALUES = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_value(x: Any) -> bool:
    """Whether `x` is a Variable, or a box with axis metadata of the functional face."""
    return isinstance(x, Variable) or hasattr(x, "unbox")


def contents(x: Any) -> tuple[Any, Mapping[str, Any]]:
    """The array and the metadata of a Variable or a box; of anything else, itself and nothing."""
    if isinstance(x, Variable):
        raw = x.get_raw_value()
        return raw[...] if is_ref(raw) else raw, x.get_metadata()
    if hasattr(x, "unbox"):
        return x.unbox(apply_constraint=False) if hasattr(x, "names") else x.unbox(), {
            "out_sharding": getattr(x, "names", None), "sharding_rules": getattr(x, "rules", None)
        }  # fmt: skip
    return x, {}


def is_optimizer_state(path: tuple, x: Any) -> bool:
    """Whether this is state of an optimizer, of either face."""
    return "opt_state" in path or any(cls.__name__ == "OptState" for cls in type(x).__mro__)


def is_made(x: Variable) -> bool:
    raw = x.get_raw_value()
    return is_ref(raw) or all(isinstance(leaf, VALUES) for leaf in jax.tree.leaves(raw))


def send(x: Variable, sharding: NamedSharding) -> None:
    raw = x.get_raw_value()
    if is_ref(raw):
        x.set_raw_value(jax.new_ref(sent(raw[...], sharding)))  # type: ignore[index]
        return
    new = jax.tree.map(lambda leaf: sent(leaf, sharding), raw)
    if any(a is not b for a, b in zip(jax.tree.leaves(raw), jax.tree.leaves(new))):
        x.set_raw_value(new)


@functools.cache
def _resharding(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def sent(x: Any, sharding: NamedSharding) -> Any:
    """`x` in this place: moved by a compiled program where it is spread already, so that no device holds it whole."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return put(x, sharding)
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x if x.sharding == sharding else jax.device_put(x, sharding)
    if isinstance(x.sharding, NamedSharding) and x.sharding.mesh == sharding.mesh:
        return _resharding(sharding)(x)
    return put(x, sharding)
