# SPDX-License-Identifier: Apache-2.0
"""The tokenizers that decoders are published with, by the library `tokenizers`; and tokens to text as they come.

words = load_tokenizer("SmolLM2-135M.gguf")                       # or a folder with tokenizer.json
for piece in write(model, words, "The sea", 64, stops=["\n"]):     # no half characters, nothing of a stop string
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax import Array

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need

from .decoder import Decoder
from .files import open_weights
from .generation import stream
from .sampling import GREEDY, Sampling
from .tensors import WeightsError

CONTROL = 3  # the kind of a special token in a GGUF file
SPLITS = {"gpt-2": (), "default": (), "smollm": ("Digits",)}
"""What splits a text before the pairs of bytes are merged, by GGUF's name for it."""
SPACE = "\u2581"  # stands for a space in SentencePiece's vocabularies
HALF = "\ufffd"  # stands for bytes that are no character, or not yet
MOST_PENDING = 32  # tokens; a character has at most 4 bytes, what goes on for longer is none


class Decodes(Protocol):
    """What makes text of tokens."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class Tokenizer:
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
    def ends(self) -> frozenset[int]:
        """Special tokens that end a text, by the names they go by."""
        return frozenset(n for word, n in self._specials.items() if word.strip("<|>").replace("_", "") in ENDS)

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
    def of_folder(cls, folder: Path) -> Tokenizer:
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
    def of_gguf(cls, about: Mapping[str, Any], path: Path) -> Tokenizer:
        """That of the settings of a GGUF file: pieces merged in their order, of bytes or of characters.

        Raises:
            WeightsError: the file has none, or one of another kind.
        """
        kind, splits = (about.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        words, types = (about.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
        is_known = kind == "llama" or (kind == "gpt2" and splits in SPLITS)
        if not is_known or not words or len(types) != len(words):
            raise WeightsError("the file's tokenizer is of a kind that is not read here", at=str(path),
                               got=f"{kind}, {splits}", expected=f"llama, or gpt2 with {' or '.join(SPLITS)}",
                               fix="take the folder that has its tokenizer.json")  # fmt: skip
        try:
            own = _of_bytes(about, words, SPLITS[str(splits)]) if kind == "gpt2" else _of_characters(about, words)
        except ImportError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise WeightsError("the file's tokenizer is damaged", at=str(path), got=str(error)[:80]) from None
        own.add_special_tokens([word for word, kind in zip(words, types) if kind == CONTROL])
        return cls(own)


ENDS = {"eos", "/s", "imend", "endoftext", "eotid", "endofturn", "eot"}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer.json`, or of a GGUF file.

    Raises:
        WeightsError: there is none, or it cannot be read.
    """
    path = Path(path)
    return Tokenizer.of_folder(path) if path.is_dir() else Tokenizer.of_gguf(open_weights(path).about, path)


def _of_bytes(about: Mapping[str, Any], words: Sequence[str], splits: tuple[str, ...]) -> Any:
    """Pairs of bytes, as of GPT-2.  Source: Radford et al. 2019, section 2.2."""
    lib, pre = need("tokenizers", extra="models"), need("tokenizers.pre_tokenizers", extra="models")
    merges = [tuple(merge.split(" ")) for merge in about.get("tokenizer.ggml.merges", [])]
    own = lib.Tokenizer(lib.models.BPE({word: i for i, word in enumerate(words)}, merges))
    digits = [pre.Digits(individual_digits=True)] * len(splits)
    own.pre_tokenizer = pre.Sequence([*digits, pre.ByteLevel(add_prefix_space=False)])
    own.decoder = lib.decoders.ByteLevel()
    return own


def _of_characters(about: Mapping[str, Any], words: Sequence[str]) -> Any:
    """Pairs of characters in the order of their scores, and bytes where there is no character, as of SentencePiece."""
    lib = need("tokenizers", extra="models")
    number, scores = {word: i for i, word in enumerate(words)}, about["tokenizer.ggml.scores"]
    pairs = [(word[:at], word[at:], i) for i, word in enumerate(words) for at in range(1, len(word))]
    pairs = sorted((-scores[i], i, a, b) for a, b, i in pairs if a in number and b in number)
    unknown = words[about.get("tokenizer.ggml.unknown_token_id", 0)]
    own = lib.Tokenizer(lib.models.BPE(number, [(a, b) for _, _, a, b in pairs], byte_fallback=True, fuse_unk=True,
                                       unk_token=unknown))  # fmt: skip
    first = [lib.normalizers.Prepend(SPACE)] * about.get("tokenizer.ggml.add_space_prefix", True)
    own.normalizer = lib.normalizers.Sequence([*first, lib.normalizers.Replace(" ", SPACE)])
    own.decoder = lib.decoders.Sequence([lib.decoders.Replace(SPACE, " "), lib.decoders.ByteFallback(),
                                         lib.decoders.Fuse(),
                                         *[lib.decoders.Strip(" ", 1, 0)] * len(first)])  # fmt: skip
    return own


class Text:
    """The text of an answer, given out as far as it is certain.

    >>> class Letters:
    ...     def decode(self, tokens):
    ...         return "".join(map(chr, tokens))
    >>> text = Text(Letters(), stops=["END"])
    >>> [text.add(ord(letter)) for letter in "an ENd. E"], text.rest()
    (['a', 'n', ' ', '', '', 'ENd', '.', ' ', ''], 'E')
    """

    def __init__(self, tokenizer: Decodes, stops: Sequence[str] = ()):
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


def write(model: Decoder, tokenizer: Tokenizer, prompt: str, steps: int, sampling: Sampling = GREEDY, *,
          stops: Sequence[str] = (), key: Array | None = None) -> Iterator[str]:  # fmt: skip
    """The text that follows a prompt, as it comes; it ends at a special token that ends texts, or before a stop string.

    Raises:
        ArgumentError: the prompt has no tokens, or the tokenizer is of another model.
    """
    if tokenizer.size > model.config.vocab:
        raise ArgumentError("the tokenizer has tokens that the model has not", got=tokenizer.size,
                            expected=f"at most {model.config.vocab}", fix="take the files of one model")  # fmt: skip
    text, ends = Text(tokenizer, stops), tokenizer.ends
    for token_B in stream(model, [tokenizer.encode(prompt)], steps, sampling, ends=ends, key=key):
        if int(token_B[0]) in ends:
            break
        if piece := text.add(int(token_B[0])):
            yield piece
        if text.stopped:
            return
    if rest := text.rest():
        yield rest
