# SPDX-License-Identifier: Apache-2.0
"""Settings of a program: a configuration dataclass, changed by texts `key=value`, and the table of what it holds."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from .usage import UsageError

C = TypeVar("C")
REQUIRED = dataclasses.MISSING
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Setting(NamedTuple):
    """One setting: `optimizer.lr`, its type, the value it has unless it is set, and what its field says of it."""

    key: str
    type: Any
    default: Any
    help: str


def settings_of(config: type, default: Any = REQUIRED, above: str = "") -> Iterator[Setting]:
    """All settings of a configuration; those of a dataclass within it have keys with dots.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     lr: float = 0.1
    ...     layers: tuple[int, ...] = dataclasses.field(default=(64, 64), metadata={"help": "sizes of the layers"})
    >>> for setting in settings_of(Config):
    ...     print(setting.key, typename(setting.type), setting.default, setting.help)
    lr float 0.1
    layers tuple[int, ...] (64, 64) sizes of the layers
    """
    for field, kind in fields_of(config):
        value = default_of(field) if default is REQUIRED else getattr(default, field.name)
        inner = nested(kind)
        if inner is not None and value is not None:
            yield from settings_of(inner, value, f"{above}{field.name}.")
        else:
            yield Setting(above + field.name, kind, value, field.metadata.get("help", ""))


def fields_of(config: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields that may be set, with their types."""
    hints = typing.get_type_hints(config)
    return [(field, hints[field.name]) for field in dataclasses.fields(config) if field.init]


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def nested(kind: Any) -> type | None:
    """The dataclass that a type is, or is unless it is None."""
    choices = [choice for choice in alternatives(kind) if dataclasses.is_dataclass(choice)]
    return choices[0] if len(choices) == 1 and isinstance(choices[0], type) else None


def configured(config: type[C], texts: Iterable[str]) -> C:
    """A configuration with some settings changed, each by a text `key=value`.

    Raises:
        UsageError: a key is not known, a value is not of its type, or a setting without a default is missing.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     lr: float = 0.1
    ...     layers: tuple[int, ...] = (64, 64)
    >>> configured(Config, ["lr=3e-4", "layers=8,8,8"])
    Config(lr=0.0003, layers=(8, 8, 8))
    """
    known = {setting.key: setting for setting in settings_of(config)}
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError("A setting is written key=value", got=repr(text))
        if key not in known:
            raise UsageError(
                f"There is no setting {key!r}", expected=f"one of {', '.join(known)}", fix=meant(key, known)
            )
        values[key] = parsed(value, known[key].type, key)
    missing = [key for key, setting in known.items() if setting.default is REQUIRED and key not in values]
    if missing:
        raise UsageError(
            "Settings without a default are missing",
            got=", ".join(missing),
            fix=" ".join(f"--set {k}=…" for k in missing),
        )
    return build(config, values)


def meant(word: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    known = list(known)
    last = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(word, known, 1) or difflib.get_close_matches(word.rpartition(".")[2], last, 1)
    return f"did you mean {last.get(close[0], close[0])!r}?" if close else None


def build(config: type[C], values: dict[str, Any], default: Any = REQUIRED) -> C:
    """The configuration; keys of `values` may have dots."""
    changes: dict[str, Any] = {}
    for field, kind in fields_of(config):
        below = {key.partition(".")[2]: v for key, v in values.items() if key.partition(".")[0] == field.name}
        if below.keys() == {""}:
            changes[field.name] = below[""]
        elif below:
            before = default_of(field) if default is REQUIRED else getattr(default, field.name)
            changes[field.name] = build(nested(kind) or type(before), below, before)
    return config(**changes) if default is REQUIRED else dataclasses.replace(default, **changes)


# ---------------------------------------------------------------- texts and types


def alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def typename(kind: Any) -> str:
    """A type as it is shown.

    >>> typename(int | None), typename(Literal["adam", "sgd"])
    ('int | None', 'adam | sgd')
    """
    if len(choices := alternatives(kind)) > 1:
        return " | ".join(map(typename, choices))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " | ".join(member.name for member in kind)
    if origin is not None:
        inside = ", ".join("..." if a is ... else typename(a) for a in arguments)
        return f"{origin.__name__}[{inside}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def parsed(text: str, kind: Any, key: str) -> Any:
    """The value that a text stands for.

    >>> parsed("none", float | None, "clip"), parsed("1,2", tuple[int, ...], "sizes"), parsed("yes", bool, "on")
    (None, (1, 2), True)
    """
    try:
        return first_of(text, kind)
    except ValueError:
        raise UsageError(f"The value of {key!r} has the wrong type", got=repr(text), expected=typename(kind)) from None


def first_of(text: str, kind: Any) -> Any:
    """The value of the first type of a union that takes the text; None comes first."""
    for choice in sorted(alternatives(kind), key=lambda choice: choice is not type(None)):
        try:
            return value_of(text, choice)
        except ValueError:
            continue
    raise ValueError(text)


def value_of(text: str, kind: Any) -> Any:
    """The value of a type that is no union; a ValueError if the text is of another."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {str(choice): choice for choice in arguments}[text] if text in map(str, arguments) else wrong(text)
    if origin in (tuple, list):
        return sequence_of(text, origin, arguments)
    if kind is bool:
        return text.lower() in TRUE if text.lower() in TRUE + FALSE else wrong(text)
    if kind is type(None):
        return None if text.lower() == "none" else wrong(text)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind[text] if text in kind.__members__ else wrong(text)
    if kind in (int, float, str, Path):
        return kind(text)
    raise ValueError(f"{typename(kind)} cannot be set from the command line")


def sequence_of(text: str, origin: type, arguments: tuple[Any, ...]) -> Any:
    parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
    if origin is list or arguments[1:] == (...,):
        kinds = [arguments[0] if arguments else str] * len(parts)
    else:
        kinds = list(arguments)
    if len(kinds) != len(parts):
        raise ValueError(f"{len(parts)} parts")
    return origin(first_of(part, kind) for part, kind in zip(parts, kinds))


def wrong(text: str) -> Any:
    raise ValueError(text)


def table(config: type) -> str:
    """The settings with their types and defaults, one a line."""
    rows = []
    for key, kind, default, said in settings_of(config):
        shown = "required" if default is REQUIRED else f"= {getattr(default, 'name', default)}"
        rows.append((key, typename(kind), shown, said))
    widths = [max(map(len, column)) for column in zip(*rows)] if rows else []
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
