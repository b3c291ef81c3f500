# SPDX-License-Identifier: Apache-2.0
"""The object face's names load when they are used, and the stub for type checkers says the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batiste import nnx

STUB = Path(nnx.__file__).with_suffix(".pyi")
HEAD = """# SPDX-License-Identifier: Apache-2.0
# What `batiste.nnx` offers, for type checkers; the table in `__init__.py` is the source.
"""


def in_import_order(entry: tuple[str, str]) -> tuple:
    """By module; of one module first CONSTANTS, then Classes, then the rest."""
    home, name = entry
    return home, not (name.isupper() and len(name) > 1), not name[0].isupper(), name.lower()


def expected_stub() -> str:
    imports = [(home, name) for home, names in nnx._HOMES.items() for name in names.split()]
    others = [("PureState", "tuple"), ("VariableState", "Variable")]
    for name, module in nnx._MODULES.items():
        package, _, last = module.rpartition(".")
        if last == name:
            imports.append((package, name))
        else:
            others.append((name, last))
    lines = [f"from {home} import {name} as {name}" for home, name in sorted(imports, key=in_import_order)]
    return "\n".join([HEAD, *lines, "", *(f"{name} = {value}" for name, value in sorted(others)), ""])


if os.environ.get("BATISTE_ACCEPT_NAMES") == "1":
    STUB.write_text(expected_stub())


def test_the_stub_says_what_the_table_says():
    assert STUB.read_text() == expected_stub(), "run with BATISTE_ACCEPT_NAMES=1 to write it anew"


@pytest.mark.parametrize("name", sorted(nnx._HOME_OF))
def test_every_name_is_found_and_has_a_docstring(name):
    value = getattr(nnx, name)
    assert value is getattr(nnx, name) and name in dir(nnx)
    if callable(value) and getattr(value, "__module__", "").startswith("batiste"):
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nnx.no_such_name


def test_the_old_name_of_variable_warns():
    with pytest.warns(DeprecationWarning, match="Variable"):
        assert nnx.VariableState is nnx.Variable


def test_modules_under_flax_names_import():
    modules = sorted(m for m in set(nnx._MODULES.values()))
    subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
