# SPDX-License-Identifier: Apache-2.0
"""Speech to text: the spectra and the tokens of transformers, and windows one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from batiste import nnx
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models import WeightsError, speech
from batiste.models.spectra import HOP, RATE, log_mel, mel_bands
from batiste.models.speech import Marks, Rules, Words, heard, load_words, transcribe, written
from batiste.models.whisper import WHISPERS, Whisper, load_whisper

MARKS = Marks(50, 51, 57, 58, 59, 60, 55, 54, {"en": 52, "de": 53}, (3, 7, 51, 54, 55), (20, 50))
WINDOW = 20 * HOP
SAMPLES = np.random.default_rng(1).normal(size=3 * WINDOW - 700).astype(np.float32)


class Numbers:
    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Any) -> str:
        return "".join(f" {token}" for token in tokens)


WORDS = Words(Numbers(), MARKS)


# ---------------------------------------------------------------- spectra
@pytest.mark.parametrize("bands", [80, 128])
def test_spectra_are_those_of_transformers(bands: int) -> None:
    theirs = transformers.WhisperFeatureExtractor(feature_size=bands)
    np.testing.assert_allclose(mel_bands(bands), theirs.mel_filters, atol=1e-8)
    noise = 0.1 * np.random.default_rng(0).normal(size=30 * RATE).astype(np.float32)
    noise[20 * RATE :] = 0
    found = speech.spectrum(noise[None], bands)[0]
    expected = theirs(noise, sampling_rate=RATE, return_tensors="np").input_features[0].T
    assert found.shape == expected.shape == (3000, bands)
    assert np.abs(found - expected).max() < (1e-5 if bands == 80 else 1e-4)  # 128: a band of a single faint frequency
    assert np.abs(found - expected).mean() < 1e-6


def test_a_tone_is_loud_in_its_band_and_silence_has_no_gradient_that_is_none() -> None:
    tone = jnp.sin(2 * jnp.pi * 1000 * jnp.arange(RATE // 10) / RATE)[None]
    peak = int(log_mel(tone)[0, 5].argmax())
    assert mel_bands(80)[25, peak] > 0.5 * mel_bands(80)[25].max() > 0  # 25 · 40 Hz
    gradient = jax.grad(lambda x: log_mel(x).sum())(jnp.zeros((1, 1600)))
    assert np.isfinite(gradient).all()
    with pytest.raises(ShapeError, match="rows of samples"):
        log_mel(jnp.zeros(1600))


# ---------------------------------------------------------------- one window
@pytest.fixture(scope="module")
def theirs() -> transformers.WhisperForConditionalGeneration:
    """With drawn weights."""
    config = transformers.WhisperConfig(
        vocab_size=120, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=6, max_source_positions=10,
        max_target_positions=48, pad_token_id=50, bos_token_id=50, eos_token_id=50, decoder_start_token_id=51,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.5)
    found: Any = model.generation_config
    found.no_timestamps_token_id, found.is_multilingual, found.max_initial_timestamp_index = MARKS.untimed, True, 5
    found.lang_to_id = {f"<|{code}|>": number for code, number in MARKS.languages.items()}
    found.task_to_id = {"translate": MARKS.translate, "transcribe": MARKS.transcribe}
    found.suppress_tokens, found.begin_suppress_tokens = list(MARKS.never), list(MARKS.never_first)
    return model


@pytest.fixture(scope="module")
def model(theirs: transformers.WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    folder = tmp_path_factory.mktemp("speech")
    theirs.save_pretrained(folder)
    return load_whisper(folder)


SPECTRUM = 3 * np.random.default_rng(0).normal(size=(4, 20, 6)).astype(np.float32)


@pytest.mark.parametrize("timed", [True, False])
def test_the_same_tokens_are_said_as_by_transformers(theirs: Any, model: Whisper, timed: bool) -> None:
    prompt = [MARKS.start, MARKS.languages["de"], MARKS.transcribe, *([] if timed else [MARKS.untimed])]
    rules = [transformers.SuppressTokensLogitsProcessor(MARKS.never),
             transformers.SuppressTokensAtBeginLogitsProcessor(MARKS.never_first, len(prompt)),
             transformers.WhisperTimeStampLogitsProcessor(theirs.generation_config, len(prompt))]  # fmt: skip
    settings = transformers.GenerationConfig(max_new_tokens=32, eos_token_id=MARKS.end, pad_token_id=MARKS.end)
    mixin: Any = transformers.GenerationMixin
    expected = mixin.generate(
        theirs, torch.tensor(SPECTRUM.transpose(0, 2, 1).copy()), decoder_input_ids=torch.tensor([prompt] * 4),
        generation_config=settings, logits_processor=rules if timed else rules[:2],
    ).numpy()[:, len(prompt) :]  # fmt: skip
    found = written(model, heard(model, SPECTRUM), prompt, Rules.of(MARKS, 120, timed=timed, latest=0.1), 32)
    assert expected.shape == (4, 32) and len({tuple(row) for row in expected.tolist()}) > 2
    np.testing.assert_array_equal(found.tokens_BT[:, :32], expected)
    np.testing.assert_array_equal(found.length_B, (expected != MARKS.end).sum(1))


def test_a_row_that_ended_stays_so_and_its_probability_is_the_mean_of_its_tokens(model: Whisper) -> None:
    said, prompt = heard(model, SPECTRUM), [MARKS.start, MARKS.languages["de"], MARKS.transcribe, MARKS.untimed]
    free = MARKS._replace(never=(), never_first=())
    long = np.asarray(written(model, said, prompt, Rules.of(free, 120, timed=False), 8).tokens_BT)
    end = int(long[0, 3])
    rules = Rules.of(free._replace(end=end), 120, timed=False)
    found = written(model, said, prompt, rules, 8)
    length = long[0].tolist().index(end)
    assert found.length_B[0] == length and (found.tokens_BT[0, length:] == end).all()
    log_p = jax.nn.log_softmax(model.decode(jnp.array([[*prompt, *long[0, :length]]] * 4), said)[0][0, 3:])
    expected = [log_p[i, token] for i, token in enumerate(long[0, : length + 1])]
    np.testing.assert_allclose(found.mean_B[0], np.mean(expected), rtol=1e-4)
    with pytest.raises(ArgumentError, match="4 and 45 more"):
        written(model, said, prompt, rules, 45)


# ---------------------------------------------------------------- windows
def test_windows_follow_each_other_where_the_last_whole_part_ended(model: Whisper) -> None:
    free = {"temperatures": (0.0,), "silence": 2.0, "steps": 8, "remembers": False}
    found = transcribe(model, SAMPLES, WORDS, **free)
    assert found.language in MARKS.languages and len(found.parts) > 1
    spectrum, at, expected = speech.spectrum(np.pad(SAMPLES, (0, 700 + WINDOW))[None], 6)[0], 0, []
    prompt = [MARKS.start, MARKS.languages[str(found.language)], MARKS.transcribe]
    while at * HOP < len(SAMPLES):
        row = written(model, heard(model, spectrum[None, at : at + 20]), prompt, Rules.of(MARKS, 120, latest=0.2), 8)
        parts, seconds = speech.parts_of(np.asarray(row.tokens_BT[0, : row.length_B[0]]).tolist(), MARKS, 0.2)
        expected += [tokens for _, _, tokens in parts]
        at += max(1, round(seconds * 100))
    assert [list(part.tokens) for part in found.parts] == expected
    assert all(0 <= part.start <= part.end <= len(SAMPLES) / RATE for part in found.parts)
    assert found.text == "".join(part.text for part in found.parts).strip()
    again = transcribe(model, SAMPLES, WORDS, **{**free, "remembers": True}, language="de", before="1 2 3")
    assert again.language == "de" and again.parts != found.parts


def test_what_is_not_credible_is_written_again_and_what_is_silent_not_at_all(model: Whisper) -> None:
    few = {"language": "en", "steps": 8, "least_log_probability": 1.0, "temperatures": (0.0, 0.4)}
    found = transcribe(model, SAMPLES[:WINDOW], WORDS, **few, silence=2.0)
    assert {part.temperature for part in found.parts} == {0.4}
    assert transcribe(model, SAMPLES[:WINDOW], WORDS, **few, silence=-1.0).parts == ()


def test_words_are_those_of_the_files(tmp_path: Path) -> None:
    names = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev",
             "nospeech", "notimestamps"]  # fmt: skip
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"sea": 0, "?": 1}, unk_token="?"))
    own.add_special_tokens([f"<|{name}|>" for name in names])
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [1], "begin_suppress_tokens": [2]}))
    words = load_words(tmp_path)
    assert words.marks == Marks(2, 3, 9, 10, 11, 12, 7, 6, {"en": 4, "de": 5}, (1,), (2,))
    assert words.tokenizer.decode([0]) == "sea"
    (tmp_path / "generation_config.json").write_text(json.dumps({"is_multilingual": False}))
    assert load_words(tmp_path).marks.languages == {}
    with pytest.raises(WeightsError, match=r"no <\|endoftext"):
        Marks.of({"<|en|>": 3})


def test_wrong_arguments_are_said() -> None:
    model = Whisper(WHISPERS["tiny"], rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="take one channel"):
        transcribe(model, np.zeros((2, 100)), WORDS)
    with pytest.raises(ArgumentError, match="en, de"):
        transcribe(model, np.zeros(100), WORDS, language="fr")
