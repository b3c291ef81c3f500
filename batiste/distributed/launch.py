# SPDX-License-Identifier: Apache-2.0
"""launch: several processes of one program on this machine, as a cluster would start them.

Each process finds in its environment what `initialize` reads. What they print is printed with their number in front.
When one fails, or a signal comes, all are ended; none is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, TextIO

from batiste.graph.errors import ArgumentError

from .environment import COORDINATOR, PROCESS, PROCESSES

__all__ = ["launch"]

POLL = 0.05
MOMENT = 0.5  # seconds in which failures that follow from each other are heard of
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
DEVICES = "--xla_force_host_platform_device_count"
# XLA's threads on a CPU wait for each other in collectives; with fewer than twice the devices they may wait for ever.
THREADS = 16


def launch(
    command: Sequence[str], n: int, *, devices: int | None = None, port: int | None = None, grace: float = 5
) -> int:
    """Starts `command` `n` times, as processes 0 to n - 1 of one world, and waits; gives their exit code.

    That is 0, or the code of the process that failed first (128 + the signal that ended it). The others are then sent
    SIGTERM, and SIGKILL after `grace` seconds: JAX takes a SIGTERM for news of a preemption, and does not end.

    Args:
        command: program and arguments; a file `.py` is run by this Python.
        devices: so many simulated CPU devices in each process; None for the devices that there are.
        port: where the processes meet; None for one that is free.

    Raises:
        ArgumentError: there is no such program, or a number is below one.
    """
    for name, value in (("n", n), ("devices", devices), ("port", port)):
        if value is not None and value < 1:
            raise ArgumentError(f"launch got a wrong {name}", got=value, expected="1 or more")
    words = _executable(list(command))
    port = port or free_port()
    environments = [_environment(i, n, devices, port) for i in range(n)]
    children: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        with _signals_passed_on(children) as received:
            for i, environment in enumerate(environments):
                child = subprocess.Popen(
                    words,
                    env=environment,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # a Ctrl-C reaches it through this process only, once
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                children.append(child)
                readers += [_copy(i, child.stdout, sys.stdout), _copy(i, child.stderr, sys.stderr)]
            return _wait(children, received, grace)
    finally:
        _end(children, grace=0)
        for reader in readers:
            reader.join(timeout=1)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _executable(command: list[str]) -> list[str]:
    program = command[0] if command else ""
    if program.endswith(".py"):
        if not os.path.isfile(program):
            raise ArgumentError("there is no such program", got=program, expected="a Python file or a command")
        return [sys.executable, *command]
    if shutil.which(program) is None:
        raise ArgumentError("there is no such program", got=program or "nothing", expected="a Python file or a command",
                            fix="for a module, write: python -m MODULE")  # fmt: skip
    return command


def _environment(process: int, n: int, devices: int | None, port: int) -> dict[str, str]:
    env = {**os.environ, COORDINATOR: f"127.0.0.1:{port}", PROCESSES: str(n), PROCESS: str(process)}
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault("NPROC", str(max(THREADS, 4 * (devices or 1))))
    if devices is not None:
        flags = re.sub(rf"{DEVICES}=\d+", "", env.get("XLA_FLAGS", ""))
        env.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"{flags} {DEVICES}={devices}".strip())
    return env


def _copy(process: int, source: IO[str] | None, target: TextIO) -> threading.Thread:
    """A thread that writes each line of `source` with the number of its process."""

    def copy() -> None:
        assert source is not None
        with source:
            for line in source:
                target.write(f"[{process}] {line.rstrip(chr(10))}\n")
                target.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _signals_passed_on(children: list[subprocess.Popen[str]]) -> Iterator[list[int]]:
    """While this lasts, signals go to the children; gives the list of those that came."""
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        for child in children:
            _send(child, number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield received
        return
    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[str]], received: list[int], grace: float) -> int:
    """Waits for the first failure, for a signal and `grace`, or for the end of all; gives the exit code."""
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # in the order in which they end
    for i, child in enumerate(children):
        threading.Thread(target=lambda i=i, child=child: ended.put((i, child.wait())), daemon=True).start()
    left, until = len(children), math.inf
    while left and time.monotonic() < until:
        if received and until == math.inf:
            until = time.monotonic() + grace
        try:
            i, code = ended.get(timeout=POLL)
        except queue.Empty:
            continue
        left -= 1
        if code and not received:
            i, code = _cause((i, code), ended)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            others = " Ending the others." if any(child.poll() is None for child in children) else ""
            print(f"launch: process {i} {how}.{others}", file=sys.stderr, flush=True)
            _end(children, grace)
            return 128 - code if code < 0 else code
    return 128 + received[0] if received else 0


def _cause(first: tuple[int, int], ended: queue.SimpleQueue[tuple[int, int]]) -> tuple[int, int]:
    """The failure that led to the others: one that loses a neighbour aborts at once, and may be heard of first."""
    failure = first
    until = time.monotonic() + MOMENT
    while failure[1] == -signal.SIGABRT and (remaining := until - time.monotonic()) > 0:
        try:
            other = ended.get(timeout=remaining)
        except queue.Empty:
            break
        if other[1]:
            failure = other
    return failure if failure[1] != -signal.SIGABRT else first


def _end(children: list[subprocess.Popen[str]], grace: float) -> None:
    """Ends what still runs: SIGTERM, then SIGKILL to the process and all that it started."""
    running = [child for child in children if child.poll() is None]
    for child in running if grace else []:
        _send(child, signal.SIGTERM)
    until = time.monotonic() + grace
    while time.monotonic() < until and any(child.poll() is None for child in running):
        time.sleep(POLL)
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _send(child: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m batiste.distributed", description="Many processes of one program.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser(
        "launch",
        usage="python -m batiste.distributed launch [-n N] [--devices D] [--port P] [--grace S] PROGRAM [ARGS ...]",
        help="start N processes of a program on this machine",
        description="Starts N processes of PROGRAM, which call batiste.distributed.initialize(). Their output gets "
        "their number in front. When one fails all are ended, and its exit code is returned.",
        epilog="example: python -m batiste.distributed launch -n 2 --devices 4 train.py --steps 10",
    )
    start.add_argument("-n", type=_count, default=2, metavar="N", help="processes (2)")
    start.add_argument("--devices", type=_count, metavar="D", help="simulated CPU devices in each process")
    start.add_argument("--port", type=_count, metavar="P", help="where they meet (a free port)")
    start.add_argument("--grace", type=float, default=5, metavar="S",
                       help="seconds between asking a process to end and killing it (5)")  # fmt: skip
    start.add_argument("program", metavar="PROGRAM", help="a Python file, or a command")
    start.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above zero")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m batiste.distributed`."""
    parser = _arguments()
    args = parser.parse_args(argv)
    try:
        return launch([args.program, *args.args], args.n, devices=args.devices, port=args.port, grace=args.grace)
    except ArgumentError as error:
        print(f"python -m batiste.distributed: {error}", file=sys.stderr)
        return 2
