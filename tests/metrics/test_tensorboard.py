# SPDX-License-Identifier: Apache-2.0
"""What the SummaryWriter hands to TensorFlow, and what it says without it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from batiste.metrics.tensorboard import SummaryWriter


class Recorder:
    """Stands for a file writer of TensorFlow, and for its module `summary`."""

    def __init__(self):
        self.calls: list[Any] = []
        self.open = False

    @contextmanager
    def as_default(self):
        self.open = True
        yield
        self.open = False

    def __getattr__(self, name):
        def call(*args, **kwargs):
            assert self.open or name in ("flush", "close", "create_file_writer")
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(summary=recorder, constant=lambda x: x))
    api = SimpleNamespace(hparams=recorder.hparams)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorboard.plugins", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.hparams", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.hparams.api", api)
    return recorder


def test_every_kind_reaches_the_writer(recorder, tmp_path) -> None:
    writer = SummaryWriter(tmp_path, auto_flush=False)
    writer.scalar("loss", jnp.array([2.0]), 1)
    writer.text("note", "hello", 2)
    writer.histogram("w", jnp.ones((2, 3)), 3, bins=4)
    writer.write("raw", 5, 4, metadata="plugin")
    writer.hparams({"lr": 0.1})
    writer.close()
    (_, made, _), scalar, text, histogram, raw, settings, closed = recorder.calls
    assert made == (str(tmp_path),)
    assert scalar == ("scalar", ("loss", 2.0), {"step": 1})
    assert text == ("text", ("note", "hello"), {"step": 2})
    assert histogram[1][1].shape == (6,) and histogram[2] == {"step": 3, "buckets": 4}
    assert raw == ("write", ("raw", 5), {"step": 4, "metadata": "plugin"})
    assert settings == ("hparams", ({"lr": 0.1},), {}) and closed[0] == "close"


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 4, 5, 1)])
def test_pictures_of_any_rank(recorder, tmp_path, shape) -> None:
    SummaryWriter(tmp_path).image("x", np.zeros(shape), 1)
    _, (name, (_, image), _), (flushed, _, _) = recorder.calls
    assert (name, image.shape, flushed) == ("image", (1, 4, 5, 1), "flush")


@pytest.mark.parametrize("shape", [(100, 2), (1, 100, 2)])
def test_sounds_of_one_clip_or_more(recorder, tmp_path, shape) -> None:
    SummaryWriter(tmp_path).audio("x", np.zeros(shape), 1, sample_rate=8000)
    name, (_, sound, rate), _ = recorder.calls[1]
    assert (name, sound.shape, rate) == ("audio", (1, 100, 2), 8000)


def test_without_tensorflow_the_error_says_what_is_lacking(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"tensorflow.*not installed"):
        SummaryWriter(tmp_path)
