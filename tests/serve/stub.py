# SPDX-License-Identifier: Apache-2.0
"""A server for the tests, in a process of its own: `python stub.py PORT [SECONDS [process]]`; SIGHUP reloads.

Its model doubles rows of four numbers, and takes SECONDS for a batch of at most four. A row that begins with 666 makes
it raise, with 777 it answers NaN, with 888 it hangs; with one of FATAL it ends the process that it runs in.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from functools import partial

import numpy as np

from batiste.serve import Servable, Server, serve

POISON, NAN, HANG = 666.0, 777.0, 888.0
FATAL = {
    901.0: lambda: os.kill(os.getpid(), signal.SIGKILL),  # as when memory runs out
    902.0: lambda: ctypes.string_at(0),  # a segmentation fault
    903.0: os.abort,
    904.0: lambda: os._exit(3),
}


def model(seconds: float = 0.0) -> Servable:
    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        if (x[:, 0] == POISON).any():
            raise RuntimeError("the secret of /etc/model")
        if (x[:, 0] == HANG).any():
            time.sleep(3600)
        for first in x[:, 0].tolist():
            FATAL.get(first, lambda: None)()
        return {"y": np.where(x[:, :1] == NAN, np.nan, 2 * x).astype(np.float32)}

    signature = {"x": "float32[batch, 4]"}, {"y": "float32[batch, 4]"}
    return Servable.of_function(run, signature, "double", buckets={"batch": (1, 2, 4)})


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    here, apart = partial(model, seconds), partial(Servable.in_process, "stub:model", seconds=seconds)
    chosen, timeout = (apart, 20.0) if sys.argv[3:] else (here, 1.0)
    made = Server([chosen], timeout=timeout, waiting=16, patience=5.0, idle=2.0)
    sys.exit(serve(made, port=int(sys.argv[1]), grace=10.0, idle=2.0))
