# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, held by reading the source: floors of imports, file heads, names, what an import loads."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "batiste"

# Imports go from a floor to a lower one, or stay inside their folder. What is in no list here is one of Flax's
# other names (core, cursor, ...): together one folder of the fifth floor, but for those that need little and are
# needed on lower floors, which have a floor of their own.
FLOORS = {
    "version": 0,
    "graph": 0,
    "errors": 1,
    "core.frozen_dict": 1,
    "struct": 1,
    "jax_utils": 1,
    "traceback_util": 1,
    "sharding": 1,
    "precision": 1,
    "io": 2,
    "traverse_util": 2,
    "serialization": 2,
    "transforms": 2,
    "nn": 3,
    "distributed": 2,
    "debug": 3,
    "linen": 4,
    "training": 4,
    "data": 4,
    "checkpoint": 4,
    "quant": 4,
    "nnx": 5,
    "models": 5,
    "export": 5,
    "serve": 5,
    "cli": 6,
}
# Folders of one floor that may import one another, each for a reason.
SIDEWAYS = {
    ("serve", "models"): "a server loads the decoders and encoders that it serves",
    ("serve", "export"): "a server loads the bundles that it serves",
    ("linen", "quant"): "variables of the functional face have their weights in the same whole numbers",
    ("export", "models"): "bundles have their weights in the files of models",
    ("nnx", "flax's other names"): "files of nnx show the names of types that Flax's files show",
    ("linen", "flax's other names"): "files of linen show the names of types that Flax's files show",
}
NAMES = "flax's other names"
NAMES_FLOOR = 5

VAGUE = {"util", "utils", "misc", "general", "common", "helpers"}
VAGUE_BUT_FLAXS = {"nnx/helpers.py", "nnx/transforms/general.py", "training/common_utils.py"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
# The words by which a test gives up; the house rules refuse them in every test file.
GIVEN_UP = re.compile(r"pytest\.(skip|xfail|importorskip)|mark\.(skip|skipif|xfail)\b|unittest\.skip")
LOCAL_PLACE = re.compile(r"(?<![\w.$}])/(work|tmp|home|root)/\w")


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders or ("batiste",) for file in (ROOT / folder).rglob("*.py"))


OURS = [ROOT / "conftest.py", *python_files("batiste", "tests", "examples", "bench")]


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def name_of(file: Path) -> str:
    """batiste/graph/states.py -> batiste.graph.states"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in python_files()}


def imports(file: Path, typing_only: bool = True) -> Iterator[tuple[int, str]]:
    """Line and full name of every import of a file; perhaps without those in `if TYPE_CHECKING` blocks."""
    waiting: list[ast.AST] = [tree(file)]
    package = name_of(file).split(".") if file.stem == "__init__" else name_of(file).split(".")[:-1]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            full = (f"{origin}.{alias.name}" for alias in node.names)
            yield from ((node.lineno, name if name in MODULES else origin) for name in full)
        elif typing_only or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            waiting.extend(ast.iter_child_nodes(node))


def ours(name: str) -> bool:
    return name == "batiste" or name.startswith("batiste.")


def folder_of(module: str) -> tuple[int, str]:
    """Floor and folder of a module of the package."""
    parts = module.split(".")[1:]
    part = next((part for part in (".".join(parts[:2]), parts[0]) if part in FLOORS), None)
    return (FLOORS[part], part) if part else (NAMES_FLOOR, NAMES)


def where(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_imports_go_down_the_floors_and_never_sideways() -> None:
    wrong = []
    for name, file in MODULES.items():
        if name == "batiste":
            continue
        floor, folder = folder_of(name)
        for line, target in imports(file):
            if target == "batiste":
                wrong.append(f"{where(file, line)}: imports from batiste itself; name the part")
            elif ours(target):
                other_floor, other = folder_of(target)
                allowed = (folder, other) in SIDEWAYS or target == "batiste.version"
                if other != folder and other_floor >= floor and not allowed:
                    wrong.append(f"{where(file, line)}: {folder} ({floor}) imports {target} ({other_floor})")
    assert not wrong, "\n".join(wrong)


def test_no_imports_in_a_circle() -> None:
    arrows = {
        name: {target for _, target in imports(file, typing_only=False) if target in MODULES and target != name}
        for name, file in MODULES.items()
    }
    done: set[str] = set()

    def circle_from(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        if name in done:
            return ()
        found = next(filter(None, (circle_from(target, (*path, name)) for target in sorted(arrows[name]))), ())
        done.add(name)
        return found

    circles = [" -> ".join(found) for name in arrows if (found := circle_from(name, ()))]
    assert not circles, "\n".join(circles)


def test_no_import_inside_a_function_but_through_need() -> None:
    wrong = []
    for file in MODULES.values():
        for function in ast.walk(tree(file)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                lines = [n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                wrong += [where(file, line) for line in lines]
    assert not wrong, "\n".join(wrong)


IMPORTED_WHEN_USED = {
    "batiste": "its parts",
    "batiste.as_flax": "its parts, under other names",
    "batiste.__main__": "the command line",
    "batiste.cli": "the command that was asked for",
    "batiste.core": "its names",
    "batiste.export.again": "the function that makes a bundle's model, which the user or a signature vouches for",
    "batiste.serve.child": "the function that makes what is served, which whoever starts the server names",
    "batiste.nnx": "its names",
    "batiste.nnx.variablelib": "hijax Variables",
    "batiste.graph.variable": "hijax Variables, which rest on experimental parts of JAX",
    "batiste.graph.pytree": "the function that a pickled function of JAX was made of",
    "batiste.graph.optional": "packages that batiste does not require",
}


def test_modules_are_imported_by_name_only_where_a_reason_is_given() -> None:
    users = {
        name for name, file in MODULES.items() if re.search(r"import_module|__import__|resolve_name", file.read_text())
    }
    assert users == set(IMPORTED_WHEN_USED)


def test_optional_packages_come_through_need() -> None:
    allowed = sys.stdlib_module_names | {"jax", "jaxlib", "numpy", "batiste"}
    wrong = [
        f"{where(file, line)}: {target}"
        for file in MODULES.values()
        for line, target in imports(file)
        if target.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_a_file_starts_with_its_licence_and_says_what_it_is_for() -> None:
    wrong = []
    for file in OURS:
        lines = file.read_text().splitlines()
        if file.name == "__init__.py" and not lines:
            continue
        if lines[:1] != ["# SPDX-License-Identifier: Apache-2.0"]:
            wrong.append(f"{where(file, 1)}: no SPDX line")
        elif len(lines) < 2 or not lines[1].startswith(('"""', 'r"""')) or not ast.get_docstring(tree(file)):
            wrong.append(f"{where(file, 2)}: no docstring")
    assert not wrong, "\n".join(wrong)


def test_no_file_has_a_vague_or_numbered_name() -> None:
    names = [file.relative_to(PACKAGE) for file in MODULES.values()]
    wrong = [str(n) for n in names if n.stem in VAGUE or re.search(r"[a-z]2$", n.stem)]
    assert set(wrong) <= VAGUE_BUT_FLAXS


def test_the_text_is_finished_and_speaks_only_of_the_project() -> None:
    pages = [file for end in ("*.md", "*.toml", ".ci/run", "docs/**/*.md") for file in ROOT.glob(end)]
    wrong = []
    for file in (*OURS, *pages):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = UNFINISHED.search(line) or LOCAL_PLACE.search(line)
            if found and file != Path(__file__):
                wrong.append(f"{where(file, number)}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    wrong = [
        where(file, number)
        for file in python_files("tests")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if GIVEN_UP.search(line) and file != Path(__file__)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lock_files_name_versions_and_no_place() -> None:
    for lock in sorted(file.name for file in ROOT.glob("requirements*")):
        for line in (ROOT / lock).read_text().splitlines():
            assert re.match(r"\s*#|[a-z0-9-]+==\S+( ; .*)?$", line), f"{lock}: {line}"
            assert not re.search(r"https?:|file:|--(extra-)?(index|find)", line), f"{lock}: {line}"


def test_decisions_are_numbered_short_and_say_their_title() -> None:
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        lines = page.read_text().splitlines()
        assert re.fullmatch(rf"# {page.stem[:4]}: .+", lines[0]), f"{page.name}: {lines[0]}"
        assert len(lines) <= 60, f"{page.name}: {len(lines)} lines; half a page is enough"


LOADED = """
import json, sys
before = set(sys.modules)
import jax, numpy
jaxs = {name.partition(".")[0] for name in sys.modules}
import batiste.nnx
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - jaxs - set(sys.stdlib_module_names))))
"""


def output(program: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env).stdout


def test_the_object_face_loads_no_package_but_jax_and_numpy() -> None:
    assert json.loads(output(LOADED)) == ["batiste"]


def test_the_package_alone_does_not_load_jax() -> None:
    program = "import batiste, sys; print(batiste.__version__, 'jax' in sys.modules, 'nnx' in dir(batiste))"
    assert output(program).split()[1:] == ["False", "True"]


def test_the_package_has_its_parts_and_nothing_else() -> None:
    assert output("import batiste; print(batiste.nnx.__name__, hasattr(batiste, 'nonsense'))") == "batiste.nnx False\n"


def test_state_dicts_and_dataclasses_load_neither_face() -> None:
    program = (
        "import sys, batiste.core, batiste.cursor, batiste.serialization, batiste.struct, batiste.traverse_util\n"
        "print([name for name in sys.modules if name.startswith(('batiste.linen', 'batiste.nn'))])"
    )
    assert output(program) == "[]\n"
