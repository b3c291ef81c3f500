# SPDX-License-Identifier: Apache-2.0
"""Whether a value fits where another one stood. Where programs live from a change, it is said and not forbidden."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .callers import warn
from .errors import StateMismatchWarning
from .jaxcompat import ShapedArray, Tracer, is_ref
from .structure import Path, show_path
from .variable import Variable

_log = logging.getLogger(__name__)
_is_meant: contextvars.ContextVar[bool] = contextvars.ContextVar("is_meant", default=False)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, ShapedArray)


@contextlib.contextmanager
def changes_are_meant() -> Iterator[None]:
    """In the meantime, other shapes and kinds of values go to the log: where taking them is what a function is for."""
    token = _is_meant.set(True)
    try:
        yield
    finally:
        _is_meant.reset(token)


def check_fit(old: Any, new: Any, path: str | Path, what: str) -> None:
    """Warns if an array gets a value of another kind: of another shape, whole numbers for fractions, no array.

    Axes may come or go, as when the members of an ensemble are stacked; the precision may change. Inside a transform
    nothing is said: there a value is often a part of the whole.
    """
    try:
        if old.shape == new.shape and old.dtype == new.dtype:  # as nearly always
            return
    except AttributeError:
        pass
    if isinstance(new, (Tracer, Variable)) or is_ref(new) or not isinstance(old, _ARRAYS):
        return  # a Variable: one of the hijax kind, which is its own value
    if isinstance(new, _ARRAYS):
        shapes = sorted((old.shape, new.shape), key=len)
        rest = iter(shapes[1])
        if all(n in rest for n in shapes[0]) and _family(old) == _family(new):
            return
    elif isinstance(new, (bool, int, float, complex)) and old.shape == ():
        return
    where = path if isinstance(path, str) else show_path(path)
    problem = (
        f"the {what} at {where} got another kind of value than it had: got {_described(new)}, expected "
        f"{_described(old)}."
    )
    if _is_meant.get():
        _log.warning("%s", problem)
        return
    fix = "look whether the state belongs here; where the change is meant, give the target that shape first."
    warn(f"{problem}\n  Fix: {fix}", StateMismatchWarning)


def check_known(names: Iterable[str], name: str, path: str, kind: str) -> None:
    """Warns that an update brings a part `name` that `kind` has not had under any of its `names`."""
    near = difflib.get_close_matches(name, list(names), n=1)
    meant = f"write {near[0]!r} if that was meant" if near else "look whether the state belongs to this model"
    warn(f"the update adds '{name}' to the {kind} at {path}, which had no such part.\n  Fix: {meant}; a part that is "
         "meant to be new is assigned as an attribute.", StateMismatchWarning)  # fmt: skip


def _family(x: Any) -> str:
    """Fractions, whole numbers, truth values, or keys."""
    for name, family in (("fraction", jnp.inexact), ("whole", jnp.integer), ("truth", jnp.bool_)):
        if jnp.issubdtype(x.dtype, family):
            return name
    return str(x.dtype)


def _described(x: Any) -> str:
    if isinstance(x, _ARRAYS):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"the {type(x).__name__} {x!r:.40}"
