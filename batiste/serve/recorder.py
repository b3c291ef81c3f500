# SPDX-License-Identifier: Apache-2.0
"""A part of the requests with their answers kept on disk, to be run again; how far today's data are from a reference.

PSI = Σ_bins (p - q) log(p / q), of the shares p today and q in the reference: below 0.1 alike, above 0.25 changed.

Source: population stability index, as in Siddiqi 2006, "Credit Risk Scorecards", chapter 9.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from batiste.graph.errors import ArgumentError

from .servable import Arrays, Servable

log = logging.getLogger("batiste.serve")
BINS = 10
LEAST = 1e-4  # share of an empty bin
ENOUGH = 64  # numbers without which nothing is said


class Histogram:
    """Counts of numbers between the edges that divide a reference evenly; the last bin is for NaN and infinities.

    >>> reference = Histogram.of(np.arange(1000.0))
    >>> round(reference.distance(np.arange(1000.0)), 3), reference.distance(np.arange(1000.0) + 500) > 0.25
    (0.0, True)
    """

    def __init__(self, edges: Any, counts: Any):
        self.edges, self.counts = np.asarray(edges, np.float64), np.asarray(counts, np.float64)

    @classmethod
    def of(cls, x: np.ndarray) -> Histogram:
        flat = np.asarray(x, np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        edges = np.unique(np.quantile(finite, np.linspace(0, 1, BINS + 1)[1:-1])) if finite.size else np.zeros(1)
        return cls(edges, cls(edges, 0).count(flat))

    def count(self, x: np.ndarray) -> np.ndarray:
        flat = np.asarray(x, np.float64).ravel()
        finite = np.isfinite(flat)
        bins = np.searchsorted(self.edges, flat[finite], side="right")
        return np.append(np.bincount(bins, minlength=len(self.edges) + 1), (~finite).sum())

    def distance(self, x: np.ndarray) -> float:
        return self.index(self.count(x))

    def index(self, counts: np.ndarray) -> float:
        p, q = (np.maximum(c / max(c.sum(), 1), LEAST) for c in (counts, self.counts))
        return float(((p - q) * np.log(p / q)).sum())


class Recorder:
    """Looks at requests while they are answered, in a thread of its own; when it is behind, it looks at fewer.

    Args:
        folder: where samples go, one file of arrays (npz) each; None keeps none.
        share: of the requests that are kept.
        most: files; then no more are written.
        reference: a file that `write_reference` wrote.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, share: float = 0.01, most: int = 10_000,
                 reference: str | os.PathLike[str] | None = None, seed: int | None = None):  # fmt: skip
        if not 0 <= share <= 1:
            raise ArgumentError("the share of requests that are kept", got=share, expected="0 to 1")
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.share, self.most, self.kept, self.missed = share, most, 0, 0
        self.random = random.Random(seed)
        self.reference = {} if reference is None else read_reference(reference)
        self.counts = {name: np.zeros_like(histogram.counts) for name, histogram in self.reference.items()}
        self._queue: queue.Queue[Any] = queue.Queue(256)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def saw(self, servable: Servable, inputs: Arrays, outputs: Arrays) -> None:
        """One request and its answer; it never waits."""
        keep = self.folder is not None and self.kept < self.most and self.random.random() < self.share
        if keep or self.reference:
            try:
                self._queue.put_nowait((servable.name, servable.version, inputs, outputs, keep))
            except queue.Full:
                self.missed += 1

    def drift(self) -> Iterator[tuple[str, str, float]]:
        """Model, tensor and index of each tensor of the reference of which enough has been seen."""
        for (model, tensor), histogram in self.reference.items():
            counts = self.counts[model, tensor]
            if counts.sum() >= ENOUGH:
                yield model, tensor, histogram.index(counts)

    def flush(self) -> None:
        """Waits until all that was seen has been looked at."""
        self._queue.join()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(10)

    def _work(self) -> None:
        while (seen := self._queue.get()) is not None:
            try:
                self._look(*seen)
            except Exception:
                log.exception("a request was not recorded")
            finally:
                self._queue.task_done()

    def _look(self, model: str, version: str, inputs: Arrays, outputs: Arrays, keep: bool) -> None:
        for side, arrays in (("inputs", inputs), ("outputs", outputs)):
            for name, x in arrays.items():
                histogram = self.reference.get((model, f"{side}/{name}"))
                if histogram is not None:
                    self.counts[model, f"{side}/{name}"] += histogram.count(x)
        if keep:
            self._write(model, version, inputs, outputs)

    def _write(self, model: str, version: str, inputs: Arrays, outputs: Arrays) -> None:
        assert self.folder is not None
        self.kept += 1
        name = f"{time.time_ns():020d}-{self.kept:06d}.npz"
        arrays = {f"inputs/{k}": v for k, v in inputs.items()} | {f"outputs/{k}": v for k, v in outputs.items()}
        plain = {key: x.view(np.uint16) if x.dtype.name == "bfloat16" else x for key, x in arrays.items()}
        dtypes = {key: x.dtype.name for key, x in arrays.items()}
        about = np.frombuffer(json.dumps({"model": model, "version": version, "dtypes": dtypes}).encode(), np.uint8)
        part = self.folder / f".{name}"
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, about=about, **plain)
        part.replace(self.folder / name)


def samples(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Of each file that a Recorder wrote: its path, what it is about, inputs, outputs. No code in it is run."""
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path, allow_pickle=False) as held:
            about = json.loads(bytes(held["about"]).decode())
            arrays = {}
            for key, dtype in about["dtypes"].items():
                x = held[key]
                arrays[key] = x.view(jnp.bfloat16) if dtype == "bfloat16" else x
        inputs, outputs = (
            {key.removeprefix(side): x for key, x in arrays.items() if key.startswith(side)}
            for side in ("inputs/", "outputs/")
        )
        yield path, about, inputs, outputs


def write_reference(path: str | os.PathLike[str], model: str, rows: Mapping[str, np.ndarray]) -> None:
    """Keeps how tensors such as `inputs/x` and `outputs/probability` are spread over an evaluation set."""
    tensors = {name: Histogram.of(x) for name, x in rows.items()}
    data = {"model": model, "tensors": {name: {"edges": h.edges.tolist(), "counts": h.counts.tolist()}
                                        for name, h in tensors.items()}}  # fmt: skip
    Path(path).write_text(json.dumps(data, allow_nan=False))


def read_reference(path: str | os.PathLike[str]) -> dict[tuple[str, str], Histogram]:
    """
    Raises:
        ArgumentError: the file is none that `write_reference` wrote.
    """
    try:
        data = json.loads(Path(path).read_text())
        return {(data["model"], name): Histogram(h["edges"], h["counts"]) for name, h in data["tensors"].items()}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArgumentError("this is no reference for drift", at=str(path), got=str(error)[:200],
                            fix="write it with batiste.serve.write_reference") from error  # fmt: skip
