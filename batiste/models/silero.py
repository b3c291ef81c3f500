# SPDX-License-Identifier: Apache-2.0
"""Silero VAD: how probable it is that somebody speaks, for each 32 ms of audio, as it comes in.

x = encoder(|stft(context and chunk)|);  h, c = lstm(x, h, c);  p = σ(head(relu(h)))

Dims, in the suffixes of names:  B batch   T samples   N chunks   K samples of context   W samples of a chunk with its
    context   J moments   Q frequencies   D features   G the four gates of D features

Source: Silero Team 2021, "Silero VAD" (the weights); Hochreiter and Schmidhuber 1997, "Long Short-Term Memory".
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from batiste import nn
from batiste.graph import List, Module, Rngs
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.transforms.compile import jit

from .files import open_weights
from .mapping import Table, load

RULES = (("{kernel,bias}", (...,)),)
"""It is small, and whole on every device; audio is divided by the batch."""

SILERO = {
    "encoder/{}/kernel": "encoder.{}.reparam_conv.weight",
    "encoder/{}/bias": "encoder.{}.reparam_conv.bias",
    "lstm/input/kernel": "decoder.rnn.weight_ih",
    "lstm/input/bias": "decoder.rnn.bias_ih",
    "lstm/hidden/kernel": "decoder.rnn.weight_hh",
    "lstm/hidden/bias": "decoder.rnn.bias_hh",
    "head/kernel": "decoder.decoder.2.weight",
    "head/bias": "decoder.decoder.2.bias",
}
"""Our path -> the name in Silero's TorchScript archive, which holds two models: 16 kHz and 8 kHz."""
ELSEWHERE = ("_state", "_context", "*.forward_basis_buffer")  # kept outside; Fourier's
STRIDES = (1, 2, 2, 1)


@dataclasses.dataclass(frozen=True)
class SileroConfig:
    """The sizes of a detector.

    Args:
        rate: samples per second.
        chunk: samples that get one probability; four windows of the spectrum begin in it.
        channels: of the encoder's convolutions, which halve the moments twice.

    Raises:
        ArgumentError: a size is below one, or a chunk is not a multiple of 16 samples.

    >>> SILEROS["8k"].window, SILEROS["8k"].context
    (128, 32)
    """

    rate: int
    chunk: int
    channels: tuple[int, int, int, int] = (128, 64, 64, 128)

    def __post_init__(self):
        if self.rate < 1 or self.chunk < 16 or self.chunk % 16 or min(self.channels) < 1:
            raise ArgumentError(
                "a detector hears chunks of samples", got=str(self), expected="a multiple of 16 samples"
            )

    @property
    def window(self) -> int:
        """Samples of a window of the spectrum; windows overlap by half."""
        return self.chunk // 2

    @property
    def context(self) -> int:
        """Samples before a chunk that are heard with it."""
        return self.chunk // 8


SILEROS = {
    "tiny": SileroConfig(1000, 32, (8, 4, 4, 8)),
    "16k": SileroConfig(16000, 512),
    "8k": SileroConfig(8000, 256),
}
"""Published configurations, and `tiny` for trying."""


class Heard(NamedTuple):
    """What is remembered between two calls: the last samples, and the state of the LSTM."""

    context_BK: Array
    h_BD: Array
    c_BD: Array


class Silero(Module):
    """p[B, N] that somebody speaks in each chunk of audio[B, T], from -1 to 1, and what to remember for what follows

    >>> model = Silero(SILEROS["tiny"], rngs=Rngs(0))
    >>> first, heard = model(jnp.ones((1, 96)))
    >>> rest, heard = model(jnp.ones((1, 32)), heard)
    >>> first.shape, rest.shape
    ((1, 3), (1, 1))
    """

    def __init__(self, config: SileroConfig, *, rngs: Rngs):
        self.config = config
        sizes = (config.window // 2 + 1, *config.channels)
        self.encoder = List(nn.Conv(a, b, 3, stride, padding=1, rngs=rngs)
                            for a, b, stride in zip(sizes, sizes[1:], STRIDES))  # fmt: skip
        self.lstm = Lstm(sizes[-1], rngs=rngs)
        self.dropout = nn.Dropout(0.1, rngs=rngs)
        self.head = nn.Conv(sizes[-1], 1, 1, rngs=rngs)

    def __call__(self, audio_BT: Array, heard: Heard | None = None) -> tuple[Array, Heard]:
        logits_BN, heard = self.logits(audio_BT, heard)
        return nn.sigmoid(logits_BN), heard

    def logits(self, audio_BT: Array, heard: Heard | None = None) -> tuple[Array, Heard]:
        """Log odds in place of probabilities, for a loss."""
        size, context = self.config.chunk, self.config.context
        if audio_BT.ndim != 2 or not audio_BT.shape[1] or audio_BT.shape[1] % size:
            raise ShapeError("a detector hears rows of whole chunks", at=self, got=audio_BT.shape,
                             expected=f"(batch, a multiple of {size} samples)",
                             fix="add a dim of size 1: audio[None]; fill up with zeros")  # fmt: skip
        heard = self.silence(audio_BT.shape[0]) if heard is None else heard
        longer_BT = jnp.concatenate([heard.context_BK, audio_BT], axis=1)
        chunks = audio_BT.shape[1] // size
        places_NW = np.arange(chunks)[:, None] * size + np.arange(context + size)[None]
        x_BND = self.encoded(longer_BT[:, places_NW])
        (h_BD, c_BD), h_NBD = lax.scan(self.lstm, (heard.h_BD, heard.c_BD), x_BND.swapaxes(0, 1))
        logits_NB1 = self.head(nn.relu(self.dropout(h_NBD)))
        return logits_NB1[..., 0].T, Heard(longer_BT[:, -context:], h_BD, c_BD)

    def encoded(self, chunks_BNW: Array) -> Array:
        """x[B, N, D], of each chunk alone"""
        x_BNJQ = spectrum(chunks_BNW, self.config.window)
        for conv in self.encoder:
            x_BNJQ = nn.relu(conv(x_BNJQ))
        return x_BNJQ.squeeze(-2)

    def silence(self, batch: int) -> Heard:
        """What is remembered before the first sample."""
        features = self.config.channels[-1]
        return Heard(jnp.zeros((batch, self.config.context)), *jnp.zeros((2, batch, features)))


class Lstm(Module):
    """i, f, g, o = input(x) + hidden(h);  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c')"""

    def __init__(self, features: int, *, rngs: Rngs):
        self.input = nn.Linear(features, 4 * features, rngs=rngs)
        self.hidden = nn.Linear(features, 4 * features, rngs=rngs)

    def __call__(self, state: tuple[Array, Array], x_BD: Array) -> tuple[tuple[Array, Array], Array]:
        h_BD, c_BD = state
        i_BD, f_BD, g_BD, o_BD = jnp.split(self.input(x_BD) + self.hidden(h_BD), 4, axis=-1)
        c_BD = nn.sigmoid(f_BD) * c_BD + nn.sigmoid(i_BD) * nn.tanh(g_BD)
        h_BD = nn.sigmoid(o_BD) * nn.tanh(c_BD)
        return (h_BD, c_BD), h_BD


def spectrum(x_BNW: Array, window: int) -> Array:
    """|Σ_t hann(t) x(t) exp(-2πi q t / window)|, [B, N, J, Q], of windows that overlap by half; mirrored at the end"""
    half = window // 2
    mirrored = jnp.concatenate([x_BNW, x_BNW[..., -2 : -2 - window // 4 : -1]], axis=-1)
    halves = mirrored.reshape(*mirrored.shape[:-1], -1, half)
    windows = jnp.concatenate([halves[..., :-1, :], halves[..., 1:, :]], axis=-1)
    t, q = np.arange(window), np.arange(half + 1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * t / window)
    angles = 2 * np.pi * (np.outer(t, q) % window) / window
    cosine, sine = (jnp.asarray(hann[:, None] * wave(angles), x_BNW.dtype) for wave in (np.cos, np.sin))
    power = (windows @ cosine) ** 2 + (windows @ sine) ** 2
    return jnp.sqrt(jnp.maximum(power, jnp.finfo(power.dtype).tiny))  # whose slope at 0 would be infinite


# ---------------------------------------------------------------- from probabilities to segments
class Segment(NamedTuple):
    """Samples in which somebody speaks: `audio[start:end]`."""

    start: int
    end: int


@jit
def _probabilities(model: Silero, audio_BT: Array, heard: Heard) -> tuple[Array, Heard]:
    return model(audio_BT, heard)


def voice_segments(model: Silero, audio: ArrayLike, *, threshold: float = 0.5, release: float | None = None,
                   speech: float = 0.25, silence: float = 0.1, margin: float = 0.03) -> list[Segment]:  # fmt: skip
    """The parts of audio[T] in which somebody speaks, of whatever length; a minute at a time is looked at.

    Args:
        threshold: the probability at which speech begins.
        release: the probability below which it may end; `threshold` - 0.15 if left out.
        speech, silence: seconds; shorter speech is none, and shorter silence does not end it.
        margin: seconds put before and after each segment, or half of the silence between two.

    Raises:
        ShapeError: it is not one row of samples.
        ArgumentError: the thresholds are not between 0 and 1, or a time is negative.
    """
    samples = np.asarray(audio, np.float32)
    if samples.ndim != 1:
        raise ShapeError("segments are of one row of samples", at="voice_segments", got=samples.shape,
                         expected="(samples,)", fix="take the mean over channels")  # fmt: skip
    release = max(threshold - 0.15, 0.01) if release is None else release
    if not 0 < release <= threshold <= 1 or min(speech, silence, margin) < 0:
        raise ArgumentError("speech begins at a probability and ends below a lower one", at="voice_segments",
                            got=f"threshold={threshold}, release={release}, times {(speech, silence, margin)}",
                            expected="0 < release <= threshold <= 1, and times of 0 or more")  # fmt: skip
    rate = model.config.rate
    probabilities = [p for part in _minutes(model, samples) for p in part]
    found = _segments(probabilities, model.config.chunk, len(samples), threshold, release, silence * rate)
    found = [segment for segment in found if segment.end - segment.start > speech * rate]
    return _widened(found, int(margin * rate), len(samples))


def _minutes(model: Silero, samples: np.ndarray) -> Iterator[np.ndarray]:
    size = model.config.chunk
    least = 60 * model.config.rate // size * size
    heard = model.silence(1)
    for start in range(0, len(samples), least):
        part = samples[start : start + least]
        chunks = -(-len(part) // size)
        filled = np.zeros((1, min(least, size << (chunks - 1).bit_length())), np.float32)  # few sizes, few programs
        filled[0, : len(part)] = part
        found, heard = _probabilities(model, filled, heard)
        yield np.asarray(found[0, :chunks])


def _segments(probabilities: list[float], size: int, total: int, threshold: float, release: float,
              silence: float) -> Iterator[Segment]:  # fmt: skip
    """From where it is `threshold` to where it has been below `release` for as long as `silence`."""
    start = quiet = None
    for at, p in zip(range(0, total, size), probabilities):
        if p >= threshold:
            start, quiet = at if start is None else start, None
        elif p < release and start is not None:
            quiet = at if quiet is None else quiet
            if at - quiet >= silence:
                yield Segment(start, quiet)
                start = quiet = None
    if start is not None:
        yield Segment(start, total)


def _widened(found: list[Segment], margin: int, total: int) -> list[Segment]:
    """Each by the margin on both sides; two that would meet share what is between them.

    >>> _widened([Segment(5, 20), Segment(24, 50)], 10, 100)
    [Segment(start=0, end=22), Segment(start=22, end=60)]
    """
    if not found:
        return []
    between = [b.start - a.end for a, b in itertools.pairwise(found)]
    gaps = [2 * found[0].start, *between, 2 * (total - found[-1].end)]
    return [Segment(start - min(margin, before // 2), end + min(margin, after // 2))
            for (start, end), before, after in zip(found, gaps, gaps[1:])]  # fmt: skip


# ---------------------------------------------------------------- files
def load_silero(path: str | Path, name: str = "16k", *, dtype: DTypeLike = jnp.float32) -> Silero:
    """A detector with the weights of Silero's TorchScript archive, of which no code runs; it does not drop.

    Args:
        name: `16k` or `8k`; the archive holds both.

    Raises:
        ArgumentError: there is no such configuration.
        WeightsError: the file is damaged or incomplete, or of another model; before memory is taken.
    """
    if name not in SILEROS:
        raise ArgumentError("there is no such detector", got=repr(name), expected=" or ".join(SILEROS))
    mine, other = ("_model_8k.", "_model.") if name == "8k" else ("_model.", "_model_8k.")
    table = Table({ours: mine + theirs for ours, theirs in SILERO.items()}, (*ELSEWHERE, other + "*"))
    model = load(lambda rngs: Silero(SILEROS[name], rngs=rngs), open_weights(path), table, path, dtype=dtype)
    model.eval()
    return model
