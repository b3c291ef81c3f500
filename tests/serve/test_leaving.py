# SPDX-License-Identifier: Apache-2.0
"""A program that ends while its batcher computes ends in order: status 0, nothing on stderr."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import time
import jax
import numpy as np
from batiste.serve.batcher import Batcher

program = jax.jit(lambda x: x @ x.T)

class Signature:
    def check(self, arrays):
        return {"n": 1}

class Servable:
    name, apart, batch, rows, signature = "m", None, "n", 8, Signature()

    def room(self, sizes):
        return {"n": 8}

    def batched(self, items):
        for _ in range(40):
            np.asarray(program(np.ones((64, 8), np.float32)))
        return [{} for _ in items]

servable = Servable()
servable.batched([])
batcher = Batcher(servable)
for _ in range(200):
    batcher.submit({}, 1e6)
while not batcher.batches:
    time.sleep(0.001)
"""


def test_program_that_ends_while_its_batcher_computes() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
