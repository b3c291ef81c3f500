# SPDX-License-Identifier: Apache-2.0
"""`ToNNX`: a Linen module as an object; `ToLinen`: an object as a Linen module; `functional`: an object without state.

ToNNX     variables -> attributes of the object; a call applies the module to them and writes back what it changed
ToLinen   an object is built anew in every call, takes the scope's variables, runs, and hands its State back
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from batiste import linen
from batiste.core.frozen_dict import FrozenDict
from batiste.graph import GraphDef, Not, Pytree, Rngs, RngState, State, Variable, iter_graph, split, state
from batiste.graph.errors import ArgumentError, CallError, StructureError
from batiste.graph.module import Module
from batiste.graph.pytree import data
from batiste.linen.context import running

from . import module as bridge_module
from .variables import give, linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars, to_linen_var

M = TypeVar("M", bound=Module)

INITIALIZING = "to_nnx__initializing"
OWN = ("to_nnx__module", "to_nnx__rngs", INITIALIZING)


# ---------------------------------------------------------------- objects without state
@dataclasses.dataclass
class Functional(Generic[M]):
    """A class of modules with the arguments of its constructor: `init` gives the State, `apply` runs the module.

    Args:
        module_type: the class.
        graphdef: the structure, once `init` has run.
        args, kwargs: of the constructor.
    """

    module_type: type[M]
    graphdef: GraphDef | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def init(self, *, rngs: Rngs | None = None) -> State:
        """The State of a new module; the structure is remembered."""
        kwargs = self.kwargs if rngs is None else {**self.kwargs, "rngs": rngs}
        self.graphdef, found = split(self.module_type(*self.args, **kwargs))
        return found

    def apply(self, *states: Any) -> Any:
        """What calls a module of these States: `apply(state)(*args)` is `(result, (graphdef, state))`.

        Raises:
            StructureError: `init` has not run.
        """
        if self.graphdef is None:
            raise StructureError("a Functional has no structure yet", at=self.module_type.__name__, fix="call init()")
        return self.graphdef.apply(*states)  # type: ignore[attr-defined]


def functional(cls: type[M]) -> Callable[..., Functional[M]]:
    """The constructor of a class, which gives a `Functional`.

    >>> from batiste import nnx
    >>> linear = functional(nnx.Linear)(2, 3)
    >>> weights = linear.init(rngs=nnx.Rngs(0))
    >>> y, (graphdef, weights) = linear.apply(weights)(jax.numpy.ones((1, 2)))
    >>> y.shape
    (1, 3)
    """

    def make(*args: Any, **kwargs: Any) -> Functional[M]:
        return Functional(cls, None, args, kwargs)

    return make


# ---------------------------------------------------------------- Linen modules as objects
def lazy_init(fn: Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a module, or a method of one, so that the Linen modules in it make their variables; returns `fn`.

    Raises:
        ArgumentError: `fn` is neither.
    """
    method = fn.func if isinstance(fn, functools.partial) else fn
    module = fn if isinstance(fn, Module) else getattr(method, "__self__", None)
    if not isinstance(module, Module):
        raise ArgumentError(f"{fn = } needs to be a method of an NNX Module", fix="pass the module or its method")
    _set_initializing(module, True)
    try:
        fn(*args, **kwargs)  # type: ignore[operator]
    finally:
        _set_initializing(module, False)
    return fn


def _set_initializing(module: Module, initializing: bool) -> None:
    """Says of all Linen modules in a module whether a call makes their variables; transforms carry it along."""
    for _, x in list(iter_graph(module)):
        if isinstance(x, ToNNX):
            if initializing:
                setattr(x, INITIALIZING, True)
            elif INITIALIZING in vars(x):
                delattr(x, INITIALIZING)


def current_linen_module() -> linen.Module | None:
    """The Linen module whose method is running."""
    return running.modules[-1]


class ToNNX(Module):
    """A Linen module as an object: its variables are attributes, by the names of the parts they belong to.

    Args:
        module: the Linen module.
        rngs: streams, or a key; every call draws a key from each.

    >>> from batiste import linen, nnx
    >>> x = jax.numpy.ones((1, 2))
    >>> model = ToNNX(linen.Dense(3), rngs=nnx.Rngs(0)).lazy_init(x)
    >>> model.kernel.shape, model(x).shape
    ((2, 3), (1, 3))
    """

    _takes_new_parts = dict

    def __init__(self, module: linen.Module, rngs: Rngs | jax.Array | None = None):
        self.to_nnx__module = module
        if isinstance(rngs, jax.Array):
            rngs = Rngs(params=rngs)
        self.to_nnx__rngs = data(rngs.fork() if isinstance(rngs, Rngs) and rngs else rngs)

    @property
    def rngs(self) -> Rngs | None:
        """The streams."""
        return self.to_nnx__rngs

    @property
    def module(self) -> linen.Module:
        """The Linen module."""
        return self.to_nnx__module

    def _setattr(self, name: str, value: Any) -> None:
        super()._setattr(name, data(value) if isinstance(value, Mapping) else value)

    def lazy_init(self, *args: Any, **kwargs: Any) -> ToNNX:
        """Makes the variables; the arguments are those of a call."""
        return lazy_init(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and OWN[0] in vars(self):
            method = inspect.getattr_static(type(self.to_nnx__module), name, None)
            if inspect.isfunction(method):
                return functools.partial(self.__call__, method=method)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __call__(
        self,
        *args: Any,
        rngs: Rngs | jax.Array | Mapping[str, jax.Array] | None = None,
        method: Callable[..., Any] | str | None = None,
        mutable: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The result of a method of the Linen module.

        Args:
            rngs: in place of the streams that the module was made with.
            method: a method or its name; by default `__call__`.
            mutable: the collections that may be written; by default those of the Linen or bridge module around.
        """
        streams = _keys(self.to_nnx__rngs if rngs is None else rngs)
        if self._makes_variables():
            y, updates = self.to_nnx__module.init_with_output(streams, *args, method=method, **kwargs)
        else:
            mutable = _mutable_around() if mutable is None else mutable
            variables = nnx_attrs_to_linen_vars(_without_objects(vars(self), OWN))
            y = self.to_nnx__module.apply(variables, *args, rngs=streams, method=method, mutable=mutable, **kwargs)
            if mutable is False:
                return y
            y, updates = y
        give(self, linen_vars_to_nnx_attrs(updates))
        return y

    def _makes_variables(self) -> bool:
        if INITIALIZING in vars(self):
            return True
        around = _around()
        return around is not None and around.is_initializing() and not set(vars(self)) - set(OWN)


def _keys(rngs: Any) -> Mapping[str, jax.Array]:
    """A key from each stream; `default` stands for `params` where there is none."""
    if rngs is None or (isinstance(rngs, Mapping) and not isinstance(rngs, Rngs)):
        return rngs or {}
    if isinstance(rngs, jax.Array):
        return {"params": rngs}
    keys = {name: rngs[name]() for name in rngs}
    if "params" not in keys and "default" in keys:
        keys["params"] = keys.pop("default")
    return keys


def _around() -> Any:
    """The bridge module or the Linen module whose method is running."""
    return bridge_module.current_module() or current_linen_module()


def _mutable_around() -> Any:
    scope = getattr(_around(), "scope", None)
    return False if scope is None else scope.mutable


def _without_objects(tree: Mapping[Any, Any], names: Iterable[str] = ()) -> dict[Any, Any]:
    """Attributes without some, and modules among them as their States."""
    found = {name: value for name, value in tree.items() if name not in names}
    return {name: _state_of(value) if isinstance(value, Pytree) else value for name, value in found.items()}


def _state_of(node: Pytree) -> Mapping[Any, Any]:
    return state(node, Not(RngState))  # type: ignore[return-value]


# ---------------------------------------------------------------- objects as Linen modules
class _Missing:
    """The type of the default of an argument for which None means something."""


_MISSING = _Missing()


def linen_rngs_dict(linen_module: linen.Module, add_default: bool = False) -> dict[str, jax.Array]:
    """A key from each stream of a bound Linen module; `add_default` adds one that stands for streams it lacks."""
    keys = {name: linen_module.make_rng(name) for name in linen_module.scope.rngs}  # type: ignore[union-attr]
    if add_default and "default" not in keys:
        keys["default"] = jax.random.key(0)
    return keys


def _get_module_method(module: Any, method: Callable[..., Any] | str | None) -> Callable[..., Any]:
    """A function of a module: from None, a name, a method, or a function.

    Raises:
        CallError: it cannot be called.
    """
    name = "__call__" if method is None else method
    if isinstance(name, str):
        method = getattr(module if isinstance(module, type) else type(module), name)
    if not callable(method):
        raise CallError(f"'{name}' must be a callable, got {type(method)}", fix="name a method, or pass a function")
    return getattr(method, "__func__", method)


class ToLinen(linen.Module):
    """An object as a Linen module: its Variables become variables, in the collections of their types.

    The object is built in every call, from the settings; what a call changes in other attributes than Variables is
    lost with it.

    Args:
        nnx_class: the class of the object, or a function that makes it.
        args, kwargs: of the constructor.
        skip_rng: the constructor takes no `rngs`.
        metadata_fn: makes what is stored of a Variable; None stores the value alone.

    >>> from batiste import nnx
    >>> model = ToLinen(nnx.Linear, args=(2, 3))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> variables["params"]["kernel"].shape
    (2, 3)
    """

    nnx_class: Callable[..., Module]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = FrozenDict({})
    skip_rng: bool = False
    metadata_fn: Callable[[Variable], Any] | None = to_linen_var

    @linen.compact
    def __call__(self, *args: Any, nnx_method: Callable[..., Any] | str | None = None, **kwargs: Any) -> Any:
        """The result of a method of the object, by default `__call__`."""
        node = self._build()
        self._lend(node)
        if self.is_initializing():  # statistics are stored as they are before the call
            self._update_variables(node)
        y = _get_module_method(node, nnx_method)(node, *args, **kwargs)
        if not self.is_initializing():
            self._update_variables(node)
        return y

    def __getattr__(self, name: str) -> Any:
        nnx_class = None if name.startswith("__") else vars(self).get("nnx_class")
        method = inspect.getattr_static(nnx_class, name, None) if inspect.isclass(nnx_class) else None
        if inspect.isfunction(method):
            return functools.partial(self.__call__, nnx_method=method)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @linen.nowrap
    def _build(self) -> Module:
        kwargs = dict(self.kwargs)
        if not self.skip_rng:
            kwargs["rngs"] = Rngs(**linen_rngs_dict(self, add_default=not self.is_initializing()))  # type: ignore[arg-type]
        return self.nnx_class(*self.args, **kwargs)

    @linen.nowrap
    def _lend(self, node: Module) -> None:
        """Writes the scope's variables into the object; those that have no place in it are named in a warning."""
        if unknown := give(node, linen_vars_to_nnx_attrs(self.scope.variables())):  # type: ignore[union-attr]
            paths = "".join(f"\n  - {path}" for path in unknown)
            warnings.warn(f"Found unknown module paths in incoming state:{paths}", UserWarning, stacklevel=2)

    @linen.nowrap
    def _update_variables(self, module: Module) -> None:
        """Puts the Variables of the object into the collections that may be written."""
        variables = nnx_attrs_to_linen_vars(_state_of(module), self.metadata_fn or Variable.get_raw_value)
        for col, tree in variables.items():
            if self.is_mutable_collection(col):
                for name, value in tree.items():
                    self.put_variable(col, name, value)


def to_linen(
    nnx_class: Callable[..., Module],
    *args: Any,
    metadata_fn: Callable[[Variable], Any] | None = to_linen_var,
    name: str | None = None,
    skip_rng: bool = False,
    abstract_init: bool = True,
    **kwargs: Any,
) -> ToLinen:
    """The Linen module of `nnx_class(*args, **kwargs)`; see `ToLinen`.

    Args:
        abstract_init: has no effect; building the object costs nothing under `jax.jit`.
    """
    del abstract_init
    return ToLinen(nnx_class, args, FrozenDict(kwargs), skip_rng, metadata_fn, name=name)  # type: ignore[call-arg]


def to_linen_class(base_nnx_class: type[M], base_metadata_fn: Callable[[Variable], Any] | None = to_linen_var,
                   base_skip_rng: bool = False, **partial_kwargs: Any) -> type[ToLinen]:  # fmt: skip
    """A class of Linen modules that takes the keyword arguments of a class of objects; subclasses take them too.

    Args:
        base_metadata_fn, base_skip_rng: see `ToLinen`.
        partial_kwargs: arguments of the objects' constructor that are given already.

    >>> from batiste import nnx
    >>> Linear = to_linen_class(nnx.Linear, in_features=2)
    >>> Linear(out_features=3, name="head").kwargs["out_features"]
    3
    """

    def construct(self: Any, args: Any = None, kwargs: Mapping[str, Any] | None = None, nnx_class: Any = None,
                  skip_rng: bool | None = None, metadata_fn: Any = None, name: Any = _MISSING, parent: Any = _MISSING,
                  **other_kwargs: Any) -> None:  # fmt: skip
        place = {"name": name, "parent": parent}
        ToLinen.__init__(
            self,
            nnx_class or base_nnx_class,
            () if args is None else args,
            FrozenDict({**partial_kwargs, **(kwargs or {}), **other_kwargs}),
            base_skip_rng if skip_rng is None else skip_rng,
            base_metadata_fn if metadata_fn is None else metadata_fn,
            **{k: v for k, v in place.items() if v is not _MISSING},
        )

    class ToLinenPartial(ToLinen):
        __init__ = construct  # type: ignore[assignment]

        def __init_subclass__(cls, **kwargs: Any):
            if "__init__" not in vars(cls):
                cls.__init__ = construct  # type: ignore[method-assign]  # before a dataclass brings its own
            super().__init_subclass__(**kwargs)

    return ToLinenPartial
