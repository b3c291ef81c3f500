# SPDX-License-Identifier: Apache-2.0
"""How modules pass through a lifted transform.

A lifted transform knows scopes. To call a function of modules through one, the modules are taken out of the call (the
first argument, those in its fields, those in other arguments), their scopes go through the transform, and on the other
side copies of the modules are bound to the scopes that come out:

    module, args  --Passage-->  scopes, args without modules  --lift.vmap-->  scopes  --Passage-->  module, args

What a module remembers beside its settings, which is how many names it has given, goes in and comes back.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import jax

from batiste.errors import TransformedMethodReturnValueError, TransformTargetError
from batiste.graph.errors import ArgumentError, BatisteError, CallError

from .context import in_module
from .methods import wrapped
from .module import Module
from .parts import _State, map_modules
from .scope import Scope, Variable

Transform = Callable[..., Callable[..., Any]]
BY_POSITION = ("vmap", "scan", "remat_scan")  # each argument has an axis, and axes go by position


class SeveralScopesError(BatisteError, NotImplementedError):
    """A transform of one scope was given modules with variables in several."""

    def __init__(self, name: str, paths: Sequence[str]):
        fix = "pass multi_scope=True" if name == "vjp" else "make the other modules inside the first, or pass arrays"
        super().__init__(f"nn.{name} does not yet support Modules that include other Modules passed as arguments",
                         got=" and ".join(paths), fix=fix)  # fmt: skip


# ---------------------------------------------------------------- the passage


def settings_of(module: Module) -> dict[str, Any]:
    """The fields that the constructor takes, but for name and parent."""
    names = (f.name for f in dataclasses.fields(module) if f.init)  # type: ignore[arg-type]
    return {name: vars(module)[name] for name in names if name not in ("parent", "name")}


map_parts = functools.partial(map_modules, of=(Module, Variable))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for the module or variable of this number in arguments that go through a transform."""

    number: int


class Passage:
    """The modules and variables of one call, on their way through a transform.

    Args:
        module: the first argument of the call; it and the other arguments may hold more.
        kind: of the copy on the other side; by default as outside.
    """

    def __init__(self, module: Module, args: tuple, kwargs: Mapping[str, Any] = {}, kind: type | None = None):
        self.kind = kind or type(module)
        self.module = module
        self.given: list[Module | Variable] = [module]  # the arguments among them
        self.args, self.kwargs = map_parts(self._place, args), map_parts(self._place, dict(kwargs))
        self.bound: list[Module | Variable] = []  # all that have a scope: those in fields come first
        for each in self.given:
            self._find(each)
        self.tops = _tops([x.scope for x in self.bound])  # type: ignore[misc]
        self.places = tuple(self._place_of(x.scope) for x in self.bound)  # type: ignore[arg-type]
        self.reserved = [(x.scope, dict(x.scope.reserved)) for x in self.bound]  # type: ignore[union-attr]
        state = module._state
        self.before = (state.in_setup, state.compact_depth, dict(state.names_made))
        self.names_made = state.names_made
        self.arrived = False  # whether the function has run on the other side

    def _place(self, x: Module | Variable, _: str = "") -> _Place:
        for number, known in enumerate(self.given):
            if known is x:
                return _Place(number)
        self.given.append(x)
        return _Place(len(self.given) - 1)

    def _find(self, x: Module | Variable, _: str = "") -> Any:
        if not any(x is known for known in self.bound):
            if isinstance(x, Module):
                map_parts(self._find, settings_of(x))
            if x.scope is not None:
                self.bound.append(x)
        return x

    def _place_of(self, scope: Scope) -> tuple[int, tuple[str, ...]]:
        """The number of the scope's top, and the names below it."""
        number = next(i for i, top in enumerate(self.tops) if _is_below(scope, top))
        return number, scope.path[len(self.tops[number].path) :]

    @property
    def scopes(self) -> Any:
        """The scopes that must go through: one, or a tuple; those below another one go with it."""
        return self.tops[0] if len(self.tops) == 1 else tuple(self.tops)

    # ------------------------------------------------------------ on the other side
    def arrive(self, scopes: Any, args: tuple, kwargs: Mapping[str, Any] = {}) -> tuple[Module, tuple, dict[str, Any]]:
        """Copies of the modules, bound to the scopes that came out of the transform."""
        tops = (scopes,) if len(self.tops) == 1 else scopes
        inner = [_follow(tops[number], names) for number, names in self.places]
        self._free_names(inner)
        copies: dict[int, Any] = {}

        def copied(x: Any, _: str = "") -> Any:
            if x.scope is None:
                return x
            if id(x) not in copies:
                scope = next(scope for known, scope in zip(self.bound, inner) if known is x)
                if isinstance(x, Variable):
                    copies[id(x)] = Variable(scope, x.collection, x.name, x.unbox)
                else:
                    kind = self.kind if x is self.module else type(x)
                    copies[id(x)] = kind(**map_parts(copied, settings_of(x)), parent=scope, name=x.name)  # type: ignore[call-arg]
            return copies[id(x)]

        with in_module(None):
            given = [copied(x) for x in self.given]
        self._go_on(given[0])
        if len(given) == 1:
            return given[0], args, dict(kwargs)
        is_place = lambda x: isinstance(x, _Place)
        back = lambda tree: jax.tree.map(lambda x: given[x.number] if is_place(x) else x, tree, is_leaf=is_place)
        return given[0], back(args), back(dict(kwargs))

    def _go_on(self, module: Module) -> None:
        """Lets the copy begin where the module outside has stopped."""
        state: _State = module._state
        state.in_setup, depth, names = self.before
        state.setup_called = state.in_setup
        module._try_setup()  # what it makes is not numbered as in a compact method
        state.compact_depth, state.names_made = depth, dict(names)

    def _free_names(self, inner: Sequence[Scope]) -> None:
        """Lets the copies take names anew, but for those of parts that came along and that `setup` will not make."""
        for scope in inner:
            scope.rewound()
        for module, scope in zip(self.bound, inner):
            again = _made_in_setup(module)
            for part in self.bound:
                path: tuple[str, ...] = part.scope.path  # type: ignore[union-attr]
                is_below = path and path[:-1] == scope.path and isinstance(module, Module) and isinstance(part, Module)
                if is_below and id(part) not in again and not scope.name_reserved(path[-1]):
                    scope.reserve(path[-1])

    def note(self, module: Module) -> None:
        """Remembers how many names the copy has given."""
        self.names_made, self.arrived = dict(module._state.names_made), True

    # ------------------------------------------------------------ back outside
    def settle(self) -> None:
        """Lets the module outside go on where its copy has stopped."""
        for scope, reserved in self.reserved:
            scope.reserved.clear()  # type: ignore[union-attr]
            scope.reserved.update(reserved)  # type: ignore[union-attr]
        self.module._state.names_made = dict(self.names_made)


def _made_in_setup(module: Any) -> set[int]:
    """The ids of the modules in attributes that are no fields."""
    found: set[int] = set()
    if isinstance(module, Module):
        rest = {name: x for name, x in vars(module).items() if name not in module.__dataclass_fields__}  # type: ignore[attr-defined]
        map_parts(lambda part, _: found.add(id(part)), rest)
    return found


def _follow(scope: Scope, names: Sequence[str]) -> Scope:
    for name in names:
        scope = scope.children.get(name) or scope.push(name, reuse=True)
    return scope


def _is_below(scope: Scope, top: Scope) -> bool:
    return scope.frame is top.frame and scope.path[: len(top.path)] == top.path


def _tops(scopes: Sequence[Scope]) -> list[Scope]:
    """The scopes that are not below others, each once, in their order."""
    tops: list[Scope] = []
    for scope in scopes:
        if any(_is_below(scope, top) for top in tops):
            continue
        tops = [top for top in tops if not _is_below(top, scope)]
        tops.append(scope)
    return tops


# ---------------------------------------------------------------- functions of modules as functions of scopes


def as_method(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a module as one that runs as its method: it is the parent of what is made."""
    if inspect.ismethod(fn) and isinstance(fn.__self__, Module):
        fn = fn.__func__  # the module is passed to it
    if hasattr(fn, "wrapped") or hasattr(fn, "nowrap"):
        return fn
    return wrapped(fn if hasattr(fn, "__name__") else _with_name(fn))


def _with_name(fn: Callable[..., Any]) -> Callable[..., Any]:
    return functools.update_wrapper(lambda *args, **kwargs: fn(*args, **kwargs), getattr(fn, "func", fn))


def of_scopes(fn: Callable[..., Any], passage: Callable[[], Passage]) -> Callable[..., Any]:
    """`f(scopes, *args)`, which runs `fn(module, *args)` with the module of the passage."""

    def core(scopes: Any, *args: Any, **kwargs: Any) -> Any:
        current = passage()
        module, args, kwargs = current.arrive(scopes, args, kwargs)
        y = fn(module, *args, **kwargs)
        current.note(module)
        return without_modules(y, fn)

    return functools.update_wrapper(core, fn, assigned=("__name__", "__qualname__", "__doc__"), updated=())


def without_modules(y: Any, fn: Callable[..., Any]) -> Any:
    """`y`, the result of `fn`.

    Raises:
        TransformedMethodReturnValueError: there is a module or a variable in it.
    """
    if any(isinstance(x, (Module, Variable)) for x in jax.tree.leaves(y)):
        raise TransformedMethodReturnValueError(getattr(fn, "__name__", str(fn)))
    return y


def checked_module(module: Any, name: str) -> Module:
    """`module`.

    Raises:
        CallError: it is none.
    """
    if not isinstance(module, Module):
        raise CallError(f"nn.{name} needs a Module as the first argument of its function", got=type(module).__name__,
                        fix="pass the module first, then the other arguments")  # fmt: skip
    return module


def run_lifted(name: str, transform: Transform, fns: Sequence[Callable[..., Any]], module: Any, args: tuple,
               kwargs: Mapping[str, Any] = {}, kind: type | None = None, one_scope: bool = False) -> Any:  # fmt: skip
    """`transform(*fns)(module, *args)`, where `transform` is one of functions of scopes.

    Raises:
        ArgumentError: the module is not bound.
        SeveralScopesError: there may be but `one_scope`, and modules from outside of it are among the arguments.
    """
    if kwargs and name in BY_POSITION:
        names = ", ".join(kwargs)
        warnings.warn(f"kwargs are not supported in {name}, so {names} is (are) ignored: pass arguments by position.",
                      RuntimeWarning, stacklevel=4)  # fmt: skip
        kwargs = {}
    passage = Passage(checked_module(module, name), args, kwargs, kind)
    if not passage.tops:
        raise ArgumentError(f"nn.{name} needs a module with variables", at=type(module).__name__,
                            fix="call it inside init() or apply()")  # fmt: skip
    if one_scope and len(passage.tops) > 1:
        raise SeveralScopesError(name, [scope.path_text for scope in passage.tops])
    cores = [of_scopes(as_method(fn), lambda: passage) for fn in fns]
    try:
        return transform(*cores)(passage.scopes, *passage.args, **passage.kwargs)
    finally:
        passage.settle()


# ---------------------------------------------------------------- targets: classes and functions


def lift_target(name: str, target: Any, lifted: Callable[[Mapping[str, Any]], Lifted], methods: Any = None,
                prefix: str | None = None) -> Any:  # fmt: skip
    """A class whose methods go through a transform, or a function that does.

    Args:
        name: of the transform.
        lifted: gives the transform; it takes the options that a method has of its own.
        methods: names, or options by name; by default `__call__`.
        prefix: of the class's name.

    Raises:
        TransformTargetError: `target` is neither a class of modules nor a function.
    """
    if isinstance(target, functools.partial) and _is_module_class(target.func):
        cls = lift_target(name, target.func, lifted, methods, prefix)
        return functools.partial(cls, *target.args, **target.keywords)
    if _is_module_class(target):
        return _lift_class(name, target, lifted, methods, name.capitalize() if prefix is None else prefix)
    if not callable(target) or isinstance(target, Module):
        raise TransformTargetError(target)
    return _through(name, target, lifted({}), None)


def _is_module_class(target: Any) -> TypeGuard[type[Module]]:
    return inspect.isclass(target) and issubclass(target, Module)


Lifted = Callable[[Callable[..., Any], Any, tuple, Mapping[str, Any], type | None], Any]


def _options_of(methods: Any) -> Mapping[str, Mapping[str, Any]]:
    if methods is None:
        return {"__call__": {}}
    if isinstance(methods, Mapping):
        return methods
    if isinstance(methods, (list, tuple)):
        return {name: {} for name in methods}
    raise ArgumentError("transform methods argument must be None, tuple, list, or dict", got=type(methods).__name__,
                        fix='pass methods=["__call__", ...]')  # fmt: skip


def _lift_class(name: str, cls: type[Module], lifted: Callable[[Mapping[str, Any]], Lifted], methods: Any,
                prefix: str) -> type[Module]:  # fmt: skip
    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    for method, options in _options_of(methods).items():
        through = _through(name, getattr(cls, method), lifted(options), cls)
        through.wrapped = True  # type: ignore[attr-defined]  # the copy runs `setup`, not the module outside
        body[method] = through
    return type(cls)(prefix + cls.__name__, (cls,), body)  # type: ignore[call-arg]


def _through(name: str, fn: Callable[..., Any], lifted: Lifted, kind: type | None) -> Callable[..., Any]:
    method = as_method(fn)

    def through(module: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module, Module) and module.scope is None:
            return method(module, *args, **kwargs)  # nothing to lift
        return lifted(method, module, args, kwargs, kind)

    functools.update_wrapper(through, method)
    if kind is None:
        through.__name__ = f"{name}({method.__name__})"  # the result is that of the function inside
        marks = ["wrapped"]
        if hasattr(method, "compact_name_scope"):  # the copy goes into that scope, not the module outside
            marks += ["compact", "compact_name_scope"]
        for mark in marks:
            through.__dict__.pop(mark, None)
    return through


# ---------------------------------------------------------------- remembered calls


class _ById:
    """A value that cannot be hashed, told apart by its identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _HashableProxy:
    """Stands for the modules of a call where a program is remembered: equal for equal types, settings and sharing.

    Modules with variables have no hash, and a program must not keep them alive. What counts is how they are made:
    the type and the fields of each, which of them are the same, and the names that they have given. Which variables
    they hold, the scopes tell.
    """

    __slots__ = ("key", "_hash")

    def __init__(self, key: Hashable):
        self.key, self._hash = key, hash(key)

    @classmethod
    def from_module(cls, module: Any, *others: Any) -> _HashableProxy:
        """Of a module, and of values that may hold other modules."""
        seen: dict[int, int] = {}
        return cls(tuple(_key_of(x, seen) for x in (module, *others)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashableProxy) and self._hash == other._hash and self.key == other.key

    def __repr__(self) -> str:
        return f"_HashableProxy({self.key!r})"


def _key_of(value: Any, seen: dict[int, int]) -> Hashable:
    if isinstance(value, Module):
        return tuple(_key_of_module(value, seen))
    if isinstance(value, Variable):
        return Variable, value.collection, value.name, value.unbox
    if isinstance(value, (list, tuple)):
        return (type(value), *(_key_of(x, seen) for x in value))
    if isinstance(value, Mapping):
        return (type(value), *((k, _key_of(x, seen)) for k, x in value.items()))
    try:
        hash(value)
    except TypeError:
        return _ById(value)
    return type(value), value


def _key_of_module(module: Module, seen: dict[int, int]) -> Iterator[Hashable]:
    if id(module) in seen:
        yield seen[id(module)]
        return
    seen[id(module)] = len(seen)
    state = module._state
    yield type(module)
    yield module.scope is None, state.in_setup, state.compact_depth, tuple(state.names_made.items())
    for name, value in settings_of(module).items():
        yield name, _key_of(value, seen)
