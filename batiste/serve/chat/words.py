# SPDX-License-Identifier: Apache-2.0
"""The tokenizers that decoders are published with, by the library `tokenizers`, as a server needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need
from batiste.models import WeightsError

CONTROL = 3  # the kind of a special token in a GGUF file
SPLITS = {"gpt-2": (), "default": (), "smollm": ("Digits",)}
"""What splits a text before the pairs of bytes are merged, by GGUF's name for it."""


class Words:
    """A tokenizer of the library `tokenizers`, whose special tokens are read as text and left out of text.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; a copy of it is kept.
    """

    def __init__(self, tokenizer: Any):
        own = type(tokenizer).from_str(tokenizer.to_str())
        own.encode_special_tokens = True
        own.no_padding()
        own.no_truncation()
        added = own.get_added_tokens_decoder()
        self._own = own
        self.longest = max(map(len, own.get_vocab()), default=1)  # of a token's text, in characters
        self._specials = {token.content: number for number, token in added.items() if token.special}

    @property
    def specials(self) -> Mapping[str, int]:
        return self._specials

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self._own.get_vocab_size()

    def encode(self, text: str) -> Sequence[int]:
        return self._own.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._own.decode(list(tokens), skip_special_tokens=True)

    @classmethod
    def of_folder(cls, folder: Path) -> Words:
        """That of `tokenizer.json`.

        Raises:
            WeightsError: there is none, or it cannot be read.
        """
        place = folder / "tokenizer.json"
        try:
            return cls(need("tokenizers", extra="models").Tokenizer.from_file(str(place)))
        except ImportError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise WeightsError("the folder's tokenizer cannot be read", at=str(place), got=str(error)[:80]) from None

    @classmethod
    def of_gguf(cls, about: Mapping[str, Any], path: Path) -> Words:
        """That of the settings of a GGUF file: pairs of bytes, merged in their order.

        Raises:
            WeightsError: the file has none, or one of another kind.
        """
        kinds, splits = (about.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        words, merges, types = (about.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "merges", "token_type"))
        if kinds != "gpt2" or splits not in SPLITS or not words or len(types) != len(words):
            raise WeightsError("the file's tokenizer is of a kind that is not read here", at=str(path),
                               got=f"{kinds}, {splits}", expected=f"gpt2, {' or '.join(SPLITS)}",
                               fix="serve the folder that has its tokenizer.json")  # fmt: skip
        lib, pre = need("tokenizers", extra="models"), need("tokenizers.pre_tokenizers", extra="models")
        vocabulary = {word: number for number, word in enumerate(words)}
        try:
            own = lib.Tokenizer(lib.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
        except Exception as error:
            raise WeightsError("the file's tokenizer is damaged", at=str(path), got=str(error)[:80]) from None
        digits = [pre.Digits(individual_digits=True)] * len(SPLITS[splits])
        own.pre_tokenizer = pre.Sequence([*digits, pre.ByteLevel(add_prefix_space=False)])
        own.decoder = lib.decoders.ByteLevel()
        own.add_special_tokens([word for word, kind in zip(words, types) if kind == CONTROL])
        return cls(own)


def name_of(path: Path) -> str:
    """By which clients ask for the model of a file or folder

    >>> name_of(Path("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    'smollm2-135m-instruct.q4_1'
    """
    name = path.name.removesuffix(".gguf") if path.suffix == ".gguf" else path.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-")
    if not name:
        raise ArgumentError("the model needs a name", got=str(path), fix="pass name=")
    return name
