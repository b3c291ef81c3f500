# SPDX-License-Identifier: Apache-2.0
"""SummaryWriter: numbers, pictures, sounds and text of a training run for TensorBoard, written by TensorFlow."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from batiste.graph.optional import need


class SummaryWriter:
    """Writes event files into a directory that `tensorboard --logdir` shows.

    Args:
        log_dir: the directory; made if it is not there.
        auto_flush: write to the disk after every call.

    Raises:
        ImportError: TensorFlow is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike, auto_flush: bool = True):
        self._tf = need("tensorflow", extra="tensorflow")
        self._writer: Any = self._tf.summary.create_file_writer(os.fspath(log_dir))
        self._auto_flush = auto_flush

    def _write(self, kind: Any, *args: Any, **kwargs: Any) -> None:
        with self._writer.as_default():
            kind(*args, **kwargs)
        if self._auto_flush:
            self.flush()

    def flush(self) -> None:
        """Writes everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file; nothing is written afterwards."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def scalar(self, tag: str, value: Any, step: int) -> None:
        """One number, of any array of size 1."""
        self._write(self._tf.summary.scalar, tag, float(np.asarray(value).reshape(())), step=step)

    def image(self, tag: str, image: Any, step: int, max_outputs: int = 3) -> None:
        """image[height, width], [height, width, channels] or [images, height, width, channels]

        Floats are in [0, 1].
        """
        image = np.asarray(image)
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim == 3:
            image = image[None]
        self._write(self._tf.summary.image, tag, image, step=step, max_outputs=max_outputs)

    def audio(self, tag: str, audiodata: Any, step: int, sample_rate: int = 44100, max_outputs: int = 3) -> None:
        """audiodata[clips, frames, channels], or [frames, channels] of one clip, in [-1, 1]"""
        audiodata = np.asarray(audiodata)
        audiodata = audiodata[None] if audiodata.ndim == 2 else audiodata
        self._write(self._tf.summary.audio, tag, audiodata, sample_rate, step=step, max_outputs=max_outputs)

    def histogram(self, tag: str, values: Any, step: int, bins: int | None = None) -> None:
        """How the values of an array of any shape are distributed."""
        self._write(self._tf.summary.histogram, tag, np.asarray(values).reshape(-1), step=step, buckets=bins)

    def text(self, tag: str, textdata: str, step: int) -> None:
        """Text in Markdown."""
        self._write(self._tf.summary.text, tag, self._tf.constant(textdata), step=step)

    def write(self, tag: str, tensor: Any, step: int, metadata: Any = None) -> None:
        """A tensor for a plugin of TensorBoard, which `metadata` names."""
        self._write(self._tf.summary.write, tag, tensor, step=step, metadata=metadata)

    def hparams(self, hparams: dict[str, Any]) -> None:
        """The settings of the run."""
        self._write(need("tensorboard.plugins.hparams.api", extra="tensorflow").hparams, hparams)
