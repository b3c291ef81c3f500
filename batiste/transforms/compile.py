# SPDX-License-Identifier: Apache-2.0
"""jit: compiled functions of live objects, with a plan that makes a call as cheap as one over a flat list of arrays."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypeVar

import jax

from batiste.graph.boundary import Boundary, Mode, Rule, Rules, Shaped, broadcast, is_root
from batiste.graph.callers import warn
from batiste.graph.captured import Captured
from batiste.graph.config import config
from batiste.graph.errors import ArgumentError, StaleCaptureWarning, locate
from batiste.graph.flatten import ANY
from batiste.graph.plan import Plan
from batiste.graph.variable import MISSING, Variable

F = TypeVar("F", bound=Callable[..., Any])


class StateSharding(Rules):
    """A module's shardings, by the first filter that matches: `StateSharding({Param: P("data"), ...: None})`."""

    def __init__(self, filter_sharding, /):
        super().__init__(filter_sharding)

    @property
    def shardings(self):
        return self.labels


class Way:
    """The label of jit: where a value lives, and whether its buffer is given away. Equal ones are one object."""

    __slots__ = ("donated", "sharding")
    _known: ClassVar[dict[tuple[Any, bool], Any]] = {}

    def __new__(cls, sharding: Any, donated: bool) -> Self:
        known = cls._known.get((sharding, donated))
        if known is None:
            known = cls._known[sharding, donated] = object.__new__(cls)
            known.sharding, known.donated = sharding, donated
        return known

    def __str__(self):
        return f"{self.sharding}, donated" if self.donated else f"{self.sharding}"


class _WayRule(Rule):
    def __init__(self, spec: Rule, donated: bool):
        self.spec, self.donated = spec, donated
        self.labels = tuple(Way(label, donated) for label in spec.labels)

    def __call__(self, path, x):
        return Way(self.spec(path, x), self.donated)

    def __eq__(self, other):
        return isinstance(other, _WayRule) and (self.spec, self.donated) == (other.spec, other.donated)

    def __hash__(self):
        return hash((self.spec, self.donated))


def _way(spec: Any, donated: bool) -> Any:
    spec = Shaped(spec) if is_root(spec) else spec
    return _WayRule(spec, donated) if isinstance(spec, Rule) else Way(spec, donated)


def refuse_bound_method(f: Any, name: str) -> None:
    """A bound method hides its object from the transform.

    Raises:
        ArgumentError: `f` is one.
    """
    if inspect.ismethod(f) and is_root(f.__self__):
        raise ArgumentError(
            f"nnx.{name} does not support bound methods",
            fix=f"use the decorator form @nnx.{name}, or call nnx.{name}(MyClass.method)(instance, ...) with the "
            "unbound method",
        )


# ---------------------------------------------------------------- the arguments of a function
def _as_tuple(x: Any) -> tuple:
    return () if x is None else (x,) if isinstance(x, (int, str)) else tuple(x)


class Arguments:
    """Which arguments of a function are static and which are donated, by number and by name."""

    def __init__(self, f: Callable, static_argnums, static_argnames, donate_argnums, donate_argnames):
        try:
            parameters = list(inspect.signature(f).parameters.values())
        except (ValueError, TypeError):
            parameters = []
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.static_numbers, self.static_names = self.both(positional, static_argnums, static_argnames)
        self.donated_numbers, self.donated_names = self.both(positional, donate_argnums, donate_argnames)

    @staticmethod
    def both(positional: list[str], numbers: Any, names: Any) -> tuple[frozenset[int], frozenset[str]]:
        given_numbers, given_names = numbers is not None, names is not None
        numbers, names = set(_as_tuple(numbers)), set(_as_tuple(names))
        numbers = {n + len(positional) if n < 0 else n for n in numbers}
        if given_numbers and not given_names:
            names |= {positional[n] for n in numbers if n < len(positional)}
        elif given_names and not given_numbers:
            numbers |= {positional.index(n) for n in names if n in positional}
        return frozenset(numbers), frozenset(names)

    def cut(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], Any]:
        """`(args, kwargs, static)`: static arguments are taken out, and form a hashable key."""
        if not self.static_numbers and not self.static_names:
            return args, kwargs, None
        static = tuple((n, args[n]) for n in sorted(self.static_numbers) if n < len(args))
        named = tuple((k, kwargs[k]) for k in sorted(kwargs) if k in self.static_names)
        for where, value in (*static, *named):
            try:
                hash(value)
            except TypeError:
                raise ArgumentError(
                    f"Non-hashable static arguments are not supported: argument {where} is a {type(value).__name__}",
                    fix="pass something hashable (a tuple, a frozen dataclass), or do not mark it static",
                ) from None
        dynamic = tuple(x for n, x in enumerate(args) if n not in self.static_numbers)
        return dynamic, {k: v for k, v in kwargs.items() if k not in self.static_names}, (static, named)

    @staticmethod
    def join(f: Callable, static: Any) -> Callable:
        """`f` of the dynamic arguments alone."""
        if static is None:
            return lambda given: f(*given["args"], **given["kwargs"])

        def joined(given):
            whole = list(given["args"])
            for n, value in static[0]:
                whole.insert(n, value)
            return f(*whole, **given["kwargs"], **dict(static[1]))

        return joined

    def dynamic_donated(self, count: int, static: Any) -> list[bool]:
        numbers = {n for n, _ in static[0]} if static is not None else ()
        return [n in self.donated_numbers for n in range(count + len(numbers)) if n not in numbers]


# ---------------------------------------------------------------- jit
class JitWrapped:
    """A function of live objects, compiled. Calling it writes updates of Variables back into its arguments."""

    def __init__(
        self,
        fun: Callable,
        mode: Mode,
        in_shardings: Any = None,
        out_shardings: Any = None,
        static_argnums: Any = None,
        static_argnames: Any = None,
        donate_argnums: Any = None,
        donate_argnames: Any = None,
        **options: Any,
    ):
        refuse_bound_method(fun, mode.name)
        functools.update_wrapper(self, fun)
        self.fun, self.mode, self.options = fun, mode, options
        self.in_shardings, self.out_shardings = in_shardings, out_shardings
        self.arguments = Arguments(fun, static_argnums, static_argnames, donate_argnums, donate_argnames)
        refuse_rules(mode, in_shardings=in_shardings, out_shardings=out_shardings)
        self.out_labels = jax.tree.map(lambda s: _way(s, False), out_shardings, is_leaf=_is_sharding_leaf)
        if out_shardings is None:
            self.out_labels = ANY
        self.programs: dict[Any, Any] = {}
        self.plans: dict[Any, Plan] = {}
        self.latest: Plan | None = None

    def __get__(self, instance, owner=None):
        """A decorated method binds its object as the first argument."""
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.latest
        leaves: Sequence[Any] = args
        if plan is None or kwargs or not plan.takes(args):
            plan, leaves = self.find(args, kwargs)
        if config.check_plans:
            plan.check(self.enter(*self.arguments.cut(args, kwargs))[0])
        return plan.run(leaves)

    def find(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Plan, Sequence[Any]]:
        """The plan of these arguments, remembered or made now, and their leaves."""
        args, kwargs, static = self.arguments.cut(args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_root)
        key = (treedef, static, *[id(x) if is_root(x) else None for x in leaves])
        plan = self.plans.get(key)
        if plan is None or not plan.fits(leaves):
            boundary, _ = self.enter(args, kwargs, static)
            program = self.program(boundary, static)
            plan = Plan(boundary, leaves, program, lambda _: self.forget(key))
            plan.watches.append(program.captured.is_current)
            if static is None and not kwargs and len(leaves) == len(args) and all(map(operator.is_, leaves, args)):
                plan.types = list(map(type, args))
            self.plans[key] = plan
            while len(self.plans) > 64:
                self.plans.pop(next(iter(self.plans)))
        self.latest = plan
        return plan, leaves

    def forget(self, key: Any) -> None:
        """Drops the plan of objects that are gone."""
        plan = self.plans.pop(key, None)
        if self.latest is plan:
            self.latest = None

    def enter(self, args: tuple, kwargs: dict[str, Any], static: Any) -> tuple[Boundary, Any]:
        """Walks the arguments."""
        if kwargs and self.in_shardings is not None:
            raise ArgumentError(
                "in_shardings does not speak of keyword arguments", got=sorted(kwargs), fix="pass them by position"
            )
        specs = broadcast(self.in_shardings, args, "in_shardings")
        donated = self.arguments.dynamic_donated(len(args), static)
        counts = [len(jax.tree.leaves(x, is_leaf=is_root)) for x in args]
        gifts = [g for g, count in zip(donated, counts) for _ in range(count)]
        ways = [_way(s, g) for s, g in zip(specs, gifts)]
        for name in sorted(kwargs):
            count = len(jax.tree.leaves(kwargs[name], is_leaf=is_root))
            ways += [Way(None, name in self.arguments.donated_names)] * count
        boundary = Boundary(self.arguments.join(self.fun, static), self.mode, self.out_labels, keep=_comes_back)
        groups = boundary.enter({"args": args, "kwargs": kwargs}, specs=ways, labels=(Way(None, False),))
        return boundary, groups

    def program(self, boundary: Boundary, static: Any) -> Any:
        """The compiled function of this structure of arguments; its `captured` is what else it rests on."""
        crossing = boundary.crossing
        key = (crossing.key(), static)
        program = self.programs.get(key)
        if program is None or self.is_stale(program):
            program = self.programs[key] = self.build(crossing)
        return program

    def is_stale(self, program: Any) -> bool:
        """Whether a Variable that the function reads without getting it has changed, which is told of."""
        stale = program.captured.stale()
        if stale is not None:
            name = getattr(self.fun, "__name__", "the function")
            what = " ".join(filter(None, (stale.kind, locate(stale.variable()))))
            warn(f"nnx.{self.mode.name} compiles {name} again: the {what} that it reads, and was not given, "
                 "has changed.\n  Fix: pass the object that holds it as an argument.\n"
                 f"  Read in: {stale.place}", StaleCaptureWarning)  # fmt: skip
        return stale is not None

    def build(self, crossing: Any) -> Any:
        captured = Captured()

        def run(*groups):
            with captured.recording():
                out = crossing.run(groups)
            return out, crossing.note

        run.__name__ = getattr(self.fun, "__name__", "fun")
        run.__qualname__ = getattr(self.fun, "__qualname__", run.__name__)
        options = dict(self.options)
        labels = crossing.labels
        if any(way is not ANY and way.donated for way in labels):
            options["donate_argnums"] = tuple(i for i, way in enumerate(labels) if way is not ANY and way.donated)
        shardings = tuple(None if way is ANY else way.sharding for way in labels)
        if self.in_shardings is not None:
            options["in_shardings"] = shardings
        if self.out_shardings is not None or any(s is not None for s in shardings):
            options["out_shardings"] = (shardings, None)
        program: Any = jax.jit(run, **options)
        program.captured = captured
        return program

    # ------------------------------------------------------------ stages
    def trace(self, *args: Any, **kwargs: Any) -> Stage:
        """The traced function, before lowering."""
        args, kwargs, static = self.arguments.cut(args, kwargs)
        boundary, groups = self.enter(args, kwargs, static)
        return Stage(self.program(boundary, static).trace(*groups), self)

    def lower(self, *args: Any, **kwargs: Any) -> Stage:
        """The lowered function; `.compile()` it, and call that with arguments of the same structure."""
        args, kwargs, static = self.arguments.cut(args, kwargs)
        boundary, groups = self.enter(args, kwargs, static)
        return Stage(self.program(boundary, static).lower(*groups), self)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The result with shapes in the place of arrays."""
        args, kwargs, static = self.arguments.cut(args, kwargs)
        boundary, groups = self.enter(args, kwargs, static)
        return boundary.leave_aside(*jax.eval_shape(self.program(boundary, static), *groups))

    def clear_cache(self) -> None:
        """Forgets all programs and plans."""
        self.programs.clear()
        self.plans.clear()
        self.latest = None

    def __repr__(self) -> str:
        return f"<nnx.{self.mode.name} of {self.fun!r}>"


class Stage:
    """One of JAX's stages (traced, lowered, compiled) of a function of live objects; attributes are the stage's own."""

    def __init__(self, stage: Any, owner: JitWrapped, fixed: tuple = ()):
        self._stage, self._owner, self._fixed = stage, owner, fixed  # fixed: first arguments of every call

    def lower(self, *args, **kwargs) -> Stage:
        return Stage(self._stage.lower(*args, **kwargs), self._owner, self._fixed)

    def compile(self, *args, **kwargs) -> Stage:
        return Stage(self._stage.compile(*args, **kwargs), self._owner, self._fixed)

    def with_fixed(self, *args: Any) -> Stage:
        """The same stage, to be called without its first arguments, which are these."""
        return Stage(self._stage, self._owner, args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner
        args, kwargs, static = owner.arguments.cut((*self._fixed, *args), kwargs)
        boundary, groups = owner.enter(args, kwargs, static)
        out, note = self._stage(*groups)
        return boundary.leave(out, note)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def __repr__(self) -> str:
        return f"<{type(self._stage).__name__} of {self._owner.fun!r}>"


def _comes_back(way: Any) -> bool:
    """A donated buffer is gone, a value sharded here stays where it was put: both come back, unchanged or not."""
    return way is not ANY and (way.donated or way.sharding is not None)


def _is_sharding_leaf(x: Any) -> bool:
    return x is None or isinstance(x, (Rule, jax.sharding.Sharding, jax.sharding.PartitionSpec)) or is_root(x)


def refuse_rules(mode: Mode, **prefixes: Any) -> None:
    """Labels by filter need live objects, and labels in the shape of an object need trees.

    Raises:
        ArgumentError: a prefix holds what the mode cannot take.
    """
    for name, prefix in prefixes.items():
        for spec in jax.tree.leaves(prefix, is_leaf=lambda x: isinstance(x, Rules) or is_root(x)):
            if isinstance(spec, Variable):
                raise ArgumentError(
                    f"Found Variable of type {type(spec).__name__} in `{name}` for nnx.{mode.name}. Variables prefixes "
                    "are not supported",
                    fix="give one label for the whole Variable, not a Variable around a label",
                )
            if is_root(spec) and mode.live:
                raise ArgumentError(
                    f"Found a graph node of type {type(spec).__name__} in `{name}` for nnx.{mode.name}. Graph nodes "
                    "are not allowed as prefixes when `graph=True` and `graph_updates=True`",
                    fix="use StateAxes, StateSharding or DiffState there, "
                    f"or nnx.{mode.name}(..., graph_updates=False)",
                )
            if isinstance(spec, Rules) and not mode.live:
                kind = type(spec).__name__
                raise ArgumentError(
                    f"`{name}` cannot contain `{kind}` objects when `graph=False` or `graph_updates=False`",
                    fix=f"remove them (nnx.prefix builds prefixes for that mode), or use "
                    f"nnx.{mode.name}(..., graph=True, graph_updates=True) or nnx.compat.{mode.name}",
                )


def jit(
    fun: Any = MISSING,
    *,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep_unused: bool = False,
    device: Any = None,
    backend: str | None = None,
    inline: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.jit` for functions of live objects: updates of their Variables and of their structure come back.

    Args:
        in_shardings, out_shardings: prefixes; `StateSharding` may stand for a module.
        graph, graph_updates: see `set_graph_mode` and `set_graph_updates`.

    Raises:
        ArgumentError: `fun` is a bound method.
        TraceContextError: `fun` writes an object that was not passed to it.
    """
    options: dict[str, Any] = {"keep_unused": keep_unused, "inline": inline}
    if device is not None:
        options["device"] = device
    if backend is not None:
        options["backend"] = backend
    if fun is MISSING:
        return functools.partial(
            jit,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            keep_unused=keep_unused,
            device=device,
            backend=backend,
            inline=inline,
            graph=graph,
            graph_updates=graph_updates,
        )
    mode = Mode.of("jit", graph, graph_updates)
    return JitWrapped(
        fun,
        mode,
        in_shardings,
        out_shardings,
        static_argnums,
        static_argnames,
        donate_argnums,
        donate_argnames,
        **options,
    )
