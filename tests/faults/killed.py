# SPDX-License-Identifier: Apache-2.0
"""Saves that are killed: a child saves without end and tells when each begins and is done; it is killed at any moment.

`python -m tests.faults.killed FOLDER --kills 20` forks one child per kill, each of which goes on from what the last one
left, and prints as JSON what was lost: nothing. `--jax` saves in the background from a fresh process with devices.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from batiste import checkpoint

RECORD = struct.Struct("<qc")
BEGUN, DONE = b"b", b"d"


def state(value: int, mib: float, on_device: bool) -> dict[str, Any]:
    w = np.full(int(mib * (1 << 18)), value, np.float32)
    return {"w": jnp.asarray(w) if on_device else w, "n": value}


def save_for_ever(folder: Path, pipe: int, mib: float, background: bool) -> None:
    with checkpoint.Manager(folder, keep=2) as manager:
        value = (manager.steps() or [0])[-1]
        while True:
            value += 1
            tree = state(value, mib, background)
            os.write(pipe, RECORD.pack(value, BEGUN))
            manager.save(value, tree, wait=not background)
            if background:
                manager.wait()
            os.write(pipe, RECORD.pack(value, DONE))


def told(pipe: int) -> tuple[int, bool]:
    """The newest value that was acknowledged, and whether a save was under way at the end."""
    content = b""
    while piece := os.read(pipe, 1 << 16):
        content += piece
    records = list(RECORD.iter_unpack(content[: len(content) // RECORD.size * RECORD.size]))
    return max((value for value, what in records if what == DONE), default=0), records[-1:] != [] and (
        records[-1][1] == BEGUN
    )


def child(folder: Path, mib: float, fresh: bool) -> tuple[int, int]:
    """A process that saves, and the end of a pipe at which it tells."""
    out, into = os.pipe()
    if fresh:
        command = [sys.executable, "-m", "tests.faults.killed", str(folder), "--save-to", str(into), "--mib", str(mib)]
        pid = subprocess.Popen(command, pass_fds=[into]).pid
    elif not (pid := os.fork()):
        save_for_ever(folder, into, mib, background=False)
    os.close(into)
    return pid, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mib", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jax", action="store_true")
    parser.add_argument("--save-to", type=int)
    args = parser.parse_args()
    if args.save_to is not None:
        save_for_ever(args.folder, args.save_to, args.mib, background=True)
    rng, acked = random.Random(args.seed), 0
    found = {"kills": args.kills, "inside": 0, "lost": 0, "unreadable": 0, "acknowledged": 0}
    for _ in range(args.kills):
        pid, pipe = child(args.folder, args.mib, args.jax)
        first = os.read(pipe, RECORD.size)  # it has begun its first save
        assert first, "the child ended by itself"
        time.sleep(rng.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done, inside = told(pipe)
        os.close(pipe)
        found["inside"] += inside or not done
        acked = max(acked, done)
        restored = checkpoint.Manager(args.folder).restore_latest(state(0, args.mib, False))
        value = restored.state["n"] if restored else 0
        found["lost"] += value < acked
        found["unreadable"] += bool(restored and (restored.skipped or (restored.state["w"] != value).any()))
    found["acknowledged"] = acked
    print(json.dumps(found))


if __name__ == "__main__":
    main()
