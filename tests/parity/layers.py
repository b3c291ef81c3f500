# SPDX-License-Identifier: Apache-2.0
"""The parity table: every layer in several configurations, gathered from the lists `CASES` of all `cases_*.py`."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.parity.case import Case


def gather() -> list[Case]:
    """All cases, file by file; names must be unique."""
    cases: list[Case] = []
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        cases += importlib.import_module(f"tests.parity.{path.stem}").CASES
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"two cases of one name: {sorted(n for n in names if names.count(n) > 1)}")
    return cases


CASES = gather()
