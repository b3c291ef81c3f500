# SPDX-License-Identifier: Apache-2.0
"""The images of the demo: scikit-learn's handwritten digits, or Fashion-MNIST from Debian's package."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_PACKAGE = "dataset-fashion-mnist"
QUIET = {"DEBIAN_FRONTEND": "noninteractive"}
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Dataset:
    """Images in [0, 1] with shape (n, size, size, 1), their labels, and a held-out part that is never trained on."""

    name: str
    classes: tuple[str, ...]
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    epochs: int  # how long to train unless told otherwise

    @property
    def size(self) -> int:
        return self.train_x.shape[1]


def load(name: str) -> Dataset:
    """The data set called `name`: "digits" or "fashion-mnist"."""
    return {"digits": digits, "fashion-mnist": fashion_mnist}[name]()


def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels; a fifth of each class is held out, the same fifth in every run."""
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    order = np.arange(len(x))
    train, test = (np.asarray(p) for p in train_test_split(order, test_size=0.2, stratify=labels, random_state=0))
    y = labels.astype(np.int32)
    return Dataset("digits", tuple("0123456789"), x[train], y[train], x[test], y[test], epochs=30)


def fashion_mnist(folder: Path = FASHION) -> Dataset:
    """70,000 pictures of clothes of 28x28 pixels, 10,000 of them held out."""
    if not folder.is_dir():
        install_fashion_mnist(folder)
    pixels, labels = {}, {}
    for part in ("train", "t10k"):
        pixels[part] = (read_idx(folder / f"{part}-images-idx3-ubyte.gz")[..., None] / 255).astype(np.float32)
        labels[part] = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int32)
    return Dataset(
        "fashion-mnist", FASHION_CLASSES, pixels["train"], labels["train"], pixels["t10k"], labels["t10k"], epochs=2
    )


def install_fashion_mnist(folder: Path) -> None:
    """Installs Debian's package where that is possible; otherwise ends the program and says what to do."""
    if shutil.which("apt-get") and os.geteuid() == 0:
        print(f"Fashion-MNIST is not installed yet: apt-get install {FASHION_PACKAGE}", flush=True)
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", FASHION_PACKAGE]):
            ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
            if ended.returncode:
                print(f"{' '.join(command)}: {ended.stderr.strip()}", file=sys.stderr)
    if not folder.is_dir():
        fail(f"Fashion-MNIST is not in {folder}.\n  fix: sudo apt-get install {FASHION_PACKAGE}   (Debian, Ubuntu)")


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file: two zero bytes, the type (8: bytes), the rank, big-endian sizes, the values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        fail(f"cannot read {path}: {error}\n  fix: sudo apt-get install --reinstall {FASHION_PACKAGE}")
    start = 4 + 4 * raw[3] if raw[:3] == b"\0\0\x08" else len(raw)
    shape = np.frombuffer(raw[4:start], ">u4")
    values = np.frombuffer(raw[start:], np.uint8)
    if values.size == 0 or values.size != shape.prod():
        fail(f"{path} is no complete IDX file of bytes.\n  fix: sudo apt-get install --reinstall {FASHION_PACKAGE}")
    return values.reshape(shape)


def fail(message: str) -> NoReturn:
    """Ends the program as argparse does for a wrong argument."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def batches(x: np.ndarray, y: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """One epoch: every image once in a new order, each moved by up to a pixel; a short last batch is left out."""
    order = rng.permutation(len(x))
    for start in range(0, len(x) - size + 1, size):
        chosen = order[start : start + size]
        yield shifted(x[chosen], rng), y[chosen]


def shifted(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by -1, 0 or 1 pixel up or down and left or right; what comes in is black."""
    n, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, right = rng.integers(0, 3, (2, n, 1))
    rows, columns = down + np.arange(h), right + np.arange(w)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def in_chunks(x: np.ndarray, size: int = 1000) -> Iterator[np.ndarray]:
    """`x` in order, `size` images at a time."""
    for start in range(0, len(x), size):
        yield x[start : start + size]
