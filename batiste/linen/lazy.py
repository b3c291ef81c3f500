# SPDX-License-Identifier: Apache-2.0
"""Layers of the functional face: object layers, built when the first input tells their sizes.

A `Lazy` module holds the settings of an object layer. Called, it builds the layer without values (once for every
combination of settings), gives each of its Variables the value that the scope holds under the same path, runs the
layer, and writes back what the layer has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax

from batiste.errors import ModifyScopeVariableError
from batiste.graph import Pytree
from batiste.graph import Variable as Cell
from batiste.graph.birth import Recipe, describing, drawn

from .context import running
from .dtypes import of_tuple
from .module import Module, nowrap
from .scope import Scope, unboxed

Path = tuple[str, ...]


class _Undrawn:
    """Streams for a layer that draws nothing while it is described."""

    @staticmethod
    def params() -> None:
        return None


def _describe(of: type, settings: tuple[tuple[str, Any], ...]) -> Any:
    """The layer with Recipes in place of values."""
    with jax.ensure_compile_time_eval(), describing():  # it is remembered: it must belong to no trace
        return of(**dict(settings), rngs=_Undrawn) if "rngs" in parameters(of) else of(**dict(settings))


_remembered = functools.lru_cache(maxsize=1024)(_describe)  # bounded: it keeps initialisers and what they close over


@functools.cache
def parameters(of: type) -> frozenset[str]:
    """The names of the constructor's arguments, with those that it hands on to its base."""
    return frozenset(
        name for cls in of.__mro__ if "__init__" in vars(cls) for name in inspect.signature(cls.__init__).parameters
    )


def describe(of: type, settings: Mapping[str, Any]) -> Any:
    items = tuple(settings.items())
    try:
        hash(items)
    except TypeError:  # such as a mask, which is an array
        return _describe(of, items)
    return _remembered(of, items)


class Loan:
    """A scope's variable while it is in a layer.

    Args:
        cell: the layer's Variable, which holds the value without boxes and in the layer's shape.
    """

    __slots__ = ("scope", "collection", "name", "cell", "before")

    def __init__(self, scope: Scope, name: str, described: Cell, shape: tuple[int, ...] | None):
        recipe: Recipe = described.get_raw_value()
        self.scope, self.collection, self.name = scope, described.collection, name
        shape = recipe.shape if shape is None else shape
        value = _born(scope, self.collection, name, recipe, shape)
        self.before = value.reshape(recipe.shape) if shape != recipe.shape else value
        self.cell = type(described)(self.before)

    def settle(self) -> None:
        """Writes the value back, if the layer has changed it. While a model is initialised, statistics stay put.

        Raises:
            ModifyScopeVariableError: the collection may not be written.
        """
        value = self.cell.get_raw_value()
        if value is self.before or self.scope.get_flag("initializing"):
            return
        if not self.scope.is_mutable_collection(self.collection):
            raise ModifyScopeVariableError(self.collection, self.name, self.scope.path_text)
        old = unboxed(self.scope.get_variable(self.collection, self.name))
        self.scope.put_variable(self.collection, self.name, value.reshape(old.shape))


def _born(scope: Scope, col: str, name: str, recipe: Recipe, shape: tuple[int, ...]) -> Any:
    """The value that the scope holds, without boxes; it is made where there is none."""
    if scope.has_variable(col, name):
        value = scope.get_variable(col, name)
        if col == "params":
            scope.check_shapes(
                name, value, recipe if shape == recipe.shape else Recipe(recipe.init, shape, recipe.dtype, True)
            )
        return unboxed(value)
    if col == "params":
        scope.check_can_make(name)
        made = drawn(recipe.init, scope.make_rng("params"), shape, recipe.dtype)
        scope.put_variable(col, name, made)
    else:
        scope.variable(col, name, lambda: recipe.init(None, shape, recipe.dtype))
        made = scope.get_variable(col, name)
    return unboxed(made)


def instantiate(
    described: Any,
    scope: Scope,
    shapes: Mapping[str, tuple[int, ...]],
    loans: list[Loan],
    parts: Mapping[str, Any] = {},
) -> Any:
    """A copy of the layer with the scope's values; parts of the layer find theirs in scopes of their names.

    Args:
        parts: what stands in the place of parts of the layer.
    """
    layer = described.__copy__()
    if running.told_of_layers is not None:
        running.told_of_layers(layer, scope)
    attributes = vars(layer)
    for name, value in vars(described).items():
        if name in parts:
            attributes[name] = parts[name]
        elif isinstance(value, Cell) and isinstance(value.get_raw_value(), Recipe):
            loan = Loan(scope, name, value, shapes.get(name))
            loans.append(loan)
            attributes[name] = loan.cell
        elif isinstance(value, Pytree):
            attributes[name] = instantiate(value, scope.push(name, reuse=True), {}, loans)
    return layer


def replaced(given: Any, cls: Any, default: Any) -> Any:
    """The function that multiplies: made by `cls`, or given, or the layer's own."""
    made = cls() if cls is not None else given
    return default if made is None else made


def _part(module: Any) -> Callable[..., Any]:
    """A module as a part of an object layer, which may ask for a sharding that this face gives by other means."""
    return lambda *args, out_sharding=None, **kwargs: module(*args, **kwargs)


class Lazy(Module):
    """An object layer whose sizes its first input tells. Fields with the names of its arguments are passed on to it."""

    _of: ClassVar[Any]

    def __init_subclass__(cls, of: type | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if of is not None:
            cls._of = of

    @nowrap
    def settings(self, **sizes: Any) -> dict[str, Any]:
        """The arguments of the layer's constructor: fields of the same name, and `sizes`."""
        known = parameters(self._of)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in known}  # type: ignore[arg-type]
        if "promote_dtype" in fields:
            fields["promote_dtype"] = of_tuple(fields["promote_dtype"])
        return {**fields, **sizes}

    @nowrap
    def run(self, settings: Mapping[str, Any], *args: Any, method: str = "__call__", parts: Mapping[str, Any] = {},
            shapes: Mapping[str, tuple[int, ...]] = {}, options: Mapping[str, Any] = {},
            **kwargs: Any) -> Any:  # fmt: skip
        """The result of a method of the layer.

        Args:
            settings: of the layer's constructor.
            shapes: of the variables whose shape in the scope is another one than in the layer.
            parts: modules, or functions, that stand in the place of parts of the layer.
            options: attributes of the layer that its constructor does not take.
        """
        parts = {name: _part(x) if isinstance(x, Module) else x for name, x in parts.items()}
        loans: list[Loan] = []
        layer = instantiate(describe(self._of, settings), self.scope, shapes, loans, parts)  # type: ignore[arg-type]
        vars(layer).update(options)
        y = getattr(layer, method)(*args, **kwargs)
        for loan in loans:
            loan.settle()
        return y
