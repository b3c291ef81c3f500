# SPDX-License-Identifier: Apache-2.0
"""Optional packages: loaded when needed, and missed with the name of the extra that brings them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batiste.graph.optional import need


def test_what_is_installed_is_imported() -> None:
    assert need("json", extra="display") is json


def test_what_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(ImportError, match=r"'no_such_package'.*not installed") as caught:
        need("no_such_package.inner", extra="display")
    assert "pip install 'batiste[display]'" in str(caught.value)
    assert caught.value.name == "no_such_package.inner"


def test_a_package_without_its_own_dependency_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        need("half_installed", extra="display")
    assert "batiste[" not in str(caught.value)
