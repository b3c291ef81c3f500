# SPDX-License-Identifier: Apache-2.0
"""Worker processes that make batches, in an order that does not depend on how many there are.

Task t goes to worker t mod n, and results are taken in turn. Each worker keeps the record that it reads in shared
memory, so that whoever waits for a worker that died, hangs or is slow can say for which record.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawArray
from pickle import PicklingError
from typing import Any

import jax

from batiste.graph.errors import ArgumentError

from .errors import DataError, DataTimeout, SlowDataWarning, WorkerError
from .order import Task
from .reading import Mark

AHEAD = 2  # tasks that a worker has been given and not yet handed in
RECORD, BEAT = 0, 1  # shared memory: the record that is being read, and how many were begun
STARTUP = 120.0  # seconds until a new process must have begun its first record
POLL = 0.2

Work = Callable[[Task, Mark], Any]


def serve(work: Work, pipe: Connection, shared: Any) -> None:
    """What a worker does: a task comes in, a batch or the reason why there is none goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the program decides what it means
    jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the program
    threading.Thread(target=end_with_the_program, daemon=True).start()

    def mark(record: int) -> None:
        shared[RECORD] = record
        shared[BEAT] += 1

    with contextlib.suppress(EOFError, OSError):  # the program is gone
        while True:
            task = pipe.recv()
            try:
                message = dumped((work(task, mark), None))
            except Exception as error:
                message = dumped((None, (portable(error), traceback.format_exc())))
            pipe.send_bytes(message)


def end_with_the_program() -> None:
    """A record may hang, and the program may be killed; its workers do not outlive it."""
    program = multiprocessing.parent_process()
    if program is not None:
        program.join()
        os._exit(0)


def dumped(result: Any) -> memoryview:
    return ForkingPickler.dumps(result)


def portable(error: Exception) -> Exception:
    """An error that can be sent; any but the library's own might not survive pickling."""
    return error if isinstance(error, DataError | ArgumentError) else DataError(f"{type(error).__name__}: {error}")


class Worker:
    """One process, seen from the program."""

    def __init__(self, number: int, work: Work):
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may lock up
        self.number = number
        self.shared = RawArray("q", 2)
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(work, other, self.shared), name=f"batiste-data-{number}", daemon=True
        )
        try:
            self.process.start()
        except (PicklingError, AttributeError, TypeError) as error:
            raise ArgumentError(
                f"The data cannot be sent to a worker process: {error}",
                fix="define what reads the records at the top level of a module, or use workers=0",
            ) from error
        finally:
            other.close()

    def give(self, task: Task) -> None:
        try:
            self.pipe.send(task)
        except OSError as error:  # its end is closed
            raise self._death() from error

    def take(self, slow: float, timeout: float) -> Any:
        """The next result; says when it is slow, raises when it takes too long or the process dies."""
        since, beat, warned = time.monotonic(), self.shared[BEAT], False
        while self.pipe not in (ready := wait([self.pipe, self.process.sentinel], POLL)):
            if ready:
                raise self._death()
            if beat != self.shared[BEAT]:
                since, beat, warned = time.monotonic(), self.shared[BEAT], False
            waited = time.monotonic() - since
            if waited > (timeout if beat else max(timeout, STARTUP)):
                raise DataTimeout(
                    "A record takes too long", **self._where(), got=f"{waited:.1f} s", expected=f"at most {timeout} s",
                    fix="mend what reads this record, or allow more with timeout=",
                )  # fmt: skip
            if beat and waited > slow and not warned:
                warned = True
                warnings.warn(
                    f"Waiting for data: worker {self.number} has been reading record {self.shared[RECORD]} "
                    f"for {waited:.1f} s",
                    SlowDataWarning,
                    stacklevel=2,
                )
        try:
            result, failed = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if failed:
            error, text = failed
            error.add_note(f"In worker {self.number}:\n{text}")
            raise error
        return result

    def _where(self) -> dict[str, Any]:
        begun = self.shared[BEAT]
        return {"record": self.shared[RECORD] if begun else None, "at": f"worker {self.number}"}

    def _death(self) -> WorkerError:
        self.process.join(5)
        code = self.process.exitcode or 0
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            fix = "look at the record; SIGKILL often comes from the system when memory runs out: use fewer workers"
        else:
            how = f"ended with exit code {code}"
            fix = "look at the record, and at what the worker wrote on stderr"
        if not self.shared[BEAT]:
            fix = "start the program under `if __name__ == '__main__':`, since workers import it"
        return WorkerError(f"A data worker {how}", **self._where(), fix=fix)

    def stop(self) -> None:
        self.process.kill()  # it may hang, and holds nothing that must be kept
        self.process.join(5)
        self.pipe.close()


class Workers:
    """Runs tasks in `count` processes and gives the results in the order of the tasks."""

    def __init__(self, work: Work, count: int, slow: float, timeout: float):
        self.slow, self.timeout = slow, timeout
        self.workers: list[Worker] = []
        try:
            for number in range(count):
                self.workers.append(Worker(number, work))
        except BaseException:
            self.stop()
            raise

    def run(self, tasks: Iterator[Task]) -> Iterator[Any]:
        """Results, as they are asked for. Nothing may be in flight from an earlier run."""
        waiting: deque[Worker] = deque()
        count = 0
        while True:
            for task in tasks:
                worker = self.workers[count % len(self.workers)]
                worker.give(task)
                waiting.append(worker)
                count += 1
                if len(waiting) >= AHEAD * len(self.workers):
                    break
            if not waiting:
                return
            yield waiting.popleft().take(self.slow, self.timeout)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
