# SPDX-License-Identifier: Apache-2.0
"""Runs programs that were written for Flax: `import flax` gives batiste.

    python -m batiste.as_flax PROGRAM [ARGUMENTS]       as `python PROGRAM [ARGUMENTS]`
    python -m batiste.as_flax -m MODULE [ARGUMENTS]     as `python -m MODULE [ARGUMENTS]`

From inside a program, `batiste.install_as_flax()` does the same for every import that follows. The modules are the very
same objects under both names, so `flax.nnx.Module is batiste.nnx.Module`. What asks for the installed version of Flax,
by `flax.__version__` or by `importlib.metadata`, is told the version whose names and behaviour batiste has. Processes
that the program starts anew do not inherit any of this; forks do.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import zipfile
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

FLAX_VERSION = "0.12.8"
PACKAGE = Path(__file__).parent
USAGE = """\
usage: python -m batiste.as_flax [-h] PROGRAM [ARGUMENTS]
       python -m batiste.as_flax -m MODULE [ARGUMENTS]"""


class FlaxImportedError(ImportError):
    """The real Flax was imported before batiste could take its name."""


def install_as_flax() -> None:
    """From here on, `import flax` and whatever is below it gives batiste. A second call changes nothing.

    Raises:
        FlaxImportedError: the real Flax was imported before.
    """
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    there = min((name for name in sys.modules if name == "flax" or name.startswith("flax.")), default=None)
    if there is not None:
        raise FlaxImportedError(
            f"The real Flax was already imported, as {there!r} from {getattr(sys.modules[there], '__file__', None)}: "
            "two libraries of one name cannot be told apart.\n"
            "  Fix: call batiste.install_as_flax() before the first import of flax, or of a package that imports it, "
            "or run the program by `python -m batiste.as_flax PROGRAM`.",
            name=there,
        )
    sys.meta_path.insert(0, Finder())


# ---------------------------------------------------------------- modules under another name


class Finder(DistributionFinder):
    """Finds the modules of `flax` in batiste, and says that Flax is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "flax" or fullname in VERSIONED:
            return ModuleSpec(
                fullname, VersionedLoader(), origin=str(PACKAGE / "__init__.py"), is_package=fullname == "flax"
            )
        if not fullname.startswith("flax."):
            return None
        found = find_spec(_ours(fullname))  # the parent is imported by now, so nothing else is
        if found is None:
            return None
        package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, AliasLoader(), origin=found.origin, is_package=package)

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()) -> Any:  # noqa: B008
        return [FlaxDistribution()] if context.name is None or context.name.lower() == "flax" else []


def _ours(fullname: str) -> str:
    return "batiste" + fullname.removeprefix("flax")


class AliasLoader(Loader):
    """Gives batiste's module itself, as it is."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_ours(spec.name))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the alias's there
        _enter_aliases()


def _enter_aliases() -> None:
    """Enters each of batiste's modules that is loaded under its other name.

    A module that the import system loads itself is bound in its package; one that is entered here is not, so that a
    package may give the name of a module to something else.
    """
    for name, module in list(sys.modules.items()):
        alias = "flax" + name.removeprefix("batiste")
        if name.startswith("batiste.") and alias not in VERSIONED and not _is_being_loaded(module):
            sys.modules.setdefault(alias, module)


def _is_being_loaded(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


class VersionedLoader(Loader):
    """Makes the modules that tell Flax's version in place of batiste's: `flax` itself, and `flax.version`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return FlaxModule(spec.name, f"batiste, under the name {spec.name}.")

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = FLAX_VERSION  # type: ignore[attr-defined]
        if module.__name__ == "flax":
            module.__path__ = [str(PACKAGE)]


class FlaxModule(ModuleType):
    """A module whose names are those of batiste's, but for the version."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_ours(self.__name__)), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(importlib.import_module(_ours(self.__name__)))})


VERSIONED = ("flax.version",)


class FlaxDistribution(Distribution):
    """What `importlib.metadata` is told about Flax."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flax\nVersion: {FLAX_VERSION}\nSummary: batiste, as Flax\n",
            "top_level.txt": "flax\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        return PACKAGE.parent / path


# ---------------------------------------------------------------- running a program


def main() -> None:
    """Runs the program that the command line names, as Python would."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\nRuns a program that was written for Flax, as Python would; `import flax` gives batiste.")
        return
    module_is_named = arguments[:1] == ["-m"]
    if not arguments[module_is_named:] or (arguments[0].startswith("-") and not module_is_named):
        _stop(2, f"{USAGE}\nerror: no PROGRAM or MODULE to run" + (f": {arguments[0]}" if arguments else ""))
    sys.argv[:] = arguments[module_is_named:]
    sys.excepthook = _shown_from_the_program_on(sys.excepthook)
    install_as_flax()
    code, settings = (_module if module_is_named else _program)(sys.argv[0])
    program = ModuleType("__main__")
    vars(program).update(__builtins__=__builtins__, **settings)
    sys.modules["__main__"] = program
    exec(code, vars(program))


def _program(path: str) -> tuple[CodeType, dict[str, Any]]:
    """The code of a file, or of a directory or archive with a `__main__`; and the names that it starts with."""
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        sys.path[: not sys.flags.safe_path] = [os.path.abspath(path)]
        return _code(PathFinder.find_spec("__main__", sys.path[:1]), path, package="")
    file = os.path.abspath(path)
    try:
        with io.open_code(file) as stream:
            source = stream.read()
    except OSError as error:
        _stop(2, f"{sys.executable}: can't open file {file!r}: [Errno {error.errno}] {error.strerror}")
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    settings = {"__loader__": SourceFileLoader("__main__", file), "__spec__": None, "__package__": None}
    return compile(source, file, "exec", dont_inherit=True), {**settings, "__file__": file, "__cached__": None}


def _module(name: str) -> tuple[CodeType, dict[str, Any]]:
    """The code of a module, or of a package's `__main__`; and the names that it starts with."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        problem = f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})"
        _stop(1, f"{sys.executable}: {problem}")
    code, settings = _code(spec, name, package=spec.parent if spec else "")
    sys.argv[0] = settings["__file__"]
    return code, settings


def _code(spec: ModuleSpec | None, name: str, package: str | None) -> tuple[CodeType, dict[str, Any]]:
    loader: Any = spec and spec.loader
    if spec is None or not hasattr(loader, "get_code"):
        _stop(1, f"{sys.executable}: No module named {name}")
    settings = {"__spec__": spec, "__loader__": loader, "__package__": package, "__cached__": spec.cached}
    return loader.get_code(spec.name), {**settings, "__file__": spec.origin}


def _shown_from_the_program_on(show: Callable[..., None]) -> Callable[..., None]:
    """An excepthook that leaves out what called the program."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith((__file__, "<frozen ")):
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    return hook


def _stop(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    importlib.import_module("batiste.as_flax").main()  # not this copy of the module, which is `__main__`
