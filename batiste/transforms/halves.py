# SPDX-License-Identifier: Apache-2.0
"""The two halves of a Boundary by hand, to lift a transform that batiste does not know.

    split_inputs(transform(merge_inputs(f)))

Outside, objects become trees of arrays; inside they become objects again; changes come back by the same way. What the
transform sees as the result of `merge_inputs(f)` is the pair `(inputs, output)`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from batiste.graph.boundary import is_root
from batiste.graph.passing import from_tree, to_tree, update_context
from batiste.graph.variable import MISSING


def split_inputs(f: Any = MISSING, *, ctxtag: str = "split_merge_inputs") -> Any:
    """A function of objects around `f`, which takes and returns trees; `f` holds a `merge_inputs` of the same tag.

    >>> import jax.numpy as jnp
    >>> from batiste.graph import Dict, Variable
    >>> @split_inputs
    ... @jax.jit
    ... @merge_inputs
    ... def double(m):
    ...     m.x[...] *= 2
    >>> m = Dict(x=Variable(jnp.ones(())))
    >>> double(m)
    >>> float(m.x[...])
    2.0
    """
    if f is MISSING:
        return functools.partial(split_inputs, ctxtag=ctxtag)

    @functools.wraps(f)
    def outside(*args: Any) -> Any:
        with update_context(ctxtag):
            result = f(*to_tree(args, ctxtag=ctxtag))
            return from_tree(result, ctxtag=ctxtag, is_inner=False)[1]

    return outside


def merge_inputs(f: Any = MISSING, *, ctxtag: str = "split_merge_inputs") -> Any:
    """A function of trees around `f`, which takes and returns objects; returns `(inputs, output)` as trees."""
    if f is MISSING:
        return functools.partial(merge_inputs, ctxtag=ctxtag)

    @functools.wraps(f)
    def inside(*trees: Any) -> Any:
        args = from_tree(trees, ctxtag=ctxtag, is_inner=True)
        out = f(*args)
        objects = jax.tree.map(lambda x: x if is_root(x) else None, args, is_leaf=is_root)
        return to_tree((objects, out), ctxtag=ctxtag)

    return inside
