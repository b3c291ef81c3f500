# SPDX-License-Identifier: Apache-2.0
"""Policies for modules of the functional face: the same module, computed in other dtypes than it is kept in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from batiste.precision.policy import Path, Policy, cast, fits, moments_apart
from batiste.precision.policy import policy as policy_named

from .context import InterceptorContext, intercept_methods
from .module import Module

__all__ = ["Mixed", "mixed"]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A module under a policy: `init` and `apply` as those of the module. Made by `mixed`."""

    module: Module
    policy: Policy

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """The module's variables, parameters in the dtype that the policy keeps them in."""
        return self.init_with_output(*args, **kwargs)[1]

    def init_with_output(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As `init`, with the result of the call, which is not under the policy."""
        kept = _Kept(self.policy)
        with intercept_methods(kept.note):
            y, variables = self.module.init_with_output(*args, **kwargs)

        def store(path: Any, x: Any) -> Any:
            names = tuple(getattr(entry, "key", None) for entry in path)
            if names[0] != "params":
                return x
            return cast(x, self.policy.accumulate if kept.covers(names[1:]) else self.policy.param)

        return y, jax.tree_util.tree_map_with_path(store, variables)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """As `module.apply`; every module computes in the dtype that the policy says."""
        with intercept_methods(_Kept(self.policy).run):
            return self.module.apply(*args, **kwargs)


def mixed(module: Module, policy: Policy | str) -> Mixed:
    """A module as it computes under a policy: parameters are cast as they are used, and `dtype` settings are set

    Modules that the policy keeps wide (`*Norm`, `*router*`, by path or class) do so here as in the object face, and so
    do parameters that a module makes by itself. The variables that go in and come out are the module's own.

    >>> from batiste import linen as nn
    >>> import jax.numpy as jnp
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.LayerNorm()(nn.Dense(4)(x) * self.param("scale", nn.initializers.ones, (1, 4)))
    >>> x = jnp.ones((1, 2), jnp.bfloat16)
    >>> model = mixed(Model(), "bfloat16")
    >>> variables = model.init(jax.random.key(0), x)
    >>> variables["params"]["scale"].dtype, model.apply(variables, x).dtype
    (dtype('float32'), dtype(bfloat16))
    """
    return Mixed(module, policy_named(policy) if isinstance(policy, str) else policy)


class _Kept:
    """What is put around the calls of a model: it knows which modules stay wide."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.paths: set[Path] = set()
        self._inside: set[int] = set()

    def covers(self, path: Path) -> bool:
        return any(path[:n] in self.paths for n in range(len(path) + 1))

    def note(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        """Learns whether the module that is being called is kept."""
        module = context.module
        if module.scope is not None and fits(module.path, type(module), self.policy.keep):
            self.paths.add(module.path)
        return call(*args, **kwargs)

    def run(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        """Calls a method while settings and parameters of the module are those that the policy gives."""
        module = context.module
        if module.scope is None or id(module) in self._inside:
            return call(*args, **kwargs)
        self._inside.add(id(module))
        try:
            return self.note(self._within(call, module), args, kwargs, context)
        finally:
            self._inside.discard(id(module))

    def _within(self, call: Callable[..., Any], module: Any) -> Callable[..., Any]:
        def under_policy(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for part in (module, *self._parts(module)):  # a cell is asked for its first carry before it is called
                    stack.enter_context(self._settings(part, self.covers(part.path)))
                stack.enter_context(self._parameters(module.scope, self.covers(module.path)))
                return call(*args, **kwargs)

        return under_policy

    def _parts(self, module: Any) -> list[Any]:
        """The modules in attributes of a module."""
        return [x for name, x in vars(module).items() if name != "parent" and isinstance(x, Module) and x.scope]

    @contextlib.contextmanager
    def _settings(self, module: Any, is_kept: bool) -> Iterator[None]:
        """For a while, the fields `dtype` and `dot_general` of a module are others."""
        dtype = self.policy.accumulate if is_kept else self.policy.compute
        new = {"dtype": self.policy.compute if moments_apart(module) else dtype, "param_dtype": dtype}
        if not is_kept:
            new |= self.policy.replaces(module)
        fields = vars(module)
        before = {name: fields[name] for name in new if name in fields and "dtype" in fields}
        try:
            fields.update({name: new[name] for name in before})
            yield
        finally:
            fields.update(before)

    @contextlib.contextmanager
    def _parameters(self, scope: Any, is_kept: bool) -> Iterator[None]:
        """For a while, the parameters of a scope, but not of those below it, are cast."""
        dtype = self.policy.accumulate if is_kept else self.policy.compute
        changed = []
        for cell in scope.cells.get("params", {}).values():
            old = cell.get_raw_value()
            if not isinstance(old, dict):
                new = jax.tree.map(lambda x: cast(x, dtype), old)
                cell.set_raw_value(new)
                changed.append((cell, old, new))
        try:
            yield
        finally:
            for cell, old, new in changed:
                if cell.get_raw_value() is new:
                    cell.set_raw_value(old)
