# SPDX-License-Identifier: Apache-2.0
"""Runs that give the same bits: a fingerprint of values, a switch, and the operations that are not reproducible."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from batiste.graph import Variable, iter_graph
from batiste.graph.boundary import is_root
from batiste.graph.errors import ArgumentError
from batiste.graph.jaxcompat import backends_started, key_name

from .calls import Around, Places, flat_function, open_call, part_types

__all__ = ["Fingerprint", "Unordered", "fingerprint", "nondeterministic", "reproducible"]

# ---------------------------------------------------------------- fingerprints


class Fingerprint(dict[str, str]):
    """`{path: hash}` of the values of a tree; `str` is one hash of all of them, equal exactly where all bits are."""

    def __str__(self) -> str:
        return _hash("\n".join(f"{path} {value}" for path, value in sorted(self.items())).encode())

    def diff(self, other: Fingerprint) -> dict[str, tuple[str | None, str | None]]:
        """The paths whose values differ, with both hashes; None where one of the two has nothing."""
        return {p: (self.get(p), other.get(p)) for p in sorted({*self, *other}) if self.get(p) != other.get(p)}

    def table(self) -> str:
        """A line per path, and one of all."""
        width = max(map(len, (*self, "all")))
        return "\n".join(f"{path:<{width}}  {value}" for path, value in (*self.items(), ("all", str(self))))


def fingerprint(tree: Any) -> Fingerprint:
    """Hashes of the bits, shapes and dtypes of all values in a tree: modules, optimizers, states, arrays.

    The same in every process and on every machine, whatever the sharding; 0.0 and -0.0 differ, and so do NaNs of
    different bits.

    >>> a, b = fingerprint({"w": np.zeros(2), "b": np.ones(2)}), fingerprint({"w": np.zeros(2), "b": np.ones(3)})
    >>> list(a.diff(b)), str(a) == str(b)
    (['b'], False)

    Raises:
        ArgumentError: a value is no array and no number.
    """
    return Fingerprint({"/".join(map(str, path)): _bits("/".join(map(str, path)), x) for path, x in _values(tree)})


def _values(tree: Any) -> Iterator[tuple[tuple, Any]]:
    for keys, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_root):
        path = tuple(map(key_name, keys))
        if not is_root(x):
            yield path, x
            continue
        for inner, part in iter_graph(x, graph=True):
            held = part.get_value() if isinstance(part, Variable) else part
            if isinstance(part, Variable) or not is_root(part):
                for more, value in jax.tree_util.tree_leaves_with_path(held):
                    if isinstance(part, Variable) or isinstance(value, (jax.Array, np.ndarray, np.generic)):
                        yield (*path, *inner, *map(key_name, more)), value


def _bits(path: str, x: Any) -> str:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _bits(path, jax.random.key_data(x))
    values = np.asarray(x)
    if values.dtype.hasobject or values.dtype.kind in "OUS":
        raise ArgumentError("only arrays and numbers have a fingerprint", at=path, got=type(x).__name__,
                            fix="give the state of the object: fingerprint(nnx.state(model))")  # fmt: skip
    return _hash(f"{values.dtype.name}{values.shape}".encode(), np.ascontiguousarray(values).tobytes())


def _hash(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


# ---------------------------------------------------------------- the switch

FLAGS = {"xla_gpu_deterministic_ops": "true", "xla_gpu_autotune_level": "0"}
CONFIG = {"jax_threefry_partitionable": True, "jax_default_prng_impl": "threefry2x32"}


@contextlib.contextmanager
def reproducible() -> Iterator[list[str]]:
    """Inside, equal programs on equal devices give equal bits; yields what could not be switched, as sentences.

    Sets the random numbers to `threefry2x32`, independent of the sharding, and XLA's flags for GPUs to deterministic
    operations without autotuning. XLA reads its flags once, when the first device is used: switch before that.
    On CPUs and TPUs nothing more is needed.

    >>> with reproducible() as notes:
    ...     key = jax.random.key(0)
    """
    before = {name: getattr(jax.config, name) for name in CONFIG}
    environment = os.environ.get("XLA_FLAGS")
    notes = []
    for name, value in CONFIG.items():
        jax.config.update(name, value)
    flags = environment or ""
    missing = [f"--{name}={value}" for name, value in FLAGS.items() if f"--{name}={value}" not in flags]
    if missing and not backends_started():
        os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    elif missing and jax.default_backend() == "gpu":
        notes.append(f"XLA has read its flags: start the program with XLA_FLAGS='{' '.join(missing)}'")
    try:
        yield notes
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        if environment is None:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = environment


# ---------------------------------------------------------------- operations without an order


@dataclass(frozen=True)
class Unordered:
    """An operation whose result may differ from run to run: its JAX name, part, user's line, and the reason."""

    operation: str
    module: str | None
    source: str | None
    why: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.module or 'no module'} ({self.source or 'no line'}): {self.why}"


ATOMIC = "adds with atomics on GPUs, in the order in which threads come; deterministic under xla_gpu_deterministic_ops"
OUTSIDE = "runs Python on the host, which may read clocks, files and random numbers"
NETWORK = "adds across devices, in an order that depends on their number and arrangement"
REASONS = {
    **dict.fromkeys(("scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "select_and_scatter_add"), ATOMIC),
    **dict.fromkeys(("pure_callback", "io_callback"), OUTSIDE),
    **dict.fromkeys(("psum", "psum2", "psum_invariant", "reduce_scatter"), NETWORK),
    "rng_bit_generator": "gives other numbers on other backends and XLA versions; use threefry2x32 keys",
    "rng_uniform": "gives other numbers on other backends and XLA versions; use threefry2x32 keys",
}


def nondeterministic(fn: Callable, *args: Any, **kwargs: Any) -> list[Unordered]:
    """The operations of `fn(*args)` that may give other bits in another run, each with its part, line and reason.

    Nothing is computed: `fn` is traced. Scatters of whole numbers and of indices known to be unique are in order.

    >>> [x.operation for x in nondeterministic(lambda x, i: x.at[i].add(1.0), jnp.zeros(3), jnp.array([0, 0]))]
    ['scatter-add']
    """
    boundary, groups = open_call(fn, args, kwargs, "nondeterministic")
    places = Places()
    with places.noted(part_types(fn, args, kwargs)):
        jaxpr = jax.make_jaxpr(flat_function(boundary))(*groups)
    return list(dict.fromkeys(_unordered(jaxpr.jaxpr, Around(), places)))


def _unordered(jaxpr: Any, around: Around, places: Places) -> Iterator[Unordered]:
    for eqn in jaxpr.eqns:
        here, name = around.at(eqn, places), eqn.primitive.name
        if name in REASONS and not _in_order(eqn):
            yield Unordered(name, here.module, here.source or here.inside, REASONS[name])
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _unordered(inner, here, places)


def _in_order(eqn: Any) -> bool:
    """Whether a scatter has nothing to put in order: sums of whole numbers, or one number per place."""
    if REASONS[eqn.primitive.name] is not ATOMIC:
        return False
    return eqn.params.get("unique_indices", False) or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
