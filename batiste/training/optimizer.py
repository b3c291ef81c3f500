# SPDX-License-Identifier: Apache-2.0
"""Optimizers: an optax transformation together with its state and the step count, updating a model in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from batiste import struct
from batiste.graph import (
    FlatState,
    GraphDef,
    Param,
    Pytree,
    State,
    Variable,
    as_pure,
    data,
    state,
    to_predicate,
    update,
)

from .match import match

__all__ = ["ModelAndOptimizer", "OptArray", "OptState", "OptVariable", "Optimizer", "TrainState", "to_opt_state"]

FIX = (
    "differentiate the same model with respect to the same Variables, as in "
    "nnx.grad(loss_fn, argnums=nnx.DiffState(0, optimizer.wrt))(model)"
)
M = TypeVar("M")
F = TypeVar("F", bound=Callable)


class OptState(Variable):
    """State of an optimizer."""


class OptArray(OptState):
    """State of an optimizer that belongs to no parameter, such as a count."""


class OptVariable(OptState):
    """State of an optimizer that belongs to a parameter, and has its metadata, such as a moment."""


def is_variable(x: Any) -> bool:
    return isinstance(x, Variable)


def to_opt_state(tree: Any) -> Any:
    """The tree with an `OptVariable` in the place of each Variable, and an `OptArray` in that of each other leaf.

    The metadata `optimizer_sharding` of a parameter says where its optimizer state lives, if that is somewhere else.
    """

    def convert(x: Any) -> OptState:
        if not is_variable(x):
            return OptArray(x)
        metadata = x.get_metadata()
        if "optimizer_sharding" in metadata:
            metadata["out_sharding"] = metadata.pop("optimizer_sharding")
        return OptVariable(x.get_value(), **metadata)

    return jax.tree.map(convert, tree, is_leaf=is_variable)


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates, in the dtypes of the parameters."""

    def apply(p: Any, u: Any) -> Any:
        return p if p is None or u is None else jnp.asarray(p + u).astype(jnp.asarray(p).dtype)

    return jax.tree.map(apply, params, updates, is_leaf=lambda x: x is None)


def _needs_wrt(init: F) -> F:
    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        if "wrt" not in kwargs:
            raise TypeError(
                "Missing required argument `wrt`.\n  Fix: say which Variables are trained, as in "
                "Optimizer(model, tx, wrt=Param)."
            )
        return init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def _needs_grads(update: F) -> F:
    @functools.wraps(update)
    def checked(self, *args, **kwargs):
        if len(args) == 1:
            raise TypeError(
                "Missing required argument `grads`.\n  Fix: pass the model and then its gradients, as in "
                "optimizer.update(model, grads)."
            )
        return update(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


class Optimizer(Pytree, Generic[M]):
    """params ← params + u, where u, opt_state ← tx.update(grads, opt_state, params)

    Args:
        model: the object that holds the parameters; it is not kept.
        tx: an optax transformation, or any object with its `init` and `update`.
        wrt: a filter that says which Variables are the parameters.
        graph: whether parts of the model may be shared; None takes the default.

    Attributes:
        step: the number of updates so far.
        opt_state: the state of `tx`, its leaves as `OptVariable` and `OptArray`.
    """

    @_needs_wrt
    def __init__(self, model: M, tx: Any, *, wrt: Any, graph: bool | None = None):
        self.graph = graph
        self.step = OptState(jnp.array(0, dtype=jnp.uint32))
        self.tx = tx
        self.opt_state = data(to_opt_state(tx.init(state(model, wrt, graph=graph))))
        self.wrt = to_predicate(wrt) if isinstance(wrt, (list, tuple)) else wrt  # a list could not be hashed

    @_needs_grads
    def update(self, model: M, grads: Any, /, **kwargs: Any) -> Any:
        """Updates the parameters of `model`, the optimizer's state and the step count, in place.

        Args:
            grads: one gradient per parameter: a State, a module of the same structure, or a nested dict.
            kwargs: passed on to `tx.update`, for transformations that take more than gradients.

        Returns:
            What was added to the parameters, as a State.

        Raises:
            StructureError: gradients and parameters do not fit; the message names the paths.
        """
        variables = state(model, self.wrt, graph=self.graph)
        pairs, treedef = jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_variable)
        paths = [tuple(entry.key for entry in keys) for keys, _ in pairs]
        values = [as_pure(x) for _, x in pairs]
        wanted = dict(zip(paths, values))

        def fitted(gradients: Any) -> Any:
            return treedef.unflatten(
                match(gradients, wanted, self.wrt, self.graph, what="Gradients and parameters", fix=FIX)
            )

        params, extra = treedef.unflatten(values), as_pure(kwargs)
        if isinstance(kwargs.get("grad"), Pytree):  # what optax's line searches call the gradients
            extra["grad"] = fitted(kwargs["grad"])
        updates, opt_state = self.tx.update(fitted(grads), as_pure(self.opt_state), params, **extra)
        params = apply_updates(params, updates)
        update(model, FlatState(zip(paths, treedef.flatten_up_to(params)), sort=False))
        jax.tree.map(lambda v, x: v.set_value(x), self.opt_state, opt_state, is_leaf=is_variable)
        self.step[...] += jnp.array(1, dtype=jnp.uint32)
        return updates


class ModelAndOptimizer(Optimizer[M]):
    """An `Optimizer` that keeps the model. Deprecated: use `Optimizer`, which is passed the model."""

    def __init__(self, model: M, tx: Any, *, wrt: Any = Param):
        super().__init__(model, tx, wrt=wrt)
        self.model = model

    def update(self, grads: Any, /, **kwargs: Any) -> Any:  # type: ignore[override]
        """Updates the model and the optimizer's state in place; see `Optimizer.update`."""
        return super().update(self.model, grads, **kwargs)


class TrainState(struct.PyTreeNode, Generic[M]):
    """A model in training as one frozen pytree: structure, parameters, optax state and step, for functional loops.

    Subclasses may declare more fields, such as a State of batch statistics.
    """

    graphdef: GraphDef
    params: State
    opt_state: Any
    step: jax.Array
    tx: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, graphdef: GraphDef, *, params: State, tx: Any, step: int = 0, **kwargs: Any):
        """The state before the first step."""
        step_array = jnp.asarray(step)
        return cls(graphdef=graphdef, params=params, opt_state=tx.init(params), step=step_array, tx=tx, **kwargs)

    def apply(self, state: State | str, *states: State | str):
        """Calls the model with States, given by themselves or by the names of fields: `ts.apply("params")(x)`.

        The result of the call comes with the pair (graphdef, state) after it.
        """
        chosen = (getattr(self, s) if isinstance(s, str) else s for s in (state, *states))
        return self.graphdef.apply(*chosen)  # type: ignore[attr-defined]

    def apply_gradients(self, grads: State, **kwargs: Any):
        """The state after one more step; `kwargs` replace other fields."""
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = apply_updates(self.params, updates)
        return self.replace(params=params, opt_state=opt_state, step=self.step + 1, **kwargs)
