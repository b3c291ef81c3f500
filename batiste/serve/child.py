# SPDX-License-Identifier: Apache-2.0
"""An engine's process: loads a servable, says what it is, and runs what is laid into the memory that it shares.

python -m batiste.serve.child SOCKET MEMORY PARENT      (numbers of open files, and of the process that started it)

It ends with the process that started it, however that one ends: the socket closes, and where the system can tell
(Linux), the engine is killed even in the middle of a computation.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import pkgutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from batiste.serve.region import Region
from batiste.serve.servable import Servable

PR_SET_PDEATHSIG = 1
log = logging.getLogger("batiste.serve.child")


def main(words: list[str]) -> None:
    talking, memory, parent = map(int, words)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for who started this one
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    with socket.socket(fileno=talking) as own, own.makefile("rwb") as line:
        started = json.loads(line.readline() or b"null")
        if started is None:
            return
        sys.path[:] = started["path"]
        logging.basicConfig(level=started["level"], format="%(asctime)s %(name)s %(levelname)s %(message)s")
        try:
            servable = loaded(started["target"], started["options"])
        except Exception as error:
            _say(line, failed=f"{type(error).__name__}: {error}")
            return
        inputs, outputs = (
            {n: [list(x.shape), x.dtype, x.below] for n, x in side.items()} for side in servable.signature
        )
        _say(
            line,
            name=servable.name,
            version=servable.version,
            digest=servable.digest,
            inputs=inputs,
            outputs=outputs,
            buckets={name: list(sizes) for name, sizes in servable.buckets.items()},
            programs=servable.programs(),
        )
        answer_all(servable, line, Region(memory))


def loaded(target: str, options: dict[str, Any]) -> Servable:
    """What the function `module:name` gives, or a part of a module such as `module:Class.name`."""
    found = pkgutil.resolve_name(target)
    return found(**{name: bytes.fromhex(x["hex"]) if isinstance(x, dict) and set(x) == {"hex"} else x
                    for name, x in options.items()})  # fmt: skip


def answer_all(servable: Servable, line: Any, region: Region) -> None:
    """A line of JSON for each that comes, until none can come any more."""
    for text in line:
        asked = json.loads(text)
        try:
            if "arrays" in asked:
                outputs = servable.run(region.get(asked["arrays"]))
                layout, _ = region.put({name: np.asarray(x) for name, x in outputs.items()}, asked["end"])
                _say(line, arrays=layout, programs=servable.programs())
            else:
                servable.warm()
                _say(line, programs=servable.programs())
        except Exception as error:
            log.exception("%s failed on a batch", servable.name)
            _say(line, failed=type(error).__name__)


def _say(line: Any, **told: Any) -> None:
    line.write(json.dumps(told).encode() + b"\n")
    line.flush()


def _die_with(parent: int) -> None:
    """Killed when the thread that started this process ends; and if memory runs out, the first to go."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        main(sys.argv[1:])
