# SPDX-License-Identifier: Apache-2.0
"""Process-wide flags: declared once, read as plain attributes of `config`, preset by environment variables.

A flag `flax_profile` is read from `FLAX_PROFILE` when it is declared, changed by `config.update`, and overridden for a
while by `config.temp_flip_flag`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, TypeVar, overload

T = TypeVar("T")

TRUE_WORDS = frozenset({"y", "yes", "t", "true", "on", "1"})
FALSE_WORDS = frozenset({"n", "no", "f", "false", "off", "0"})


class Config:
    """Holder of all flags; `config.name` reads one.

    >>> with config.temp_flip_flag("max_repr_depth", 2):
    ...     config.flax_max_repr_depth
    2
    """

    flax_filter_frames: bool
    flax_profile: bool
    flax_use_orbax_checkpointing: bool
    flax_preserve_adopted_names: bool
    flax_return_frozendict: bool
    flax_fix_rng_separator: bool
    flax_use_flaxlib: bool
    flax_array_ref: bool
    flax_pytree_module: bool
    flax_max_repr_depth: int | None
    flax_always_shard_variable: bool
    flax_hijax_variable: bool
    nnx_graph_mode: bool
    nnx_graph_updates: bool
    check_plans: bool

    def __init__(self):
        self._values: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_values":
            raise AttributeError(f"config.{name} has no setter: call config.update({name!r}, {value!r}) instead.")
        super().__setattr__(name, value)

    @overload
    def update(self, name_or_holder: str, value: Any, /) -> None: ...

    @overload
    def update(self, name_or_holder: FlagHolder[T], value: T, /) -> None: ...

    def update(self, name_or_holder, value, /) -> None:
        """Sets a flag, given by name or by its holder, from here on.

        Raises:
            LookupError: there is no such flag.
        """
        name = name_or_holder.name if isinstance(name_or_holder, FlagHolder) else name_or_holder
        if name not in self._values:
            raise LookupError(f"Unrecognized config option: {name}. The options are {', '.join(self._values)}.")
        self._values[name] = value

    @contextmanager
    def temp_flip_flag(self, var_name: str, var_value: Any) -> Iterator[None]:
        """Sets a flag for the body of a `with`; the prefix `flax_` of its name may be left out.

        Raises:
            AttributeError: there is no such flag.
        """
        name = var_name if var_name in self._values else f"flax_{var_name}"
        before = getattr(self, name)
        self.update(name, var_value)
        try:
            yield
        finally:
            self.update(name, before)

    def _read(self, name: str) -> Any:
        """The value of a flag that is given by name."""
        return getattr(self, name)

    def __repr__(self) -> str:
        values = ", ".join(f"\n  {name}={value!r}" for name, value in self._values.items())
        return f"Config({values}\n)"


class FlagHolder(Generic[T]):
    """Handle of one flag: `holder.value` reads it, `config.update(holder, value)` sets it."""

    def __init__(self, name: str, help: str):
        self.name = name
        self.__name__ = name.removeprefix("flax")
        self.__doc__ = f"Flag holder for `{name}`.\n\n{help}"

    @property
    def value(self) -> T:
        return getattr(config, self.name)

    def __bool__(self) -> NoReturn:
        raise TypeError(f"bool() not supported for the flag holder of {self.name}: its value is `.value`.")


config = Config()


def bool_flag(name: str, *, default: bool, help: str) -> FlagHolder[bool]:
    """Declares a boolean flag; the environment variable of the same name in capitals presets it."""
    return _declare(name.lower(), static_bool_env(name.upper(), default), help)


def int_flag(name: str, *, default: int | None, help: str) -> FlagHolder[int]:
    """Declares an integer flag; the environment variable of the same name in capitals presets it."""
    return _declare(name.lower(), static_int_env(name.upper(), default), help)


def static_bool_env(varname: str, default: bool) -> bool:
    """Reads a boolean (yes/no, true/false, on/off, 1/0 ...) from the environment.

    Raises:
        ValueError: the variable is set to any other word.
    """
    word = os.getenv(varname, str(default)).lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(f"invalid truth value {word!r} for environment {varname!r}: write 1 or 0.")


def static_int_env(varname: str, default: int | None) -> int | None:
    """Reads an integer from the environment.

    Raises:
        ValueError: the variable is set, but to no integer.
    """
    word = os.getenv(varname)
    if word is None:
        return default
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"invalid integer value {word!r} for environment {varname!r}.") from None


def _declare(name: str, value: Any, help: str) -> FlagHolder:
    if name in config._values:
        raise RuntimeError(f"Config option {name} already defined: choose another name.")
    config._values[name] = value
    setattr(Config, name, property(lambda self: self._values[name]))
    return FlagHolder(name, help)


flax_filter_frames = bool_flag("flax_filter_frames", default=True, help="Hide the library's own frames in tracebacks.")
flax_profile = bool_flag(
    "flax_profile", default=True, help="Run module methods under jax.named_scope, so that profiles show them by name."
)
flax_use_orbax_checkpointing = bool_flag(
    "flax_use_orbax_checkpointing", default=True, help="The legacy checkpoint functions write with Orbax."
)
flax_preserve_adopted_names = bool_flag(
    "flax_preserve_adopted_names", default=False, help="A functional module passed into another one keeps its name."
)
flax_return_frozendict = bool_flag(
    "flax_return_frozendict", default=False, help="init and apply of functional modules return FrozenDicts."
)
flax_fix_rng = bool_flag(
    "flax_fix_rng_separator", default=False, help="Put separators between the names that are folded into a random key."
)
flax_use_flaxlib = bool_flag(
    "flax_use_flaxlib", default=False, help="Accepted for compatibility; there is no C++ library to switch to."
)
flax_array_ref = bool_flag("flax_array_ref", default=False, help="Accepted for compatibility; it has no effect.")
flax_pytree_module = bool_flag("flax_pytree_module", default=True, help="Modules are JAX pytrees by default.")
flax_max_repr_depth = int_flag(
    "flax_max_repr_depth", default=None, help="How many levels of nested objects a repr shows; None shows all."
)
flax_always_shard_variable = bool_flag(
    "flax_always_shard_variable", default=True, help="A Variable with sharding metadata is sharded when it is created."
)
flax_hijax_variable = bool_flag("flax_hijax_variable", default=False, help="New Variables are hijax Variables.")
nnx_graph_mode = bool_flag(
    "nnx_graph_mode", default=True, help="Default of graph=: objects may be shared (True), or form a tree (False)."
)
nnx_graph_updates = bool_flag(
    "nnx_graph_updates", default=True, help="Default of graph_updates=: transforms hand structural changes back."
)
check_plans = _declare(
    "check_plans",
    static_bool_env("BATISTE_CHECK_PLANS", False),
    "Walk the arguments of every call again and compare them with the remembered plan (slow; for tests).",
)
