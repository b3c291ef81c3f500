# SPDX-License-Identifier: Apache-2.0
"""SentenceEncoder: texts as vectors that are near each other when the texts mean the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from batiste.graph.errors import ArgumentError
from batiste.graph.optional import need
from batiste.transforms.compile import jit

from .bert import Bert, load_bert
from .tensors import WeightsError, file_size

LENGTHS = (16, 32, 64, 128, 256, 512)


class SentenceEncoder:
    """vectors[N, D] of length 1 for N texts: the mean of the encoder's positions, those of padding left out

    Texts are sorted by length and padded to the next of a few lengths, and batches to a power of two of rows: however
    many texts come, at most `len(lengths) * (1 + log2(batch))` programs are compiled.

    Args:
        model: the encoder.
        tokenizer: of the library `tokenizers`, which adds the first and last token.
        most: how many tokens of a text are read; the rest is cut off.
        lengths: to which texts are padded.
        batch: the most rows of a batch; rounded up to a power of two.

    Raises:
        ArgumentError: `most` or `batch` are no sizes, or the tokenizer has tokens that the model does not know.
        ImportError: by `load`; the extra `models` is not installed.

    Source: Reimers and Gurevych 2019, "Sentence-BERT", section 3 (mean pooling).
    """

    def __init__(self, model: Bert, tokenizer: Any, *, most: int = 256, lengths: Sequence[int] = LENGTHS,
                 batch: int = 32):  # fmt: skip
        positions = model.config.positions
        if not 3 <= most <= positions or batch < 1:
            raise ArgumentError("the most tokens and rows are sizes", got=f"most={most}, batch={batch}",
                                expected=f"most of 3 to {positions}, batch ≥ 1")  # fmt: skip
        if tokenizer.get_vocab_size() > model.config.vocab:
            raise ArgumentError("the tokenizer is of another model: it has tokens that the model has not",
                                got=tokenizer.get_vocab_size(), expected=f"at most {model.config.vocab}",
                                fix="take the files of one model")  # fmt: skip
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # a copy, to be set
        tokenizer.no_padding()
        tokenizer.enable_truncation(most)
        self.model, self.tokenizer, self.most = model, tokenizer, most
        self.lengths = (*sorted(n for n in lengths if n < most), most)
        self.batch = 1 << (batch - 1).bit_length()

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> SentenceEncoder:
        """That of a folder: `config.json`, weights, `tokenizer.json`, and `sentence_bert_config.json` if there is one.

        Raises:
            WeightsError: a file is missing, damaged, or of another model.
        """
        folder = Path(folder)
        model, place, lengths = load_bert(folder), folder / "tokenizer.json", folder / "sentence_bert_config.json"
        tokenizers = need("tokenizers", extra="models")
        file_size(place)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(place))
            most = json.loads(lengths.read_text())["max_seq_length"] if lengths.is_file() else 512
        except Exception as error:  # the library raises Exception itself
            raise WeightsError("the folder's tokenizer cannot be read", at=str(place), got=str(error)[:80]) from None
        return cls(model, tokenizer, **{"most": min(int(most), model.config.positions), **options})

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of the texts, in their order, in float32."""
        rows = [text.ids for text in self.tokenizer.encode_batch(list(texts))]
        vectors = np.zeros((len(rows), self.model.config.features), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            tokens_BT, mask_BT = self._padded([rows[i] for i in chosen])
            vectors[chosen] = np.asarray(_vectors(self.model, tokens_BT, mask_BT))[: len(chosen)]
        return vectors

    def tokens(self, text: str) -> int:
        """How many tokens of a text are read."""
        return len(self.tokenizer.encode(text).ids)

    def similarity(self, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """[N, M]: the cosine of each text with each of the others"""
        return self.encode(texts) @ self.encode(others).T

    def _padded(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The rows with zeros behind them, to the next length and the next power of two of rows."""
        longest = max(map(len, rows))
        shape = (1 << (len(rows) - 1).bit_length(), next(n for n in self.lengths if n >= longest))
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        mask[len(rows) :, 0] = True  # a row of nothing has no mean
        return tokens, mask


@jit
def _vectors(model: Bert, tokens_BT: Array, mask_BT: Array) -> Array:
    """Σ x[t] over the positions that are there, at length 1"""
    x_BTD = model(tokens_BT, mask_BT).astype(jnp.float32)
    sum_BD = jnp.where(mask_BT[:, :, None], x_BTD, 0).sum(axis=1)
    return sum_BD / jnp.linalg.norm(sum_BD, axis=1, keepdims=True)
