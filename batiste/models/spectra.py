# SPDX-License-Identifier: Apache-2.0
"""What Whisper hears: how loud each band of frequencies is, 100 times a second.

spectrum = (max(loud, max loud - 8) + 4) / 4,  loud = log10 Σ_F mel |rfft(hann · frame)|²

Dims, in the suffixes of names:  B batch   N samples   J moments   W samples of a frame   F frequencies   M bands

Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2; Slaney 1998,
    "Auditory Toolbox", for the mel scale.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

from batiste.graph.errors import ShapeError

RATE = 16_000
"""Samples of a second."""
FRAME, HOP = 400, 160
"""Samples of a frame, and from the start of one to that of the next."""
LINEAR, BEND, STEP = 200 / 3, 15.0, np.log(6.4) / 27
"""Hz of a mel below 1000 Hz; the mels of 1000 Hz; the logarithm of what a mel above multiplies by."""


def log_mel(samples_BN: Array, bands: int = 80) -> Array:
    """spectrum[B, N / 160, M] of samples[B, N] between -1 and 1, 16000 a second

    What is quieter than the loudest of a row by 80 dB counts as that.

    Raises:
        ShapeError: there are no rows, or they are shorter than half a frame.

    >>> log_mel(jnp.zeros((1, 1600))).shape
    (1, 10, 80)
    """
    if samples_BN.ndim != 2 or samples_BN.shape[1] <= FRAME // 2:
        raise ShapeError("a spectrum is made of rows of samples", at="log_mel", got=samples_BN.shape,
                         expected=f"(batch, more than {FRAME // 2})",
                         fix="add a dim of size 1: samples[None]")  # fmt: skip
    needed = (samples_BN.shape[1] // HOP + 2) * HOP  # of the last frame, more than half
    heard_BN = jnp.pad(samples_BN.astype(jnp.float32), ((0, 0), (FRAME // 2, FRAME // 2)), mode="reflect")
    heard_BN = jnp.pad(heard_BN, ((0, 0), (0, HOP)))[:, :needed]
    parts_BJH = heard_BN.reshape(len(heard_BN), -1, HOP)
    frames_BJW = jnp.concatenate([parts_BJH[:, :-2], parts_BJH[:, 1:-1], parts_BJH[:, 2:, : FRAME - 2 * HOP]], axis=-1)
    waves_BJF = jnp.fft.rfft(frames_BJW * jnp.asarray(_hann())[None, None])
    power_BJF = jnp.square(waves_BJF.real) + jnp.square(waves_BJF.imag)
    loud_BJM = jnp.log10(jnp.maximum(power_BJF @ jnp.asarray(mel_bands(bands)), 1e-10))
    return (jnp.maximum(loud_BJM, loud_BJM.max(axis=(1, 2), keepdims=True) - 8) + 4) / 4


def _hann() -> np.ndarray:
    """sin²(π w / W)"""
    return (np.sin(np.pi * np.arange(FRAME) / FRAME) ** 2).astype(np.float32)


@functools.cache
def mel_bands(bands: int) -> np.ndarray:
    """weight[F, M]: triangles over the frequencies from 0 to 8000 Hz, of one area, with equal steps on the mel scale

    >>> mel_bands(80).shape
    (201, 80)
    """
    top = BEND + np.log(RATE / 2 / 1000) / STEP
    mels = np.linspace(0, top, bands + 2)
    corners = np.where(mels < BEND, LINEAR * mels, 1000 * np.exp(STEP * (mels - BEND)))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    hz = np.linspace(0, RATE / 2, FRAME // 2 + 1)[:, None]
    triangles = np.minimum((hz - low) / (middle - low), (high - hz) / (high - middle))
    return (np.maximum(triangles, 0) * 2 / (high - low)).astype(np.float32)
