# SPDX-License-Identifier: Apache-2.0
"""Settings: texts become values of the types that a configuration states, and what is wrong is explained."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any, Literal

import pytest

from batiste.cli.settings import configured, settings_of, table
from batiste.cli.usage import UsageError


class Colour(enum.Enum):
    red = 1
    green = 2


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(lr=0.2))


@dataclasses.dataclass
class Config:
    steps: int
    name: str = "run"
    folder: Path | None = None
    fast: bool = False
    colour: Colour = Colour.red
    mode: Literal["a", "b", 3] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "x")
    names: list[str] = dataclasses.field(default_factory=list)
    outer: Outer = dataclasses.field(default_factory=Outer)
    perhaps: Inner | None = None
    object: Any = None
    made: int = dataclasses.field(default=5, init=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=a=b", "a=b"),
        ("folder=x/y", Path("x/y")),
        ("folder=none", None),
        ("fast=yes", True),
        ("fast=False", False),
        ("colour=green", Colour.green),
        ("mode=b", "b"),
        ("mode=3", 3),
        ("sizes=", ()),
        ("sizes=(3, 4,5)", (3, 4, 5)),
        ("pair=2,y", (2, "y")),
        ("names=a,b", ["a", "b"]),
        ("outer.inner.lr=3e-4", 3e-4),
        ("outer.inner.clip=none", None),
        ("steps=1_000", 1000),
    ],
)
def test_a_text_becomes_a_value_of_the_stated_type(text: str, value: Any) -> None:
    found: Any = configured(Config, ["steps=7", text])
    for name in text.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_what_is_not_set_keeps_its_default_also_in_nested_dataclasses() -> None:
    config = configured(Config, ["steps=7", "outer.inner.clip=2"])
    assert config == Config(7, outer=Outer(Inner(lr=0.2, clip=2.0)))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["steps"], "A setting is written key=value: got 'steps'"),
        (["steps=1.5"], "The value of 'steps' has the wrong type: got '1.5', expected int"),
        (["fast=maybe"], "expected bool"),
        (["colour=blue"], "got 'blue', expected red | green"),
        (["mode=c"], "expected a | b | 3"),
        (["pair=1,2,3"], r"expected tuple[int, str]"),
        (["sizes=1,x"], "expected tuple[int, ...]"),
        (["outer=3"], "There is no setting 'outer'"),
        (["outer.inner.rl=3"], "did you mean 'outer.inner.lr'?"),
        (["lr=3"], "did you mean 'outer.inner.lr'?"),
        (["made=6"], "There is no setting 'made': expected one of steps, name, folder"),
        (["object=6"], "The value of 'object' has the wrong type"),
        (["name=x"], "Settings without a default are missing: got steps.\n  fix: --set steps=…"),
    ],
)
def test_what_is_wrong_is_explained(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        configured(Config, texts)
    assert message in str(error.value)


def test_the_table_shows_types_and_defaults() -> None:
    assert len(list(settings_of(Config))) == 13
    lines = table(Config).splitlines()
    assert lines[0].split() == ["steps", "int", "required"]
    assert ["outer.inner.lr", "float", "=", "0.2"] in [line.split() for line in lines]
