# SPDX-License-Identifier: Apache-2.0
"""What strangers wrote, read by the letter: files and requests that are checked before they are believed."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def want(true: Any, otherwise: str) -> None:
    """
    Raises:
        ValueError: it is not true.
    """
    if not true:
        raise ValueError(otherwise)


def parse_json(text: bytes | str) -> Any:
    """What JSON says, if it says one thing: no key twice in an object, no NaN, no infinity.

    Raises:
        ValueError: it is no JSON, or can be meant in two ways, or is nested too deep.

    >>> parse_json(b'{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' stands twice
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.99} stands twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
