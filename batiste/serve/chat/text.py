# SPDX-License-Identifier: Apache-2.0
"""Tokens to text as they come: no half characters, nothing that may yet turn out to be a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

HALF = "\ufffd"  # stands for bytes that are no character, or not yet
MOST_PENDING = 32  # tokens; a character has at most 4 bytes, what goes on for longer is none


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


class Text:
    """The text of an answer, given out as far as it is certain.

    >>> class Letters:
    ...     def decode(self, tokens):
    ...         return "".join(map(chr, tokens))
    >>> text = Text(Letters(), stops=["END"])
    >>> [text.add(ord(letter)) for letter in "an ENd. E"], text.rest()
    (['a', 'n', ' ', '', '', 'ENd', '.', ' ', ''], 'E')
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.stopped = False
        self._decode, self._stops = tokenizer.decode, tuple(stops)
        self._tokens: list[int] = []  # the last that were whole characters, then those that are not yet
        self._whole = 0
        self._shown = ""
        self._held = ""

    def add(self, token: int) -> str:
        """What is certain now that this token came; once a stop string is whole, `stopped` is True."""
        self._tokens.append(token)
        now = self._decode(self._tokens)
        if now.endswith(HALF) and len(self._tokens) - self._whole < MOST_PENDING:
            now = now.rstrip(HALF)
            new, self._shown = now[len(self._shown) :], max(self._shown, now, key=len)
            return self._certain(new)
        new = now[len(self._shown) :]
        self._tokens = self._tokens[self._whole :]
        self._whole, self._shown = len(self._tokens), self._decode(self._tokens)
        return self._certain(new)

    def rest(self) -> str:
        """What was held back: the answer is over."""
        new = "" if self.stopped else self._held + self._decode(self._tokens)[len(self._shown) :]
        self._held = self._shown = ""
        self._tokens, self._whole = [], 0
        return new

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        begun = next((n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def _begins(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)
