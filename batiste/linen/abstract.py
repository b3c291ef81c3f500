# SPDX-License-Identifier: Apache-2.0
"""Running a function when some of its arguments are known by shape and dtype only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.interpreters import partial_eval

from batiste.errors import LazyInitError


def without_values(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, called with `jax.ShapeDtypeStruct`s in place of arrays; its result must not depend on their values.

    >>> x = jax.ShapeDtypeStruct((2, 3), "float32")
    >>> without_values(lambda x: jax.numpy.ones(x.shape[-1]))(x)
    Array([1., 1., 1.], dtype=float32)

    Raises:
        LazyInitError: the result depends on them.
    """

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        unknown = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]

        def of_unknown(*values: Any) -> Any:
            rest = iter(values)
            known = [next(rest) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
            args, kwargs = jax.tree.unflatten(structure, known)
            return f(*args, **kwargs)

        closed, out = jax.make_jaxpr(of_unknown, return_shape=True)(*unknown)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        for variable, is_used in zip(closed.jaxpr.invars, used):
            if is_used:
                raise LazyInitError(variable.aval)
        values = eval_jaxpr(jaxpr, closed.consts)
        return jax.tree.unflatten(jax.tree.structure(out), values)

    return call
