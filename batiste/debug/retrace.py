# SPDX-License-Identifier: Apache-2.0
"""Why a jitted function was compiled again: what differs between two calls, by path, and a limit on the programs."""

from __future__ import annotations

import functools
import inspect
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from batiste.graph import Pytree, Variable
from batiste.graph.errors import ArgumentError
from batiste.graph.jaxcompat import Tracer, static_arguments
from batiste.graph.walk import data_items
from batiste.transforms.compile import JitWrapped

__all__ = ["LimitedFunction", "RetraceWarning", "TooManyProgramsError", "limit_programs", "why_recompiled"]

Signature = dict[str, str]  # path -> what the compiler sees there


class TooManyProgramsError(ArgumentError, RuntimeError):
    """A function was compiled more often than its limit allows."""


class RetraceWarning(UserWarning):
    """A function was compiled more often than its limit allows."""


class LimitedFunction:
    """A function that notes what its calls look like to the compiler: see `limit_programs`.

    Args:
        programs: what the calls looked like, each kind of call once; the last one is the newest.
    """

    def __init__(self, fn: Callable, n: int | None, on_limit: str):
        functools.update_wrapper(self, fn, updated=())
        self.fn, self.n, self.on_limit = fn, n, on_limit
        self.programs: list[Signature] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen = signature(self.fn, args, kwargs)
        if seen not in self.programs:
            self.programs.append(seen)
            if self.n is not None and len(self.programs) > self.n:
                self.report(self.n)
        return self.fn(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __getattr__(self, name: str) -> Any:  # lower, trace, clear_cache, ...
        return getattr(self.__dict__["fn"], name)

    def report(self, n: int) -> None:
        changes = why_recompiled(self)
        name = getattr(self.fn, "__name__", "the function")
        if self.on_limit == "raise":
            self.programs.pop()
            raise TooManyProgramsError(
                f"{name} would be compiled once more than its limit of {n}: against the nearest of the calls before\n"
                f"{changes}\n",
                fix="keep what changes the same (pad the shapes, pass numbers as arrays), or raise the limit",
            )
        warnings.warn(f"{name} is compiled for the {len(self.programs)}. time:\n{changes}", RetraceWarning, 3)


def limit_programs(fn: Callable, n: int | None = None, on_limit: Literal["raise", "warn"] = "raise") -> Any:
    """`fn`, compiled (by `jit`, say), that may have n programs: the call that needs one more is refused, or warned of.

    What differs from earlier calls is named by path: a shape, a dtype, a weak type, a sharding, a static attribute, a
    kind of Variable or its metadata, the structure, a static argument, a setting of JAX. Arguments are gone through at
    each call, which costs microseconds per leaf.

    Args:
        n: how many programs; None only notes the calls, for `why_recompiled`.
        on_limit: `raise`, or `warn`.

    >>> import jax.numpy as jnp
    >>> double = limit_programs(jax.jit(lambda x: 2 * x), 1)
    >>> _ = double(jnp.ones(3)), double(jnp.zeros(3))
    >>> double(jnp.ones(4))
    Traceback (most recent call last):
        ...
    batiste.debug.retrace.TooManyProgramsError: <lambda> would be compiled once more than its limit of 1: ...
      x: float32[3] -> float32[4]...

    Raises:
        ArgumentError: n is below one, or `on_limit` is unknown.
        TooManyProgramsError: by the call, with `on_limit="raise"`; the function is not called.
    """
    if n is not None and n < 1:
        raise ArgumentError("a function needs one program at least", got=f"n={n}", fix="pass n=1 or more, or None")
    if on_limit not in ("raise", "warn"):
        raise ArgumentError("unknown on_limit", got=repr(on_limit), expected="'raise' or 'warn'")
    return LimitedFunction(fn, n, on_limit)


class Changes(dict[str, tuple[str, str]]):
    """`{path: (before, now)}`; as text a line each."""

    def __str__(self) -> str:
        return "\n".join(f"  {path}: {old} -> {new}" for path, (old, new) in self.items())


def why_recompiled(fn: LimitedFunction) -> Changes:
    """What the newest kind of call has different from the earlier one that is nearest to it; empty if all are alike.

    >>> import jax.numpy as jnp
    >>> double = limit_programs(jax.jit(lambda x: 2 * x))
    >>> _ = double(jnp.ones(3)), double(jnp.ones(3, "int32"))
    >>> print(why_recompiled(double))
      x: float32[3] -> int32[3]

    Raises:
        ArgumentError: the calls of `fn` were not noted.
    """
    if not isinstance(fn, LimitedFunction):
        raise ArgumentError("the calls of this function were not noted", got=repr(fn), expected="limit_programs(fn)",
                            fix="wrap it before the calls: fn = limit_programs(jit(fn))")  # fmt: skip
    *before, now = fn.programs or [{}]
    return min((_difference(old, now) for old in reversed(before)), key=len, default=Changes())


def _difference(old: Signature, now: Signature) -> Changes:
    paths = [*old, *(path for path in now if path not in old)]
    pairs = {path: (old.get(path, "absent"), now.get(path, "absent")) for path in paths}
    changed = Changes({path: pair for path, pair in pairs.items() if pair[0] != pair[1]})
    gone = tuple(f"{path}." for path in changed)  # of a part that is another one now, its settings say nothing more
    return Changes({path: pair for path, pair in changed.items() if "absent" not in pair or not path.startswith(gone)})


# ---------------------------------------------------------------- what the compiler sees of a call


def signature(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> Signature:
    """Path -> what the compiler sees there, of all arguments and of the settings of JAX that programs depend on."""
    names = _names(fn)
    found: Signature = {}
    seen: dict[int, str] = {}
    numbers, static_names = _static(fn)
    for where, x in (*((names[n] if n < len(names) else str(n), x) for n, x in enumerate(args)), *kwargs.items()):
        if where in static_names or (where in names and names.index(where) in numbers):
            found[where] = f"static {_shown(x)}"
        else:
            found |= dict(_described(x, where, seen))
    for where in kwargs:
        found[f"{where} (passed)"] = "by name"
    found["the mesh in context"] = str(jax.sharding.get_abstract_mesh())
    found |= {f"jax.config.{name}": str(getattr(jax.config, name)) for name in SETTINGS}
    return found


SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_default_prng_impl",
            "jax_debug_nans", "jax_default_device")  # fmt: skip


def _names(fn: Callable) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _static(fn: Callable) -> tuple[frozenset[int], frozenset[str]]:
    if isinstance(fn, JitWrapped):
        return fn.arguments.static_numbers, fn.arguments.static_names
    return static_arguments(fn)


def _described(x: Any, at: str, seen: dict[int, str]) -> Iterator[tuple[str, str]]:
    """What `x` and everything in it is, by path; a part that was met before is told by its first path."""
    if isinstance(x, (Variable, Pytree)):
        if id(x) in seen:
            yield at, f"the same as {seen[id(x)]}"
            return
        seen[id(x)] = at
    if isinstance(x, Variable):
        values = [_leaf(v) for v in jax.tree.leaves(x.get_raw_value())]
        yield at, f"{type(x).__name__} {' '.join(values)}".strip()
        yield from ((f"{at}.{name}", _shown(value)) for name, value in x.get_metadata().items())
        return
    items = data_items(x)
    if items is None:
        yield at, _leaf(x)
        return
    inside = {str(key) for key, _ in items}
    settings = vars(x) if isinstance(x, Pytree) else {}
    yield at, f"{type(x).__qualname__}{'' if settings else f' of {len(items)}'}"
    yield from ((f"{at}.{k}", _shown(v)) for k, v in settings.items() if k not in inside and k[:9] != "_pytree__")
    for key, value in items:
        yield from _described(value, f"{at}/{key}", seen)


def _leaf(x: Any) -> str:
    if isinstance(x, (bool, int, float, complex)):
        return f"Python {type(x).__name__}"
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return _shown(x)
    weak = ", weakly typed" if getattr(x, "weak_type", False) else ""
    sharding = getattr(x, "sharding", None)
    single = sharding is None or isinstance(x, (np.ndarray, Tracer)) or len(sharding.device_set) == 1
    placed = "" if single and not getattr(x, "committed", False) else f" on {sharding}"
    return f"{x.dtype}[{','.join(map(str, x.shape))}]{weak}{placed}"


def _shown(x: Any) -> str:
    """A setting; what has no text of its own (a function, an object) is told from others by its identity."""
    text = repr(x)
    return text if len(text) <= 200 else f"{text[:200]}... ({zlib.crc32(text.encode()):08x})"
