# SPDX-License-Identifier: Apache-2.0
"""PROGRAM.py:NAME: a file and the function in it that makes an Experiment."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .experiment import Experiment
from .settings import configured, meant
from .usage import UsageError


@dataclasses.dataclass(frozen=True)
class Program:
    """The function, and the dataclass of its settings, if it takes one."""

    name: str
    make: Callable[..., Any]
    config: type | None

    def experiment(self, texts: Sequence[str]) -> Experiment:
        """What the function makes of settings, each a text `key=value`."""
        if self.config is None and texts:
            raise UsageError(f"{self.name} takes no settings", got=" ".join(texts))
        made = self.make() if self.config is None else self.make(configured(self.config, texts))
        if not isinstance(made, Experiment):
            raise UsageError(
                f"{self.name} made no experiment", got=type(made).__name__, expected="a batiste.cli.Experiment"
            )
        return made


def program(target: str) -> Program:
    """The program that `PROGRAM.py:NAME` names; NAME may be left out where only one function returns an Experiment.

    Raises:
        UsageError: there is no such file or function, or it does not take one configuration.
    """
    path, _, name = target.partition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UsageError(
            "There is no such program", got=repr(path), expected="PROGRAM.py:NAME, a file and a function in it"
        )
    module = loaded(Path(path).resolve())
    made_here = {
        n: x for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__
    }  # fmt: skip
    makers = [n for n, x in made_here.items() if typing.get_type_hints(x).get("return") is Experiment]
    if not name and len(makers) == 1:
        name = makers[0]
    found = getattr(module, name, None) if name else None
    if not callable(found):
        choices = makers or [n for n in made_here if not n.startswith("_")]
        raise UsageError(
            f"{path} has no function {name!r}" if name else f"Which function of {path}?",
            expected=f"one of {', '.join(f'{path}:{n}' for n in choices)}" if choices else "a function",
            fix=meant(name, choices),
        )
    return Program(f"{path}:{name}", found, config_of(found, f"{path}:{name}"))


def config_of(function: Callable[..., Any], name: str) -> type | None:
    """The dataclass that a function takes; None if it takes nothing."""
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if not needed:
        return None
    kind = typing.get_type_hints(function).get(needed[0].name)
    if len(needed) > 1 or not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UsageError(
            f"{name} has the wrong arguments",
            got=str(inspect.signature(function)),
            expected="none, or one that is annotated with a dataclass",
        )
    return kind


def loaded(path: Path) -> ModuleType:
    """The file as a module of its own name, which processes that the program starts can import too."""
    present = sys.modules.get(path.stem)
    if present is not None:
        if getattr(present, "__file__", None) == str(path):
            return present
        raise UsageError(
            f"A program cannot have the name of a module that is in use, {path.stem}", fix="rename the file"
        )
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError("This is no program", got=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
