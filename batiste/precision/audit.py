# SPDX-License-Identifier: Apache-2.0
"""Which operations of a model run in which dtype, and where values silently became wider, by module path."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from batiste.graph import Pytree, as_pure, iter_graph, merge, split
from batiste.graph.text import table
from batiste.graph.watch import watching

from .policy import KEEP, fitting

Path = tuple[Any, ...]
JAX = (str(File(jax.__file__).parent), str(File(__file__).parent.parent / "graph"))
OWN = str(File(__file__).parent)
PROMOTION, PRODUCT = "promote_dtype", "fp8"  # of this package
ASKED_BY = ("astype", "asarray", "array", "convert_element_type", PRODUCT)
MOVES = ("broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "copy", "stop_gradient", "neg")
SUMS = ("reduce_", "cum", "argmax", "argmin")

_count = itertools.count()


class Upcast(NamedTuple):
    """A value that became wider.

    Args:
        path: of the module in which it happened.
        dtype, to: from which dtype to which.
        shape: of the value.
        operation: what the program called there: `add` for an addition of two dtypes.
        line: where, as `file.py:12`.
        kind: `mixed` if the value met a wider one and JAX or a layer widened it silently; `summed` if it was widened
            to be summed; `kept` if the module is one that is kept wide; `asked` if the program says so (`x.astype`);
            `gradient` if it is the gradient of a value that the program made narrow, such as a parameter.
    """

    path: str
    dtype: str
    to: str
    shape: tuple[int, ...]
    operation: str
    line: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found; printed, two tables.

    Args:
        operations: by path, the number of operations that compute in each float dtype.
        products: by path, the number of matrix products and convolutions, by the dtypes of their operands.
        upcasts: all of them, in the order of the program.
    """

    operations: dict[str, collections.Counter[str]]
    products: dict[str, collections.Counter[str]]
    upcasts: tuple[Upcast, ...]

    @property
    def silent(self) -> tuple[Upcast, ...]:
        """The upcasts that nobody asked for."""
        return tuple(x for x in self.upcasts if x.kind == "mixed")

    def __str__(self) -> str:
        rows = [("path", "operations", "products")]
        for path, counts in self.operations.items():
            rows.append((path or ".", _counted(counts), _counted(self.products.get(path, {}))))
        casts = [("upcast at", "from", "to", "shape", "by", "line", "kind")]
        casts += [(x.path or ".", x.dtype, x.to, str(list(x.shape)), x.operation, x.line, x.kind)
                  for x in self.upcasts]  # fmt: skip
        return f"{table(rows)}\n\n{table(casts)}\n\n{len(self.silent)} silent upcasts"


def _counted(counts: Any) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def audit(f: Any, *args: Any, keep: Iterable[str] = KEEP, **kwargs: Any) -> Audit:
    """Which operations of `f(*args, **kwargs)` run in which dtype, by module path, and what became wider where

    The call is traced on shapes alone, and no object is changed. Integers and booleans are not counted.

    Args:
        f: a module, or a function of modules and arrays: the loss of a batch, or its gradient.
        args, kwargs: `jax.ShapeDtypeStruct`s will do.
        keep: patterns of modules that are meant to compute in a wide dtype, as of a `Policy`.

    >>> from batiste import nnx
    >>> from batiste.precision import policy
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.layer, self.table = nnx.Linear(2, 2, rngs=rngs), jnp.ones((1, 2))
    ...
    ...     def __call__(self, x):
    ...         return self.layer(x + self.table)
    >>> found = audit(policy("bfloat16")(Model(nnx.Rngs(0))), jnp.ones((3, 2), jnp.bfloat16))
    >>> [(x.operation, x.dtype, x.to) for x in found.silent]
    [('add', 'bfloat16', 'float32')]
    """
    graphdef, leaves = split((f, args, kwargs), graph=True)
    tags = Tags(keep)

    def traced(values: Any) -> Any:
        f, args, kwargs = merge(graphdef, values)
        types = {type(x) for _, x in iter_graph((f, args, kwargs), graph=True) if isinstance(x, Pytree)}
        with watching(types, tags.report):
            out = f(*args, **kwargs)
        return [x for x in jax.tree.leaves(as_pure(split(out, graph=True)[1])) if isinstance(x, jax.Array)]

    with set_xla_metadata(audit=next(_count)):  # a context of its own: JAX remembers no trace without tags for it
        jaxpr = jax.make_jaxpr(traced)(as_pure(leaves)).jaxpr
    operations: dict[str, collections.Counter[str]] = {}
    products: dict[str, collections.Counter[str]] = {}
    upcasts = []
    for step in _steps(jaxpr):
        (eqn, path), found = step[:2], _upcast(step)
        if found is not None:
            upcasts.append(found._replace(kind="kept") if path in tags.kept else found)
        dtypes = [_dtype(v) for v in (*eqn.invars, *eqn.outvars) if _is_float(v)]
        if not dtypes or eqn.primitive.name == "convert_element_type":
            continue
        operations.setdefault(path, collections.Counter())[_widest(dtypes)] += 1
        if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            products.setdefault(path, collections.Counter())[" x ".join(dtypes[:2])] += 1
    return Audit(operations, products, tuple(upcasts))


# ---------------------------------------------------------------- paths
class Tags:
    """Marks what modules trace with their paths: operations carry the tag of the innermost module that is running.

    A module that is not a part of one that ran before is a root (a policy's copy of a model is one); in a loop over
    layers, a layer has the path of the first part of its class.
    """

    def __init__(self, keep: Iterable[str]):
        self.keep = tuple(keep)
        self.kept: set[str] = set()
        self._of: dict[int, tuple[Path, Any]] = {}  # with the module: its id must not be given to another
        self._running: list[tuple[Path, Any]] = []

    def report(self, part: Any, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if id(part) not in self._of:
            self._learn(part)
        path, _ = self._of[id(part)]
        self._running.append((path, part))
        try:
            with jax.named_scope(f"[{_joined(path)}]"):
                return function(part, *args, **kwargs)
        finally:
            self._running.pop()

    def _learn(self, part: Any) -> None:
        base: Path = ()
        if self._running:
            base, caller = self._running[-1]
            alike = [path for path, x in iter_graph(caller, graph=True) if path and type(x) is type(part)]
            base = (*base, *min(alike, key=len, default=()))
        for path, x in iter_graph(part, graph=True):
            if isinstance(x, Pytree):
                self._of.setdefault(id(x), ((*base, *path), x))
        self.kept |= {_joined((*base, *path)).replace("|", "/") for path in fitting(part, self.keep)}

    @staticmethod
    def path_of(stack: str, inside: str) -> str:
        """The path in the innermost tag of a name stack; without tags, its names (of modules of the functional face)"""
        found = re.findall(r"\[([^\]]*)\]", stack)
        if found:
            return found[-1].replace("|", "/")
        names = [x for x in re.split(r"[/()]", stack) if x and x not in TRANSFORMS]
        return inside or "/".join(names)


TRANSFORMS = ("jvp", "transpose", "vmap", "remat", "checkpoint", "rematted_computation", "jit", "pjit", "scan", "while",
              "body", "cond")  # fmt: skip


def _joined(path: Path) -> str:
    return "|".join(map(str, path))


# ---------------------------------------------------------------- equations
class Step(NamedTuple):
    """An equation that computes, its path, whether it belongs to a gradient, and the equations that use its result."""

    eqn: Any
    path: str
    backward: bool
    uses: list[Any]


def _steps(jaxpr: Any, inside: str = "", backward: bool = False) -> Iterator[Step]:
    """All equations of a jaxpr and of those in it."""
    users = collections.defaultdict(list)
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if isinstance(v, jex.Var):
                users[v].append(eqn)
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        path, back = Tags.path_of(stack, inside), backward or "transpose(" in stack
        inner = list(jex.jaxprs_in_params(eqn.params))
        for below in inner:
            yield from _steps(below, path, back)
        if not inner:
            yield Step(eqn, path, back, _uses(eqn, users))


def _uses(eqn: Any, users: Any) -> list[Any]:
    """The equations that compute with a result; what only moves values is passed over."""
    found, todo = [], list(eqn.outvars)
    while todo:
        for user in users.get(todo.pop(), ()):
            if user.primitive.name in MOVES:
                todo += user.outvars
            else:
                found.append(user)
    return found


def _dtype(v: Any) -> str:
    return str(v.aval.dtype)


def _is_float(v: Any) -> bool:
    return hasattr(v.aval, "dtype") and jnp.issubdtype(v.aval.dtype, jnp.floating)


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def _widest(dtypes: Iterable[str]) -> str:
    return max(dtypes, key=_bits)


def _upcast(step: Step) -> Upcast | None:
    """The upcast that an equation is: a conversion to a wider dtype, or a product of two dtypes."""
    eqn, path, backward, uses = step
    floats = [v for v in eqn.invars if _is_float(v)]
    name = eqn.primitive.name
    if name == "convert_element_type" and floats and _is_float(eqn.outvars[0]):
        narrow, wide = eqn.invars[0], eqn.outvars[0]
        called, line = _called(eqn)
        kind = "mixed"
        if uses and all(use.primitive.name.startswith(SUMS) for use in uses):
            kind = "summed"
        elif backward:
            kind = "gradient"
        elif called in ASKED_BY:
            kind = "asked"
    elif name in ("dot_general", "conv_general_dilated") and len({_dtype(v) for v in floats}) > 1:
        narrow, wide = sorted(floats, key=lambda v: _bits(v.aval.dtype))[:: len(floats) - 1][:2]
        (called, line), kind = _called(eqn), "mixed"
    else:
        return None
    if _bits(narrow.aval.dtype) >= _bits(wide.aval.dtype):
        return None
    return Upcast(path, _dtype(narrow), _dtype(wide), tuple(narrow.aval.shape), called or name, line, kind)


def _called(eqn: Any) -> tuple[str, str]:
    """The function of JAX that the program called to get this equation, and the line of the program."""
    called = ""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        file = frame.file_name
        if file.startswith(OWN):
            called = PROMOTION if "promote" in frame.function_name else PRODUCT
        elif not file.startswith(JAX):
            return called, f"{File(file).name}:{frame.line_num}"
        elif called not in (PROMOTION, PRODUCT):
            called = _plain(frame.function_name) or called
    return called, ""


INNER = ("reraise_with_filtered_traceback", "cache_miss", "__call__", "wrapper", "deferring_binary_op", "op", "fun",
         "meth", "wrapped", "_cpp_pjit", "api_boundary")  # fmt: skip


def _plain(function: str) -> str:
    """`add` for `_operator_add`; empty for what stands around every call."""
    name = function.rsplit(".", 1)[-1]
    if name in INNER or name.startswith("<"):
        return ""
    return name.removeprefix("_operator_").removeprefix("_array_").strip("_")
