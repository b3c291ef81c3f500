# SPDX-License-Identifier: Apache-2.0
"""Texts to tokens where some of them are special, and what a server asks of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What a server asks of a tokenizer.

    `encode` reads all text as text: what looks like a special token in it is not one. `specials` are the tokens that
    only a template, or a prompt of raw text, may write; `decode` leaves them out.
    """

    @property
    def specials(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def encoded(tokenizer: Tokenizer, pieces: Iterable[tuple[bool, str]]) -> list[int]:
    """The tokens of pieces `(is special, text)`; text on both sides of no special token is read as one."""
    tokens: list[int] = []
    text = ""
    for is_special, piece in pieces:
        if not is_special:
            text += piece
            continue
        tokens += [*(tokenizer.encode(text) if text else ()), tokenizer.specials[piece]]
        text = ""
    return [*tokens, *(tokenizer.encode(text) if text else ())]


def divided(text: str, specials: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Pieces `(is special, text)` of a text

    >>> list(divided("<s>hello</s>", ["<s>", "</s>"]))
    [(True, '<s>'), (False, 'hello'), (True, '</s>')]
    """
    specials = sorted(specials, key=len, reverse=True)
    if not specials:
        yield False, text
        return
    known = set(specials)
    for piece in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
        if piece:
            yield piece in known, piece
