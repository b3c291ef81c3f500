# SPDX-License-Identifier: Apache-2.0
"""A plan: a mesh, and rules that say where on it the values of a model live.

    with use(plan):                                  # values are made where they will live
        model = Model(rngs=Rngs(0))
        optimizer = Optimizer(model, tx, wrt=Param)  # its state follows the parameters

The model's text says nothing of it. A value is born spread over the devices, before its path is known, and is sent to
its place when the constructor of the whole model returns; no device ever holds more than its share and one such piece.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from batiste.graph import Pytree, RngState, Variable, iter_graph
from batiste.graph.birth import nursery
from batiste.graph.errors import ArgumentError, BatisteError, ShapeError
from batiste.graph.jaxcompat import Tracer, key_name
from batiste.graph.placement import Axes, logical_axis_rules, put, spec_of

from .nursery import Nursery
from .rules import (
    WHOLE_RULE,
    Decision,
    PathRules,
    all_axes,
    check,
    expanded,
    filled,
    fits,
    mesh_axes,
    shown,
    spread,
    suits,
    to_spec,
)
from .values import contents, is_made, is_optimizer_state, is_value, send

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])

OPEN = PartitionSpec.UNCONSTRAINED
NAMES = ("batch", "group", "length", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "expert", "layers")
"""Axis names that layers use: they mean whole, unless a plan says otherwise. Unknown ones are errors."""


class Pending(NamedTuple):
    """A Variable that has no place yet: a larger object that holds it may have a rule for its longer path."""

    variable: weakref.ref[Variable]
    error: BatisteError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the values of a model live.

    Args:
        mesh: the devices.
        names: what an axis name means, of a parameter (`out_sharding`) or of an activation (`constrain`).
        paths: pairs (glob, axes per dim) for parameters without axis names; the first that fits counts. `rules.py`
            says how they are written. The empty tuple means whole, on every device.
        fill: mesh axes that are put on the largest dim that they divide, besides what the rules say.
        least: parameters with fewer elements are not filled: sending them costs more than keeping them.
        batch: mesh axes of the first dim of a batch, and `sequence` those of its second.
        strict: a parameter of two or more dims that no rule speaks of is an error; otherwise it is filled, or stays
            whole. None: an error if there is nothing to fill with.

    Raises:
        ArgumentError: a rule uses an axis that the mesh has not.
    """

    mesh: Mesh
    names: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    paths: PathRules = ()
    fill: tuple[str, ...] = ()
    least: int = 4096
    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    strict: bool | None = None

    def __post_init__(self):
        group = tuple(axis for axis in self.batch if axis != "expert")
        usual = {"batch": self.batch or None, "group": group or None, "length": self.sequence or None}
        object.__setattr__(self, "names", {**dict.fromkeys(NAMES), **usual, **self.names})
        known = set(self.mesh.axis_names)
        for what, axes in (("fill", self.fill), ("batch", self.batch), ("sequence", self.sequence),
                           *((f"names[{name!r}]", (axes,)) for name, axes in self.names.items())):  # fmt: skip
            for axis in all_axes(axes):
                if axis not in known:
                    raise ArgumentError(f"{what} uses the axis {axis!r}, which the mesh has not",
                                        expected=f"one of {self.mesh.axis_names}")  # fmt: skip
        for glob, axes in self.paths:
            for entry in axes:
                if entry is not Ellipsis:
                    mesh_axes(entry, self.names, self.sizes, "", f"the rule for {glob!r}")

    def replace(self, **changes: Any) -> Plan:
        """A plan with other settings."""
        return dataclasses.replace(self, **changes)

    def with_rules(self, *paths: tuple[str, tuple]) -> Plan:
        """A plan in which these path rules come before its own."""
        return self.replace(paths=(*paths, *self.paths))

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    # ------------------------------------------------------------ where a value lives
    def decide(self, path: str, shape: tuple[int, ...], metadata: Mapping[str, Any] = {}) -> Decision:
        """The place of the value of this shape at this path, and the rule that says so.

        Raises:
            ArgumentError: no rule fits, or the rule names an unknown axis, or one axis twice.
            ShapeError: the rule does not fit the shape.
        """
        names = metadata.get("out_sharding")
        if isinstance(names, jax.sharding.Sharding) or hasattr(names, "sharding"):
            return Decision(spec_of(names) if hasattr(names, "spec") else PartitionSpec(), "its own sharding")
        if names:
            rule, axes, meanings = f"axis names {tuple(names)}", tuple(names), self._meanings(path, metadata)
            axes = axes[: len(shape)] if not any(axes[len(shape) :]) else axes
        else:
            found = next((rule for rule in self.paths if fits(rule[0], path) and suits(rule[1], len(shape))), None)
            if found is None:
                return self._unmatched(path, shape)
            rule, axes, meanings = f"path {shown(found[0], path)}", found[1], self.names
            if not axes or not shape:
                return Decision(PartitionSpec(), rule)
        each = [mesh_axes(e, meanings, self.sizes, path, rule) for e in expanded(axes, len(shape), path, rule)]
        check(each, shape, self.sizes, path, rule)
        return Decision(to_spec(filled(each, shape, self.fill, self.sizes, self.least)), rule)

    def _meanings(self, path: str, metadata: Mapping[str, Any]) -> Mapping[str, Axes]:
        own = dict(metadata.get("sharding_rules") or ())
        for name, axes in own.items():
            if self.names.get(name, axes) != axes:
                raise ArgumentError(
                    f"{name!r} means {axes!r} in the parameter's own sharding_rules, {self.names[name]!r} in the plan",
                    at=path, fix="take one of them out",
                )  # fmt: skip
        return {**self.names, **own}

    def _unmatched(self, path: str, shape: tuple[int, ...]) -> Decision:
        if len(shape) > 1 and (not self.fill if self.strict is None else self.strict):
            rank = next((axes for glob, axes in self.paths if fits(glob, path)), None)
            if rank is not None:
                raise ShapeError(f"a rule that fits has {len(rank)} entries, the value has {len(shape)} dims", at=path,
                                 fix=f"write one entry per dim, or (..., {', '.join(map(repr, rank))})")  # fmt: skip
            raise ArgumentError("no rule of the plan speaks of this parameter", at=path, got=f"shape {shape}",
                                fix=f"add one: plan.with_rules(({path!r}, ()))")  # fmt: skip
        spec = to_spec(filled([()] * len(shape), shape, self.fill, self.sizes, self.least))
        if self.fill:
            return Decision(spec, f"fill {' x '.join(self.fill)}" if spec else "too small to fill, or not divisible")
        return Decision(spec, WHOLE_RULE if len(shape) < 2 else "no rule: whole")

    def place_of(self, path: tuple, x: Any) -> Decision:
        """The place of a Variable, a box with axis names or an array, found at this path of a model or optimizer.

        Optimizer state has its parameter's place, unless it has another form. Random state is whole.
        """
        where = "/".join(map(str, path))
        value, metadata = contents(x)
        shape = tuple(value.shape if hasattr(value, "shape") else np.shape(value))
        if isinstance(x, RngState) or jax.numpy.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
            return Decision(PartitionSpec(), "random state stays whole")
        if not is_optimizer_state(path, x):
            return self.decide(where, shape, metadata)
        try:
            return self.decide(where, shape, metadata)
        except BatisteError:
            return Decision(PartitionSpec(), "optimizer state of another form")

    def shardings(self, tree: A) -> A:
        """The tree with a NamedSharding in the place of every Variable, box and array, as a prefix for `jax.jit`."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_value)
        places = [self.place_of(tuple(map(key_name, path)), x).spec for path, x in leaves]
        return treedef.unflatten([NamedSharding(self.mesh, spec) for spec in places])

    # ------------------------------------------------------------ putting values there
    def create(self, f: Callable[..., A], *args: Any, **kwargs: Any) -> A:
        """`f(*args)`, a tree, in one compiled program whose results are made where they will live.

        `plan.create(model.init, key, x)` gives the variables of a model of the functional face.
        """
        structure = []

        def leaves(args: Any, kwargs: Any) -> list[Any]:
            found, treedef = jax.tree.flatten(f(*args, **kwargs))
            structure.append(treedef)  # of this trace: settings in it, such as an optax transformation, may be new ones
            return found

        with _in_context(self):
            abstract = jax.eval_shape(lambda: f(*args, **kwargs))
            shardings = jax.tree.leaves(jax.tree.broadcast(self.shardings(abstract), abstract))
            made = jax.jit(leaves, out_shardings=shardings)(args, kwargs)
        return structure[-1].unflatten(made)

    def settle(self, root: Any, pending: dict[int, Pending] | None = None) -> None:
        """Sends every Variable of an object to its place; inside a trace, constrains it to be there.

        Args:
            pending: takes the Variables without a place, which are errors otherwise.
        """
        for path, x in list(iter_graph(root, graph=True)):
            if not isinstance(x, Variable) or not x._can_update or not is_made(x):
                continue
            try:
                sharding = NamedSharding(self.mesh, self.place_of(path, x).spec)
            except BatisteError as error:
                if pending is None:
                    raise
                pending[id(x)] = Pending(weakref.ref(x), error.with_traceback(None))  # frames would keep it alive
                continue
            if pending:
                pending.pop(id(x), None)
            send(x, sharding)

    def keep(self, step: F) -> F:
        """The step, after which every Variable of its arguments is where the plan says.

        `jit(plan.keep(step))` cannot return a parameter in another place than it came from, which would cost memory
        and a second compilation. A step that returns trees takes `jit(step, out_shardings=plan.shardings(tree))`.
        """

        @functools.wraps(step)
        def kept(*args: Any, **kwargs: Any) -> Any:
            with _in_context(self):
                out = step(*args, **kwargs)
            for x in jax.tree.leaves((args, kwargs), is_leaf=lambda x: isinstance(x, Pytree)):
                if isinstance(x, Pytree):
                    self.settle(x)
            return out

        return kept  # type: ignore[return-value]

    def batch_spec(self, ndim: int) -> PartitionSpec:
        """The place of a batch of this rank."""
        return to_spec([self.batch, self.sequence][:ndim])

    def shard_batch(self, batch: A) -> A:
        """A batch, each of its arrays divided over `batch` in dim 0 and over `sequence` in dim 1.

        Raises:
            ShapeError: a dim is no multiple of its devices.
        """
        return jax.tree.map(lambda x: put(x, NamedSharding(self.mesh, self.batch_spec(np.ndim(x)))), batch)

    def constrain(self, x: A, names: tuple) -> A:
        """`x` where these axis names say; mesh axes that a surrounding `shard_map` handles by hand are left out."""
        rule = f"constrain{tuple(names)}"
        mesh = jax.sharding.get_abstract_mesh() if isinstance(jax.tree.leaves(x)[0], Tracer) else self.mesh
        mesh = self.mesh.abstract_mesh if mesh.empty else mesh
        free = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}

        def one(leaf: Any) -> Any:
            entries = expanded(names, leaf.ndim, "", rule)
            each = [tuple(a for a in mesh_axes(e, self.names, self.sizes, "", rule) if a in free) for e in entries]
            check(each, leaf.shape, self.sizes, "", rule)
            spec = [OPEN if e is OPEN else a or None for e, a in zip(entries, each)]
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            if len(set(mesh.axis_types)) > 1:  # inside a shard_map over some of the axes
                explicit = AxisType.Explicit in mesh.axis_types
                return (
                    jax.sharding.reshard(leaf, sharding)
                    if explicit
                    else jax.lax.with_sharding_constraint(leaf, sharding)
                )
            return put(leaf, sharding) if free else leaf

        return jax.tree.map(one, x)

    # ------------------------------------------------------------ birth
    @functools.cached_property
    def _spreading(self) -> tuple[str, ...]:
        """The mesh axes that parameters may be divided by, the largest first."""
        used = {*self.fill, *all_axes(self.names.values())}
        used |= {a for _, axes in self.paths for e in axes if e is not Ellipsis
                 for a in mesh_axes(e, self.names, self.sizes, "", "")}  # fmt: skip
        return tuple(sorted(used, key=lambda axis: (-self.sizes[axis], axis)))

    def birthplace(self, shape: tuple[int, ...]) -> NamedSharding:
        """Where a value of this shape is made whose path is not known yet."""
        if self.fill and math.prod(shape) < self.least:
            return NamedSharding(self.mesh, PartitionSpec())
        return NamedSharding(self.mesh, spread(shape, self.sizes, self._spreading))


# ---------------------------------------------------------------- use
_plan: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plan", default=None)


def current_plan() -> Plan | None:
    """The plan in use."""
    return _plan.get()


@contextlib.contextmanager
def use(plan: Plan) -> Iterator[Plan]:
    """Inside, models are made where the plan says, `constrain` means it, and its mesh is that of `jax.set_mesh`.

    Raises:
        ArgumentError, ShapeError: at the end, if the plan has no place for a parameter that was made inside.
    """
    pending: dict[int, Pending] = {}
    token = nursery.set(Nursery(plan.birthplace, lambda root: plan.settle(root, pending)))
    try:
        with _in_context(plan):
            yield plan
    finally:
        nursery.reset(token)
    for variable, error in pending.values():
        if variable() is not None:
            raise error


@contextlib.contextmanager
def _in_context(plan: Plan) -> Iterator[None]:
    token = _plan.set(plan)
    try:
        with _mesh_context(plan.mesh), logical_axis_rules(tuple(plan.names.items())):
            yield
    finally:
        _plan.reset(token)


def _mesh_context(mesh: Mesh) -> Any:
    try:
        current = jax.sharding.get_mesh()
    except ValueError:  # inside a trace, where only the types of the axes can be set
        here = jax.sharding.get_abstract_mesh()
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if here.empty else contextlib.nullcontext()
    return contextlib.nullcontext() if current == mesh else jax.set_mesh(mesh)


def constrain_batch(x: A) -> A:
    """`x` with its first dim where the batch lives by the plan in use, where that divides it; the others are left open.

    Between the layers of a scan it keeps the compiler from dividing the features as the parameters are divided.
    """
    plan = current_plan()
    if plan is None or not plan.batch or AxisType.Explicit in plan.mesh.axis_types:
        return x
    parts = math.prod(plan.sizes[axis] for axis in plan.batch)

    def one(leaf: Any) -> Any:
        fits_batch = isinstance(leaf, Tracer) and leaf.ndim > 0 and leaf.shape[0] % parts == 0
        return plan.constrain(leaf, (plan.batch, *[OPEN] * (leaf.ndim - 1))) if fits_batch else leaf

    return jax.tree.map(one, x)


def constrain(x: A, names: tuple) -> A:
    """`x` where these axis names say by the plan in use; `x` itself where there is none.

    >>> constrain(jax.numpy.ones((2, 3)), ("batch", "embed")).shape
    (2, 3)
    """
    plan = current_plan()
    return x if plan is None else plan.constrain(x, names)
