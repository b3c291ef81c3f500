# SPDX-License-Identifier: Apache-2.0
"""A module that holds itself is no tree: this is found out before JAX goes round in it until the stack ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from .errors import StructureError

# Modules taken apart between two looks. JAX keeps the depth at which a flattening failed, and Python ends at 1000: so
# not many. Two primes: the modules of one round of a cycle are passed in order, and each of them must get its turn.
EVERY = (31, 37)

_taken_apart = itertools.count(1)


def refuse_cycle(x: Any) -> None:
    """Looks now and then whether `x`, which is being taken apart as a tree, holds itself.

    JAX calls for one node after another, and says nothing of what it has been in; a walk at each node would cost a
    walk per node.

    Raises:
        StructureError: it does.
    """
    n = next(_taken_apart)
    if all(n % every for every in EVERY):
        return
    path = _way_back(x, x, set())
    if path is not None:
        raise StructureError(
            f"the {type(x).__name__} holds itself, and so is no tree",
            at=f"{type(x).__name__}/{'/'.join(map(str, path))}",
            fix="use the transform of the same name in batiste.nnx, which takes graphs",
        )


def _way_back(x: Any, root: Any, seen: set[int]) -> tuple | None:
    for key, child in _parts(x):
        if child is root:
            return (key,)
        if id(child) not in seen:
            seen.add(id(child))
            path = _way_back(child, root, seen)
            if path is not None:
                return (key, *path)
    return None


def _parts(x: Any) -> Iterator[tuple[Any, Any]]:
    nodes = getattr(type(x), "_pytree__is_pytree", False) and x._pytree__nodes
    if nodes:
        yield from ((k, v) for k, v in vars(x).items() if nodes.get(k))
    elif isinstance(x, dict):
        yield from x.items()
    elif isinstance(x, (list, tuple)):
        yield from enumerate(x)
