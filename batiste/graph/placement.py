# SPDX-License-Identifier: Apache-2.0
"""Placement: where on a mesh of devices a new value will live.

A Variable's metadata may hold

    out_sharding     a name, a tuple of names, or None per dim: `("embed", "mlp")`; or a PartitionSpec, Sharding, Format
    sharding_rules   pairs (name, mesh axis or axes), which say what the names mean; added to the rules in context
    mesh             the mesh that is meant; otherwise the one of `jax.set_mesh`

and `place` puts a value there. Inside a trace, where a value has no place yet, it becomes a constraint on the program.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from .errors import ArgumentError, ShapeError
from .jaxcompat import Tracer
from .switch import Switch

Axes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, Axes]]
WHOLE = (Sharding, Format)


class use_eager_sharding(Switch, flag="flax_always_shard_variable"):
    """Whether a Variable with `out_sharding` is placed when it is made: sets it, also for a block or for one function.

    >>> with use_eager_sharding(False):
    ...     using_eager_sharding()
    False
    """


def using_eager_sharding() -> bool:
    """Whether a Variable with `out_sharding` is placed when it is made.

    >>> using_eager_sharding()
    True
    """
    return use_eager_sharding.current_value()


# ---------------------------------------------------------------- logical names -> mesh axes
class _Context(threading.local):
    rules: Rules = ()


_context = _Context()


def get_logical_axis_rules() -> Rules:
    """The rules in context: pairs of a logical name and the mesh axis or axes it stands for."""
    return _context.rules


def set_logical_axis_rules(rules: Rules) -> None:
    """Sets the rules of this thread from here on."""
    _context.rules = rules


@contextmanager
def logical_axis_rules(rules: Rules) -> Iterator[None]:
    """Sets the rules for a block; they replace those outside it.

    >>> with logical_axis_rules((("embed", None), ("mlp", "model"))):
    ...     spec_of(("embed", "mlp"))
    P(None, 'model')
    """
    before = _context.rules
    set_logical_axis_rules(rules)
    try:
        yield
    finally:
        set_logical_axis_rules(before)


def _meanings(own: Rules | None) -> dict[str, Axes]:
    """What each name means: the rules in context and the Variable's own, which must not contradict them."""
    try:
        meanings, mine = dict(_context.rules or ()), dict(own or ())
    except (TypeError, ValueError):
        raise ArgumentError(
            "malformed logical axis rules", got=repr(own or _context.rules), expected="pairs (name, mesh axis or axes)",
            fix="write (('embed', None), ('mlp', 'model'))",
        ) from None  # fmt: skip
    for name, axes in mine.items():
        if meanings.setdefault(name, axes) != axes:
            raise ArgumentError(
                f"Inconsistent logical axis annotations for {name}: {meanings[name]} vs {axes}",
                fix="give the name one meaning, in logical_axis_rules or in the sharding_rules of the Variable",
            )
    return meanings


def spec_of(names: Any, rules: Rules | None = None) -> PartitionSpec:
    """The PartitionSpec of `out_sharding` metadata, its names looked up in the rules; unknown names are mesh axes.

    >>> spec_of(("embed", ("mlp", "heads")), rules=(("embed", None), ("mlp", "model")))
    P(None, ('model', 'heads'))
    """
    if isinstance(names, Format):
        names = names.sharding
    if isinstance(names, NamedSharding):
        return names.spec
    if names is None:
        return PartitionSpec()
    if not isinstance(names, (tuple, list, PartitionSpec)):
        raise ArgumentError(
            "out_sharding is malformed", got=repr(names), expected="a tuple with a name or None per dim",
            fix=f"write ({names!r},)" if isinstance(names, str) else None,
        )  # fmt: skip
    meanings = _meanings(rules)
    return PartitionSpec(*(_meaning(entry, meanings) for entry in names))


def _meaning(entry: Any, meanings: Mapping[str, Axes]) -> Any:
    if isinstance(entry, str):
        return meanings.get(entry, entry)
    if isinstance(entry, (tuple, list)):
        several = [_meaning(name, meanings) for name in entry]
        return tuple(a for axes in several if axes is not None for a in (axes if isinstance(axes, tuple) else (axes,)))
    return entry  # None, or PartitionSpec.UNCONSTRAINED


# ---------------------------------------------------------------- names -> places
def current_mesh() -> Mesh | AbstractMesh:
    """The mesh of `jax.set_mesh` (its devices included, where no program is being traced); empty if there is none."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # inside a trace
        return jax.sharding.get_abstract_mesh()
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def sharding_of(metadata: Mapping[str, Any], mesh: Mesh | AbstractMesh | None = None) -> Sharding | Format:
    """The Sharding that a Variable's metadata ask for, on `mesh`, the metadata's own mesh, or the one in context.

    Raises:
        ArgumentError: there is no mesh, or it lacks an axis.
    """
    names = metadata.get("out_sharding")
    if isinstance(names, WHOLE):
        return names
    spec = spec_of(names, metadata.get("sharding_rules"))
    if mesh is None:
        mesh = metadata.get("mesh")
    if mesh is None:
        mesh = current_mesh()
    if mesh.empty and spec:
        raise ArgumentError(
            f"An auto mesh context or metadata is required if creating a variable with annotation out_sharding={spec}",
            fix="create the model inside `with jax.set_mesh(mesh):`, or give the Variable mesh=mesh; "
                "nnx.use_eager_sharding(False) leaves values where they are",
        )  # fmt: skip
    return on_mesh(mesh, spec)


def on_mesh(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> NamedSharding:
    """`NamedSharding(mesh, spec)`.

    Raises:
        ArgumentError: the mesh has no such axis.
    """
    axes = [a for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(a, str)]
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ArgumentError(
                f"Resource axis: {axis} of {spec} is not found in mesh: {tuple(mesh.axis_names)}",
                fix=f"name a mesh axis, or say what it stands for with logical_axis_rules((({axis!r}, None), ...))",
            )
    return NamedSharding(mesh, spec)


def place(value: Any, metadata: Mapping[str, Any]) -> Any:
    """`value`, each of its arrays where `out_sharding` of these metadata says; unchanged where it says nothing.

    Raises:
        ArgumentError: there is no mesh, or it lacks an axis.
    """
    names = metadata.get("out_sharding")
    if not isinstance(names, WHOLE) and not names:
        return value
    sharding = sharding_of(metadata)
    return jax.tree.map(lambda leaf: put(leaf, sharding), value)


def put(x: Any, sharding: Sharding | Format) -> Any:
    """`x` under this sharding: moved if it is an array, constrained if it is traced, annotated if it is abstract."""
    if not isinstance(sharding, NamedSharding):
        return jax.lax.with_sharding_constraint(x, sharding) if isinstance(x, Tracer) else jax.device_put(x, sharding)
    sharding = _fitted(sharding, jax.numpy.shape(x))
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=sharding)
    explicit = _is_explicit(sharding.mesh)
    if not isinstance(x, Tracer) and not isinstance(sharding.mesh, AbstractMesh):
        return jax.device_put(x, _settled(sharding, jax.numpy.ndim(x), explicit))
    return jax.sharding.reshard(x, sharding) if explicit else jax.lax.with_sharding_constraint(x, sharding)


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether shardings are a part of the types on this mesh, or left to the compiler.

    Raises:
        ArgumentError: the mesh has axes of several types, or manual ones.
    """
    kinds = set(mesh.axis_types)
    if len(kinds) != 1 or not kinds <= {AxisType.Auto, AxisType.Explicit}:
        raise ArgumentError(
            "Mesh must have all axes as Explicit or all axes as Auto", got=f"axis_types={mesh.axis_types}",
            fix="make the mesh with one axis type, or the Variable with eager_sharding=False",
        )  # fmt: skip
    return kinds == {AxisType.Explicit}


def _fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without entries for dims that the shape has not, where these say nothing.

    Raises:
        ShapeError: they say something, or a dim cannot be divided as it should.
    """
    spec, sizes = sharding.spec, sharding.mesh.shape
    if any(entry is not None for entry in spec[len(shape) :]):
        raise ShapeError(f"a value of rank {len(shape)} cannot be sharded as {spec}", got=f"shape {shape}",
                         expected=f"at least {len(spec)} dims", fix="give out_sharding one entry per dim")  # fmt: skip
    for dim, (size, axes) in enumerate(zip(shape, spec)):
        parts = math.prod(sizes[a] for a in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(a, str))
        if size % parts:
            raise ShapeError(
                f"the dimension size of dim {dim} is not divisible by the {parts} devices of mesh axis {axes!r}",
                got=f"shape {shape}", expected=f"a multiple of {parts}", fix="write None for this dim, or pad it",
            )  # fmt: skip
    return sharding if len(spec) <= len(shape) else NamedSharding(sharding.mesh, PartitionSpec(*spec[: len(shape)]))


def _settled(sharding: NamedSharding, ndim: int, explicit: bool) -> NamedSharding:
    """A sharding that an array can be moved to: nothing left open, and on explicit axes one entry per dim."""
    spec = [None if entry is PartitionSpec.UNCONSTRAINED else entry for entry in sharding.spec]
    if explicit:
        spec += [None] * (ndim - len(spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
