# SPDX-License-Identifier: Apache-2.0
"""A published decoder, served: its weights, tokenizer, template and ends from one folder or file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from batiste.graph.errors import ArgumentError
from batiste.models import SentenceEncoder, load_decoder, open_weights
from batiste.models.tokenizers import Tokenizer

from .embedder import Embedder
from .engine import Engine
from .model import LanguageModel
from .names import name_of
from .slots import PIECES, Slots
from .templates import TEMPLATES, template_of


def load_language_model(path: str | Path, *, name: str | None = None, slots: int = 8,
                        length: int | Sequence[int] = 1024, pieces: Sequence[int] = PIECES, waiting: int = 64,
                        template: str | None = None, dtype: DTypeLike = jnp.float32) -> LanguageModel:  # fmt: skip
    """The decoder of a folder (`config.json`, weights, `tokenizer.json`) or of a GGUF file, ready to answer.

    Its programs are compiled here.

    Args:
        name: by which clients ask for it; the file's or folder's, if left out.
        slots: how many answers are written at a time.
        length: the most tokens of a prompt and its answer; several numbers make so many slots of each of these lengths.
        pieces, waiting: see `Slots` and `Engine`.
        template: the name of one in `TEMPLATES`, in place of the published one.
        dtype: of the parameters.

    Raises:
        WeightsError: a file is missing, damaged, or of another model.
        ArgumentError: the length is more than the model was trained for, or the tokenizer is of another model.
    """
    path = Path(path)
    lengths = [length] if isinstance(length, int) else list(length)
    if template is not None and template not in TEMPLATES:
        raise ArgumentError("there is no such template", got=template, expected=", ".join(TEMPLATES))
    about = _published(path)
    words = Tokenizer.of_folder(path) if path.is_dir() else Tokenizer.of_gguf(about, path)
    model = load_decoder(path, dtype=dtype, apart=True)
    if max(lengths) > model.config.context:
        raise ArgumentError("the model was not trained for so many positions", got=max(lengths),
                            expected=f"at most {model.config.context}")  # fmt: skip
    if words.size > model.config.vocab:
        raise ArgumentError("the tokenizer is of another model: it has tokens that the model has not", got=words.size,
                            expected=f"at most {model.config.vocab}", fix="take the files of one model")  # fmt: skip
    engine = Engine([Slots(model, count=slots, length=n, pieces=pieces) for n in lengths], waiting=waiting)
    source = about.get("tokenizer.chat_template")
    begin = [about["tokenizer.ggml.bos_token_id"]] if about.get("tokenizer.ggml.add_bos_token") else []
    ends = [end for end in about.get("ends", []) if isinstance(end, int)]
    chosen = TEMPLATES[template] if template else template_of(source, words.specials)
    return LanguageModel(name or name_of(path), engine, words, template=chosen, ends=ends, begin=begin)


def load_embedder(path: str | Path, *, name: str | None = None, waiting: int = 64, **options: Any) -> Embedder:
    """The sentence encoder of a folder, ready to answer: every size of batch has been tried.

    Args:
        options: see `batiste.models.SentenceEncoder`.
    """
    encoder = SentenceEncoder.load(path, **{"batch": 8, **options})
    for length in encoder.lengths:
        for rows in (1 << i for i in range(encoder.batch.bit_length())):
            encoder.encode(["a " * (length - 2)] * rows)
    return Embedder(name or name_of(Path(path)), encoder.encode, tokens=encoder.tokens, waiting=waiting)


def _published(path: Path) -> Mapping[str, Any]:
    """What the files say besides weights, by GGUF's names, with the tokens that end an answer as `ends`."""
    if not path.is_dir():
        about = open_weights(path).about
        return {**about, "ends": [about.get("tokenizer.ggml.eos_token_id")]}
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            found |= json.loads((path / name).read_text())
    own = path / "chat_template.jinja"
    source = own.read_text() if own.is_file() else found.get("chat_template")
    ends = found.get("eos_token_id")
    return {
        "tokenizer.chat_template": source if isinstance(source, str) else None,
        "tokenizer.ggml.add_bos_token": found.get("add_bos_token") and isinstance(found.get("bos_token_id"), int),
        "tokenizer.ggml.bos_token_id": found.get("bos_token_id"),
        "ends": ends if isinstance(ends, list) else [ends],
    }
