# SPDX-License-Identifier: Apache-2.0
"""What a module can do with the variables and random streams of its scope, while it is bound to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from batiste.errors import NameInUseError
from batiste.graph.errors import ArgumentError

from .calls import given_out
from .parts import Part
from .scope import Scope, Variable


class Bound(Part):
    """A part with variables: all of this raises while there is no scope."""

    def _bound(self, problem: str) -> Scope:
        if self.scope is None:
            raise ArgumentError(f"{problem} on unbound modules", at=type(self).__name__,
                                fix="use it inside init() or apply(), or bind the module first")  # fmt: skip
        return self.scope

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the root to this module."""
        return self._bound("Can't access module paths").path

    @property
    def variables(self) -> Mapping[str, Mapping[str, Any]]:
        """The variables of this module and of those below it."""
        return given_out(self._bound("Can't access variables").variables())

    def _new_name(self, kind: str, plural: str, name: str, col: str) -> Scope:
        scope = self._bound(f"Can't create {plural.lower()}")
        if not self._initialization_allowed:
            problem = f"{plural} must be initialized in `setup()` or in a method wrapped in `@compact`"
            raise ArgumentError(problem, at=scope.path_text,
                                fix="move it into setup(), or decorate the method with @compact")  # fmt: skip
        if scope.name_reserved(name, col):
            raise NameInUseError(kind, name, type(self).__name__)
        return scope

    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> Any:
        """The parameter `name`; `init_fn(key, *init_args)` makes it."""
        scope = self._new_name("param", "Parameters", name, "params")
        return scope.param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)

    def variable(self, col: str, name: str, init_fn: Callable[..., Any] | None = None, *init_args: Any,
                 unbox: bool = True, **init_kwargs: Any) -> Variable:  # fmt: skip
        """The variable `name` of collection `col`; `init_fn(*init_args)` gives its first value."""
        scope = self._new_name("variable", "Variables", name, col)
        return scope.variable(col, name, init_fn, *init_args, unbox=unbox, **init_kwargs)

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """The value of a variable, or `default`."""
        return self._bound("Can't access variables").get_variable(col, name, default)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Writes a variable, or makes it."""
        self._bound("Can't access variables").put_variable(col, name, value)

    def has_variable(self, col: str, name: str) -> bool:
        """Whether the variable exists."""
        return self._bound("Can't access variables").has_variable(col, name)

    def is_mutable_collection(self, col: str) -> bool:
        """Whether the collection may be written in this call."""
        return self._bound("Can't check mutability").is_mutable_collection(col)

    def is_initializing(self) -> bool:
        """Whether this call is an `init`."""
        return self._bound("Can't check if running under init()").get_flag("initializing", False)

    def has_rng(self, name: str) -> bool:
        """Whether the call has a random stream of this name."""
        return self._bound("Can't query for RNGs").has_rng(name)

    def make_rng(self, name: str = "params") -> jax.Array:
        """The next key of a random stream; `params` stands in for one that is missing."""
        return self._bound("Can't use RNGs").make_rng(name)

    def sow(self, col: str, name: str, value: Any, reduce_fn: Callable[..., Any] = lambda xs, x: xs + (x,),
            init_fn: Callable[[], Any] = lambda: ()) -> bool:  # fmt: skip
        """Adds `value` to a variable, if its collection may be written; says whether.

        Args:
            reduce_fn: `reduce_fn(what there is, value)` is stored; by default values are gathered in a tuple.
            init_fn: what there is at first.
        """
        scope = self._bound("Can't store variables")
        if not scope.is_mutable_collection(col):
            return False
        if scope.has_variable(col, name):
            seen = scope.get_variable(col, name)
        else:
            scope.reserve(name, col)
            seen = init_fn()
        scope.put_variable(col, name, reduce_fn(seen, value))
        return True

    def perturb(self, name: str, value: Any, collection: str = "perturbations") -> Any:
        """value + the variable `name`, which is zero: its gradient is that of `value`."""
        scope = self._bound("Can't store variables")
        if not scope.has_variable(collection, name):
            if not scope.is_mutable_collection(collection):
                if not scope.knows(collection):
                    return value
                problem = f"Perturbation collection {collection} present, but missing perturbation variable {name}"
                raise ArgumentError(problem, at=scope.path_text,
                                    fix="initialise the model anew, or leave the collection out")  # fmt: skip
            scope.reserve(name, collection)
            scope.put_variable(collection, name, jax.tree.map(jnp.zeros_like, value))
        return jax.tree.map(jnp.add, value, scope.get_variable(collection, name))
