# SPDX-License-Identifier: Apache-2.0
"""Other views of a model: modes for training, evaluation and decoding, and the intermediate values of a call."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from batiste.graph import (
    Module,
    Pytree,
    State,
    Variable,
    VariableMetadata,
    data,
    from_flat_state,
    iter_graph,
    iter_modules,
    to_flat_state,
    to_predicate,
)
from batiste.graph.errors import ArgumentError
from batiste.graph.filters import Filter
from batiste.graph.module import CAPTURES, capturing
from batiste.graph.split import clone

A = TypeVar("A")
F = TypeVar("F", bound=Callable)


def _predicate(only: Filter) -> Callable[[Any, Any], bool]:
    return to_predicate(... if only is None else only)


def _view_method_of(cls: Any) -> Any:
    return getattr(cls, "set_view", None)


def view(
    node: A, /, *, only: Filter = ..., raise_if_not_found: bool = True, graph: bool | None = None, **kwargs: Any
) -> A:
    """A new object that shares the Variables, with other modes: `view(model, deterministic=True)`.

    Every module below that has a method `set_view` gets the options that this method takes.

    Raises:
        ArgumentError: no module takes an option, unless `raise_if_not_found=False`.
    """
    new, predicate, unused = clone(node, variables=False, graph=graph), _predicate(only), set(kwargs)
    for path, module in list(iter_modules(new, graph=graph)):
        method = _view_method_of(type(module))
        if method is not None and predicate(path, module):
            taken = _options(method)
            given = kwargs if taken is None else {k: v for k, v in kwargs.items() if k in taken}
            unused -= set(given) if taken is not None else set()
            if given:
                left = method(module, **given)
                if taken is None:
                    unused -= set(given) - set(left or ())
    if unused and raise_if_not_found:
        raise ArgumentError(
            f"Unused keys found in nnx.view: {sorted(unused)}",
            fix="nnx.view_info(model) lists the options; raise_if_not_found=False ignores others",
        )
    return new


def _options(method: Callable) -> dict[str, inspect.Parameter] | None:
    """The options of a `set_view`, by name; None if it takes any (`**kwargs`) and returns those it did not use."""
    parameters = dict(list(inspect.signature(method).parameters.items())[1:])
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return parameters


def with_attributes(
    node: A, /, *, only: Filter = ..., raise_if_not_found: bool = True, graph: bool | None = None, **attributes: Any
) -> A:
    """A new object that shares the Variables, with some attributes replaced wherever they exist.

    Raises:
        ArgumentError: an attribute exists nowhere, unless `raise_if_not_found=False`.
    """
    new, predicate, unused = clone(node, variables=False, graph=graph), _predicate(only), set(attributes)
    for path, module in list(iter_graph(new, graph=graph)):
        if isinstance(module, Pytree) and predicate(path, module):
            for name, value in attributes.items():
                if hasattr(module, name):
                    unused.discard(name)
                    setattr(module, name, value)
    if unused and raise_if_not_found:
        raise ArgumentError(f"Could not find at least one instance of the following attributes: {sorted(unused)}",
                            fix="check their names, or pass raise_if_not_found=False")  # fmt: skip
    return new


def view_info(node: Any, /, *, only: Filter = ..., graph: bool | None = None) -> str:
    """The options that `view` can set in an object, by class, with their documentation."""
    predicate = _predicate(only)
    classes = {
        type(m)
        for path, m in iter_modules(node, graph=graph)
        if _view_method_of(type(m)) is not None and predicate(path, m)
    }
    texts = []
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        docs = _documented(inspect.getdoc(_view_method_of(cls)) or "")
        lines = [f"{cls.__qualname__}:"]
        for name, parameter in list(inspect.signature(_view_method_of(cls)).parameters.items())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            kind = (
                ""
                if parameter.annotation is parameter.empty
                else f": {inspect.formatannotation(parameter.annotation).strip(chr(39))}"
            )
            default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
            lines.append(f"  {name}{kind}{default}")
            lines += [f"    {line}" for line in docs.get(name, ())]
        texts.append("\n".join(lines))
    return "\n".join(texts)


def _documented(doc: str) -> dict[str, list[str]]:
    """The lines about each argument in the `Args:` section of a docstring."""
    found: dict[str, list[str]] = {}
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    current: list[str] = []
    for line in (section.group(1) if section else "").splitlines():
        entry = re.match(r"\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)
        if entry:
            current = found.setdefault(entry.group(1), [])
            line = entry.group(2)
        if line.strip():
            current.append(line.strip())
    return found


def with_metadata(
    initializer: F,
    on_set_value: Any = (),
    on_get_value: Any = (),
    on_create_value: Any = (),
    on_add_axis: Any = (),
    on_remove_axis: Any = (),
    **metadata: Any,
) -> F:
    """An initialiser whose values carry metadata and hooks into the Variable that is made of them."""

    @functools.wraps(initializer)
    def with_them(*args, **kwargs):
        return VariableMetadata(initializer(*args, **kwargs), on_set_value=on_set_value, on_get_value=on_get_value,
                                on_create_value=on_create_value, on_add_axis=on_add_axis, on_remove_axis=on_remove_axis,
                                metadata=metadata)  # fmt: skip

    return with_them  # type: ignore[return-value]


# ---------------------------------------------------------------- capture
def capture(
    fn: Any, *var_types: type[Variable], init: State | None = None, method_outputs: type[Variable] | None = None
) -> Callable:
    """A function that calls `fn` and returns `(result, *states)`: what `sow` and `perturb` recorded, a State per type.

    Args:
        fn: a module, a bound method of one, or a function that gets modules as arguments.
        init: values to begin with, such as perturbations to differentiate by.
        method_outputs: also record what each method of each module returns, as this type.

    >>> from batiste.graph import Intermediate
    >>> class Layer(Module):
    ...     def __call__(self, x):
    ...         self.sow(Intermediate, "doubled", 2 * x)
    ...         return x
    >>> y, found = capture(Layer(), Intermediate)(1.0)
    >>> found["doubled"].get_value()
    (2.0,)
    """

    call: Any = fn

    def captured(*args: Any, **kwargs: Any) -> Any:
        holder = fn if isinstance(fn, Pytree) else getattr(fn, "__self__", None)
        roots = [x for x in (holder, *args, *kwargs.values()) if isinstance(x, Pytree)]
        modules: dict[int, tuple[tuple, Module]] = {}
        for root in roots:
            for path, module in iter_modules(root, graph=True):
                modules.setdefault(id(module), (path, module))
        held = list(modules.values())
        before = [module.__dict__.get(CAPTURES) for _, module in held]
        start: dict[tuple, dict[Any, Any]] = {}
        for path, x in to_flat_state(init) if init is not None else ():
            start.setdefault(path[:-1], {})[path[-1]] = x
        capturing.depth += 1
        try:
            for path, module in held:
                setattr(module, CAPTURES, data(_boxes(var_types, start.get(path, {}))))
            with _recording([module for _, module in held], method_outputs):
                result = call(*args, **kwargs)
            states = _collect(held, var_types)
        finally:
            capturing.depth -= 1
            for (_, module), old in zip(held, before):
                if old is not None:
                    setattr(module, CAPTURES, data(old))
                elif CAPTURES in module.__dict__:
                    delattr(module, CAPTURES)
        return (result, *states) if var_types else result

    return captured


def _boxes(var_types: tuple[type[Variable], ...], start: Mapping[str, Variable]) -> tuple[Variable, ...]:
    """The hidden Variables of one module, one for each type that is collected or begun with."""
    kinds = dict.fromkeys([*var_types, *map(type, start.values())])
    return tuple(kind({name: x.get_value() for name, x in start.items() if type(x) is kind}) for kind in kinds)


def _collect(held: list[tuple[tuple, Module]], var_types: tuple[type[Variable], ...]) -> list[State]:
    states: list[dict[tuple, Variable]] = [{} for _ in var_types]
    for path, module in held:
        for box in module.__dict__[CAPTURES]:
            kind = type(box)
            if kind not in var_types:
                continue  # begun with, but not asked for
            at = next(n for n, t in enumerate(var_types) if issubclass(kind, t))
            for name, value in box.get_value().items():
                states[at][(*path, name)] = kind(value)
    return [from_flat_state(s) for s in states]


@contextmanager
def _recording(modules: list[Module], kind: type[Variable] | None) -> Iterator[None]:
    """While it lasts, methods of these modules' classes sow what they return."""
    if kind is None:
        yield
        return
    patched: list[tuple[type, str, Any]] = []
    try:
        for cls in {base for module in modules for base in type(module).__mro__}:
            if not issubclass(cls, Module) or cls is Module or cls.__module__ == Module.__module__:
                continue
            for name, method in list(vars(cls).items()):
                if (
                    inspect.isfunction(method)
                    and (name == "__call__" or not name.startswith("_"))
                    and name not in _QUIET
                ):
                    patched.append((cls, name, method))
                    setattr(cls, name, _sowing(method, name, kind))
        yield
    finally:
        for cls, name, method in patched:
            setattr(cls, name, method)


_QUIET = frozenset({"set_view", "sow", "perturb", "train", "eval", "set_attributes", "iter_modules", "iter_children"})


def _sowing(method: Callable, name: str, kind: type[Variable]) -> Callable:
    @functools.wraps(method)
    def sowing(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if CAPTURES in self.__dict__:
            self.sow(kind, name, result)
        return result

    return sowing
