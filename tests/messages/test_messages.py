# SPDX-License-Identifier: Apache-2.0
"""What users read when something is wrong: every message is compared with the text that is kept in `messages.txt`.

To accept new texts, run `BATISTE_ACCEPT_MESSAGES=1 pytest tests/messages`, and read the difference as a user would.
"""

import importlib
import os
import pkgutil
import re
from pathlib import Path

import pytest

import tests.messages as here

FILE = Path(__file__).with_name("messages.txt")
CASES = [
    (f"{module.name.removeprefix('cases_')}: {name}", provoke)
    for module in sorted(pkgutil.iter_modules(here.__path__), key=lambda m: m.name) if module.name.startswith("cases_")
    for name, provoke in importlib.import_module(f"tests.messages.{module.name}").CASES
]  # fmt: skip
ACCEPT = os.environ.get("BATISTE_ACCEPT_MESSAGES") == "1"


def kept() -> dict[str, str]:
    if not FILE.exists():
        return {}
    parts = re.split(r"^== (.*)\n", FILE.read_text(), flags=re.MULTILINE)[1:]
    return {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2])}


def message(provoke) -> str:
    """The class and the text of the error, without what differs from run to run."""
    try:
        provoke()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
        return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
    return "no error"


def test_there_are_at_least_thirty_and_no_name_twice():
    names = [name for name, _ in CASES]
    assert len(names) >= 30 and len(names) == len(set(names))


def test_the_file_holds_nothing_else():
    assert ACCEPT or set(kept()) == {name for name, _ in CASES}


@pytest.mark.parametrize(("name", "provoke"), CASES, ids=[name for name, _ in CASES])
def test_message(name, provoke):
    text = message(provoke)
    assert text != "no error"
    if not ACCEPT:
        assert text == kept().get(name), "run with BATISTE_ACCEPT_MESSAGES=1 to accept it"


if ACCEPT:
    FILE.write_text("".join(f"== {name}\n{message(provoke)}\n\n" for name, provoke in CASES))
