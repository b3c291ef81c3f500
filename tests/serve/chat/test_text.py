# SPDX-License-Identifier: Apache-2.0
"""Text as it comes: nothing is lost, doubled or taken back, and no character is halved."""

from __future__ import annotations

import numpy as np
import pytest

from batiste.models.tokenizers import HALF, Text
from batiste.serve.chat.text import divided, encoded

RANDOM = np.random.default_rng(0)
WRITTEN = "naïve “quotes” 日本語 🎉 family 👨‍👩‍👧, end.\n\n"


def given(text: Text, tokens) -> list[str]:
    """The pieces that come until the answer is over, and the last one."""
    pieces = []
    for token in tokens:
        pieces.append(text.add(int(token)))
        if text.stopped:
            break
    return [*pieces, text.rest()]


def test_characters_come_whole_and_as_soon_as_they_are(tokenizer) -> None:
    pieces = given(Text(tokenizer), tokenizer.encode(WRITTEN))
    assert "".join(pieces) == WRITTEN and not any(HALF in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(WRITTEN)


@pytest.mark.parametrize("stops", [(), ("never",)])
def test_what_is_no_utf8_reads_as_the_tokenizer_reads_it(tokenizer, stops) -> None:
    for _ in range(100):
        tokens = RANDOM.choice([0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x8E, 0x89, 0x20], size=30)
        assert "".join(given(Text(tokenizer, stops), tokens)) == tokenizer.decode(tokens.tolist())


def test_bytes_that_never_become_a_character_do_not_pile_up(tokenizer) -> None:
    text = Text(tokenizer)
    pieces = given(text, [0x80] * 1000)
    assert "".join(pieces) == HALF * 1000 and sum(map(bool, pieces)) > 10


@pytest.mark.parametrize(
    ("written", "stops", "expected"),
    [("one END two", ["END"], "one "), ("one EN", ["END"], "one EN"), ("aaab", ["aab"], "a"), ("日本語", ["本"], "日"),
     ("abcabd", ["abd"], "abc"), ("x\nUser: y", ["\nUser:", "\n\n"], "x"), ("END", ["END"], ""),
     ("abc", ["c", "bc"], "a"), ("ab", ["b", "ab"], ""), ("nothing", ["z"], "nothing")],
)  # fmt: skip
def test_stop_strings_cut_exactly_and_nothing_of_them_is_given_out(tokenizer, written, stops, expected) -> None:
    text = Text(tokenizer, stops)
    pieces = given(text, tokenizer.encode(written))
    assert "".join(pieces) == expected and text.stopped == (expected != written)


def test_texts_between_special_tokens_are_read_as_one(tokenizer) -> None:
    pieces = [(True, "<|im_start|>"), (False, "a"), (False, "b"), (True, "<|im_end|>"), (False, "c")]
    assert encoded(tokenizer, pieces) == [0xFE, *b"ab", 0xFF, *b"c"]
    assert list(divided("<|im_start|>a", tokenizer.specials)) == [(True, "<|im_start|>"), (False, "a")]
    assert list(divided("<a><ab>", ["<a", "<ab>"])) == [(True, "<a"), (False, ">"), (True, "<ab>")]
    assert list(divided("x", [])) == [(False, "x")]
