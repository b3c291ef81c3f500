# SPDX-License-Identifier: Apache-2.0
"""Module: the base class of layers and models, and the containers that are modules themselves."""

from __future__ import annotations

import inspect
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .errors import ArgumentError
from .filters import Filter, to_predicates
from .pytree import Pytree
from .represent import Layout
from .variable import Intermediate, Perturbation, Variable, variable_type_from_name
from .walk import iter_children, iter_graph

A = TypeVar("A")
B = TypeVar("B")

CAPTURES = "__captures__"


def _append(old: tuple, new: Any) -> tuple:
    return (*old, new)


def _nothing() -> tuple:
    return ()


class Capturing(threading.local):
    """The stack of running `capture` calls; sow and perturb write to the hidden attribute of the captured modules."""

    def __init__(self):
        self.depth = 0


capturing = Capturing()


def _kind(variable_type: type[Variable] | str) -> type[Variable]:
    if isinstance(variable_type, str):
        return variable_type_from_name(variable_type, base=Intermediate, allow_register=True)
    return variable_type


class Module(Pytree):
    """Base class of layers and models.

    >>> from batiste.graph.variable import Param
    >>> class Scale(Module):
    ...     def __init__(self, rngs=None):
    ...         self.scale = Param(jnp.ones(()))
    ...     def __call__(self, x):
    ...         return x * self.scale
    >>> float(Scale()(3.0))
    3.0
    """

    def sow(self, variable_type: type[Variable[B]] | str, name: str, value: A,
            reduce_fn: Callable[[B, A], B] = _append, init_fn: Callable[[], B] = _nothing) -> bool:  # type: ignore[assignment]  # fmt: skip
        """Records an intermediate value under `name`; by default the values of several calls form a tuple.

        Inside `nnx.capture` the values are collected there. Outside they stay in an attribute, which is deprecated.

        Returns:
            Whether it was recorded: False inside a capture that does not ask for this type.
        """
        kind = _kind(variable_type)
        captured = self.__dict__.get(CAPTURES)
        if captured is not None:
            for box in captured:
                if type(box) is kind:
                    return _record(box, name, value, reduce_fn, init_fn)
            return False
        if capturing.depth:
            return False
        old = self._recorded(name, kind)
        warnings.warn(
            "Using 'Module.sow()' outside of 'nnx.capture()' is deprecated: its values then stay in attributes of "
            "the module.",
            DeprecationWarning,
            stacklevel=2,
        )
        if old is not None:
            old.set_value(reduce_fn(old.get_value(), value))
        else:
            setattr(self, name, kind(reduce_fn(init_fn(), value)))
        return True

    def _recorded(self, name: str, kind: type[Variable]) -> Variable | None:
        """The Variable that `sow` and `perturb` have left under a name."""
        old = getattr(self, name, None)
        if old is not None and not isinstance(old, Variable):
            raise ValueError(f"Expected '{name}' to be a Variable, got {type(old).__name__}")
        if old is not None and type(old) is not kind:
            raise ValueError(f"Expected '{name}' to be of type '{kind.__name__}', got '{type(old).__name__}'")
        return old

    def perturb(self, name: str, value: Any, variable_type: str | type[Variable] = Perturbation):
        """`value + p`, where `p` is a zero of the same shape: its gradient is the gradient of the intermediate.

        Inside `nnx.capture` the perturbation comes from there; outside it is an attribute, which is deprecated.
        """
        kind = _kind(variable_type)
        captured = self.__dict__.get(CAPTURES)
        if captured is not None:
            for box in captured:
                if type(box) is kind:
                    held = box.get_value()
                    if name not in held:
                        box.set_value({**held, name: jax.tree.map(jnp.zeros_like, value)})
                    return jax.tree.map(operator.add, box.get_value()[name], value)
            return value
        if capturing.depth:
            return value
        old = self._recorded(name, kind)
        warnings.warn(
            "Using 'Module.perturb()' outside of 'nnx.capture()' is deprecated: the perturbation then stays in an "
            "attribute of the module.",
            DeprecationWarning,
            stacklevel=2,
        )
        if old is None:
            old = kind(jax.tree.map(jnp.zeros_like, value))
            setattr(self, name, old)
        return jax.tree.map(operator.add, old.get_value(), value)

    def iter_modules(self) -> Iterator[tuple[tuple, Module]]:
        """All `(path, module)` below and including this one, children first; shared ones once."""
        warnings.warn("The 'm.iter_modules()' method is deprecated, use the 'nnx.iter_modules(m)' function instead.",
                      DeprecationWarning, stacklevel=2)  # fmt: skip
        return iter_modules(self)

    def iter_children(self) -> Iterator[tuple[Any, Pytree]]:
        """The direct children that are objects, not Variables, as `(key, object)`."""
        warnings.warn("The 'm.iter_children()' method is deprecated, use the 'nnx.iter_children(m)' function instead.",
                      DeprecationWarning, stacklevel=2)  # fmt: skip
        return iter_module_children(self)

    def set_attributes(
        self, *filters: Filter, raise_if_not_found: bool = True, graph: bool | None = None, **attributes: Any
    ) -> None:
        """Sets attributes, where they exist, on this module and those below it that the filters match.

        Raises:
            ArgumentError: an attribute exists nowhere, unless `raise_if_not_found=False`.
        """
        remaining = set(attributes)
        predicates = to_predicates(filters or (True,))
        for path, module in list(iter_modules(self, graph=graph)):
            if any(predicate(path, module) for predicate in predicates):
                for name, value in attributes.items():
                    if hasattr(module, name):
                        remaining.discard(name)
                        setattr(module, name, value)
        if remaining and raise_if_not_found:
            raise ArgumentError(
                f"Could not find at least one instance of the following attributes: {sorted(remaining)}",
                fix="check their names, or pass raise_if_not_found=False",
            )

    def train(self, **attributes: Any) -> None:
        """Training mode: `deterministic=False`, `use_running_average=False`, wherever these exist below."""
        self.set_attributes(
            **{"deterministic": False, "use_running_average": False, **attributes}, raise_if_not_found=False
        )

    def eval(self, **attributes: Any) -> None:
        """Evaluation mode: `deterministic=True`, `use_running_average=True`, wherever these exist below."""
        self.set_attributes(
            **{"deterministic": True, "use_running_average": True, **attributes}, raise_if_not_found=False
        )


def _record(box: Variable, name: str, value: Any, reduce_fn: Callable, init_fn: Callable) -> bool:
    held = box.get_value()
    box.set_value({**held, name: reduce_fn(held[name] if name in held else init_fn(), value)})
    return True


def iter_modules(module: Any, /, *, graph: bool | None = None) -> Iterator[tuple[tuple, Module]]:
    """All `(path, module)` of an object, children first; shared ones once."""
    return ((path, x) for path, x in iter_graph(module, graph=graph) if isinstance(x, Module))


def iter_module_children(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Any, Pytree]]:
    """The direct children that are objects, not Variables, as `(key, object)`."""
    return ((key, x) for key, x in iter_children(node, graph=graph) if isinstance(x, Pytree))


def first_from(*args: Any, error_msg: str) -> Any:
    """The first argument that is not None.

    Raises:
        ArgumentError: all are None.
    """
    for arg in args:
        if arg is not None:
            return arg
    raise ArgumentError(error_msg)


# ---------------------------------------------------------------- containers
class List(Module, MutableSequence[A]):
    """A list that is a module: its elements are parts under the keys 0, 1, ...

    >>> layers = List([1, 2])
    >>> layers.append(3)
    >>> len(layers), layers[-1]
    (3, 3)
    """

    _pytree__has_int_keys = True

    def __init__(self, it: Iterable[A] | None = None, /):
        self._length = 0
        for value in it or ():
            self.append(value)

    def _key(self, index: int) -> str:
        if not -self._length <= index < self._length:
            raise IndexError("Index out of bounds")
        return str(index % self._length)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        return self.__dict__[self._key(operator.index(index))]

    def __setitem__(self, index, value) -> None:
        if not isinstance(index, slice):
            setattr(self, self._key(operator.index(index)), value)
            return
        elements = list(self)
        elements[index] = value
        self._replace(elements)

    def __delitem__(self, index) -> None:
        elements = list(self)
        try:
            del elements[index]
        except IndexError:
            raise IndexError("Index out of bounds") from None
        self._replace(elements)

    def _replace(self, elements: list[Any]) -> None:
        for i in range(self._length):
            delattr(self, str(i))
        self._length = 0
        self.extend(elements)

    def __len__(self) -> int:
        return self._length

    def append(self, value: A) -> None:
        setattr(self, str(self._length), value)
        self._length += 1

    def insert(self, index: int, value: A) -> None:
        elements = list(self)
        elements.insert(index, value)
        self._replace(elements)

    def __eq__(self, other):
        return self is other or (
            isinstance(other, List)
            and len(self) == len(other)
            and all(a is b or bool(a == b) for a, b in zip(self, other))
        )

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __batiste_repr__(self) -> Layout:
        return Layout(type(self).__name__, list(enumerate(self)), ("([", "])"), "", counted=False)


class Dict(Module, MutableMapping[str, A]):
    """A mapping that is a module: its values are parts under their keys, which are attribute names too."""

    def __init__(self, *args, **kwargs):
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __getitem__(self, key: str) -> A:
        return self.__dict__[key]

    def __setitem__(self, key: str, value: A) -> None:
        if not isinstance(key, str):
            raise TypeError(f"attribute name must be string, not '{type(key).__name__}'")
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self.__dict__:
            raise KeyError(key)
        delattr(self, key)

    def __getattr__(self, name: str) -> A:
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.__dict__))

    def __len__(self) -> int:
        return len(self.__dict__)

    def __eq__(self, other):
        return self is other or (isinstance(other, Dict) and self.__dict__ == other.__dict__)

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __batiste_repr__(self) -> Layout:
        return Layout(type(self).__name__, list(self.items()), ("({", "})"), ": ")


class Sequential(Module):
    """y = f_n(... f_1(x)): applies callables one after another.

    A tuple that one returns is spread over the next one's arguments, a dict over its keyword arguments. Without
    callables the result is the argument, several as a tuple, or the keyword arguments.
    """

    def __init__(self, *fns: Callable[..., Any]):
        self.layers = List(fns)

    def __call__(self, *args, rngs: Any = None, **kwargs) -> Any:
        output: Any = args[0] if len(args) == 1 else args or kwargs or None
        for index, layer in enumerate(self.layers):
            if not callable(layer):
                raise TypeError(f"Sequence[{index}] is not callable: {layer}")
            if index > 0:
                if isinstance(output, tuple):
                    args, kwargs = output, {}
                elif isinstance(output, dict):
                    args, kwargs = (), output
                else:
                    args, kwargs = (output,), {}
            if rngs is not None and _takes(layer, "rngs"):
                kwargs = {**kwargs, "rngs": rngs}
            output = layer(*args, **kwargs)
        return output


def _takes(f: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(f).parameters
    except ValueError:
        return False
