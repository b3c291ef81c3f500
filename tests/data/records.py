# SPDX-License-Identifier: Apache-2.0
"""Sources of records for the tests, good and bad; at the top level of a file, so that workers can be sent them."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import numpy as np


@dataclasses.dataclass
class Squares:
    """Record i is i and its square. One record may be bad, in a way."""

    size: int = 24
    bad: int = -1
    how: str = ""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, np.ndarray | int]:
        if i == self.bad:
            fault(self.how)
        wide = i == self.bad and self.how == "shape"
        return {"i": i, "square": np.full(2 if wide else 1, i * i)}


def fault(how: str) -> None:
    if how == "raise":
        raise OSError("the image is truncated")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(60)
    if how == "slow":
        time.sleep(0.7)


def opened(record: dict, rng: np.random.Generator) -> dict:
    """A record with something that cannot be sent from process to process."""
    return {"file": threading.Lock()}


def noisy(record: dict, rng: np.random.Generator) -> dict:
    """A record with a random number."""
    return {**record, "noise": rng.random()}
