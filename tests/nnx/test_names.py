# SPDX-License-Identifier: Apache-2.0
"""The object face's names load when they are used, and the stub for type checkers says the same."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batiste import nnx

STUB = Path(nnx.__file__).with_suffix(".pyi")
HEAD = '''# SPDX-License-Identifier: Apache-2.0
"""What `batiste.nnx` offers, for type checkers; the table in `__init__.py` is the source."""

from typing import TypeVar

'''


def expected_stub() -> str:
    lines = [
        f"from {home} import {name} as {name}" for home, names in nnx._HOMES.items() for name in sorted(names.split())
    ]
    for name, module in nnx._MODULES.items():
        package, _, last = module.rpartition(".")
        if importlib.util.find_spec(module) is not None:
            lines.append(f"from {package} import {last} as {name}")
    return (
        HEAD
        + "\n".join(sorted(lines))
        + '\n\nA = TypeVar("A")\nM = TypeVar("M")\nPureState = tuple\nVariableState = Variable\n'
    )


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
        nnx.no_such_name


def test_the_old_name_of_variable_warns():
    with pytest.warns(DeprecationWarning, match="Variable"):
        assert nnx.VariableState is nnx.Variable


def test_modules_under_flax_names_import():
    modules = sorted(m for m in set(nnx._MODULES.values()))
    subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
