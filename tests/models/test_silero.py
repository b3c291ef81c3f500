# SPDX-License-Identifier: Apache-2.0
"""Silero VAD: real weights against onnxruntime, streams, segments, training, errors."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import optax
import pytest
import silero_vad

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models import WeightsError, open_weights
from batiste.models.silero import (
    RULES,
    SILERO,
    SILEROS,
    Segment,
    Silero,
    SileroConfig,
    load_silero,
    spectrum,
    voice_segments,
)

from .packages import place

VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))


def archive() -> Path:
    return place("silero_vad") / "data" / "silero_vad.jit"


def syllable(draw: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    """Pulses of a falling voice and some noise, through the three formants of a vowel."""
    pitch = draw.uniform(100, 180) * np.linspace(1.1, 0.9, samples)
    source = np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0) + draw.normal(0, 0.03, samples)
    frequencies = np.fft.rfftfreq(2 * samples, 1 / rate)
    formants = enumerate(VOWELS[draw.integers(len(VOWELS))])
    shaped = sum((60 + 40 * i) ** 2 / ((frequencies - f) ** 2 + (60 + 40 * i) ** 2) / (i + 1) for i, f in formants)
    voice = np.fft.irfft(np.fft.rfft(source, 2 * samples) * shaped)[:samples]
    return 0.5 * voice / abs(voice).max() * np.sqrt(np.hanning(samples))


def talk(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Words of syllables, with silence between them, over faint noise."""
    draw = np.random.default_rng(seed)
    audio = draw.normal(0, 0.003, int(seconds * rate))
    at = int(0.8 * rate)
    while at < len(audio) - 3 * rate:
        for _ in range(draw.integers(3, 9)):
            samples = int(draw.uniform(0.1, 0.25) * rate)
            audio[at : at + samples] += syllable(draw, samples, rate)
            at += samples + int(draw.uniform(0.01, 0.05) * rate)
        at += int(draw.uniform(0.3, 1.2) * rate)
    return audio.astype(np.float32)


def theirs(audio: np.ndarray, config: SileroConfig) -> np.ndarray:
    """The probabilities that the shipped ONNX model gives, chunk by chunk."""
    session = onnxruntime.InferenceSession(str(archive().with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, config.context), np.float32), []
    for chunk in audio[: len(audio) // config.chunk * config.chunk].reshape(-1, 1, config.chunk):
        heard = np.concatenate([context, chunk], axis=1)
        context = heard[:, -config.context :]
        p, state = session.run(None, {"input": heard, "state": state, "sr": np.array(config.rate)})
        found.append(np.asarray(p)[0, 0])
    return np.array(found)


@pytest.fixture(scope="module")
def real() -> Silero:
    return load_silero(archive())


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return talk(12, 16000)


@pytest.mark.parametrize("name", ["16k", "8k"])
def test_real_weights_give_the_probabilities_of_onnxruntime_over_hundreds_of_chunks(name: str) -> None:
    model = load_silero(archive(), name)
    samples = talk(12, model.config.rate)
    expected = theirs(samples, model.config)
    found, _ = nnx.jit(lambda model, audio: model(audio))(model, samples[None])
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert len(expected) == 375 and 0.2 < (expected > 0.5).mean() < 0.8


def test_segments_are_those_of_the_published_program(real: Silero, audio: np.ndarray) -> None:
    probabilities = [float(p) for p in theirs(audio, real.config)]
    expected = silero_vad.get_speech_timestamps_from_probs(probabilities, audio_length_samples=len(audio))
    found = voice_segments(real, audio)
    assert [segment._asdict() for segment in found] == expected
    assert len(found) > 3


def test_a_stream_hears_what_is_heard_at_once(real: Silero, audio: np.ndarray) -> None:
    batch = jnp.asarray(audio[: 40 * 512].reshape(2, -1))
    whole, last = real(batch)
    step, heard, parts = nnx.jit(lambda model, audio, heard: model(audio, heard)), real.silence(2), []
    for chunk in jnp.split(batch, 20, axis=1):
        p, heard = step(real, chunk, heard)
        parts.append(p)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), heard, last)


def test_the_spectrum_is_that_of_the_published_filters() -> None:
    filters = open_weights(archive()).tensors["_model.stft.forward_basis_buffer"].read()[:, 0]
    x = np.random.default_rng(0).normal(size=576).astype(np.float32)
    windows = np.stack([np.pad(x, (0, 64), mode="reflect")[at : at + 256] for at in range(0, 385, 128)])
    real, imaginary = np.split(windows @ filters.T, 2, axis=1)
    np.testing.assert_allclose(spectrum(jnp.asarray(x)[None, None], 256)[0, 0], np.hypot(real, imaginary), atol=1e-4)


def test_segments_begin_and_end_as_said(real: Silero, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    fake = lambda model, audio, heard: (jnp.asarray(given)[None], heard)
    monkeypatch.setattr("batiste.models.silero._probabilities", fake)

    def found(pattern: str, **options: float) -> list[tuple[int, int]]:
        given[:] = [int(p) / 10 for p in pattern] + [0.0] * 100
        segments = voice_segments(real, np.zeros(len(pattern) * 512), **{"margin": 0, "speech": 0, **options})
        return [(start // 512, end // 512) for start, end in segments]

    assert found("00999000000") == [(2, 5)]
    assert found("0099009900000") == [(2, 8)]  # 64 ms are too short to end it
    assert found("0099000009900000") == [(2, 4), (9, 11)]
    assert found("0099444400000") == [(2, 8)]  # between the thresholds it goes on, and does not begin
    assert found("00444449000009") == [(7, 8), (13, 14)]
    assert found("00990000000999", speech=0.07) == [(11, 14)]
    assert found("0099000000099", margin=0.032) == [(1, 5), (10, 13)]
    assert found("009900000099", margin=1) == [(0, 7), (7, 12)]
    assert found("00444400000", threshold=0.3, release=0.2) == [(2, 6)]


def test_hours_are_heard_a_minute_at_a_time() -> None:
    model = Silero(SILEROS["tiny"], rngs=nnx.Rngs(0))
    model.eval()
    model.head.bias[...] = jnp.ones(1)
    assert voice_segments(model, np.zeros(150_001, np.float32)) == [Segment(0, 150_001)]
    assert voice_segments(model, np.zeros(1)) == [] == voice_segments(model, np.zeros(0))


def test_it_learns_which_half_is_loud() -> None:
    model = Silero(SILEROS["tiny"], rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    loud = jnp.arange(10) >= 5
    audio = jax.random.normal(jax.random.key(0), (4, 10, 32)) * loud[None, :, None]  # also silence, which is exactly 0

    @nnx.jit
    def step(model: Silero, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Silero) -> jax.Array:
            return optax.sigmoid_binary_cross_entropy(model.logits(audio.reshape(4, -1))[0], loud[None]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_table_has_few_lines_and_the_rules_speak_of_all() -> None:
    assert len(SILERO) <= 20
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=RULES, strict=True)
    make = lambda: Silero(SILEROS["tiny"], rngs=nnx.Rngs(0))
    assert "no rule" not in str(sharding.explain_sharding(make, plan))


def test_what_is_wrong_is_said(real: Silero) -> None:
    with pytest.raises(ShapeError, match="a multiple of 512 samples"):
        real(jnp.zeros((1, 513)))
    with pytest.raises(ShapeError, match="mean over channels"):
        voice_segments(real, np.zeros((2, 512)))
    with pytest.raises(ArgumentError, match=r"release=0\.6"):
        voice_segments(real, np.zeros(512), release=0.6)
    with pytest.raises(ArgumentError, match="tiny or 16k or 8k"):
        load_silero(archive(), "44k")
    with pytest.raises(ArgumentError, match="multiple of 16"):
        SileroConfig(16000, 100)
    with pytest.raises(WeightsError, match="lack a tensor"):
        load_silero(archive().with_name("silero_vad_16k.safetensors"))
