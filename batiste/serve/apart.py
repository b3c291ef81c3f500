# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own: what kills it does not kill the server, and another one is started.

run(arrays) -> waits for an engine that is up -> arrays into shared memory, a line through the socket -> the answer
                                              -> the process ended: Died; meanwhile the keeper starts the next one
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from batiste.export import ShapeDtype, Signature
from batiste.graph.errors import ArgumentError

from .errors import Died
from .region import Region, nameless

log = logging.getLogger("batiste.serve")
SAME = ("name", "version", "inputs", "outputs", "buckets")
LINE = 1 << 20  # bytes of a line, at most
PAUSE, LONGEST = 0.25, 30.0  # seconds before an engine that died at once is started again: twice as many each time


def line(**told: Any) -> bytes:
    """As it goes through the socket."""
    return json.dumps(told, default=os.fspath).encode() + b"\n"


def first_line(target: str, options: Mapping[str, Any]) -> bytes:
    """What a process is to load.

    Raises:
        ArgumentError: an option cannot be told.
    """
    sent = {name: {"hex": x.hex()} if isinstance(x, bytes) else x for name, x in options.items()}
    try:
        return line(target=target, options=sent, path=sys.path, level=logging.getLogger().getEffectiveLevel())
    except (TypeError, ValueError) as error:
        raise ArgumentError("An option cannot be told to another process", at=target, got=str(error),
                            expected="what JSON can say, paths, bytes") from None  # fmt: skip


class Engine:
    """One process, from its start to its end.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, started: bytes, patience: float):
        own, other = socket.socketpair()
        memory = nameless()
        with other:
            numbers = other.fileno(), memory
            words = [sys.executable, "-m", "batiste.serve.child", *map(str, (*numbers, os.getpid()))]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=numbers)
        self.region, self._socket, self._rest = Region(memory), own, b""
        self._busy = threading.Lock()
        own.settimeout(patience)
        self._started = started

    def loaded(self) -> dict[str, Any]:
        """What it has loaded.

        Raises:
            Died, OSError: it did not come so far.
            ArgumentError: it could not.
        """
        self._socket.sendall(self._started)
        return self._succeeded(self.heard())

    def warm(self) -> None:
        """The same, of running every combination of buckets."""
        self._socket.sendall(line(warm=True))
        self._succeeded(self.heard())

    def _succeeded(self, told: dict[str, Any]) -> dict[str, Any]:
        if "failed" in told:
            raise ArgumentError("The model could not be loaded", got=told["failed"])
        return told

    def heard(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            Died: it says nothing any more, or nothing that can be understood.
            ConnectionResetError: it ended without having read what it was told.
        """
        while b"\n" not in self._rest:
            try:
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                raise Died("The engine said nothing in time") from None
            if not part or len(self._rest) > LINE:
                raise Died("The engine's process ended")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\n")
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError):
            self.process.kill()
            raise Died("The engine said what cannot be understood") from None

    def run(self, arrays: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int]:
        """The outputs, and how many programs it has.

        Raises:
            BrokenPipeError, ConnectionResetError: it was dead before it could read what was asked.
            Died: it died of it.
            RuntimeError: the model raised.
        """
        with self._busy:
            layout, end = self.region.put(arrays)
            self._socket.settimeout(None)
            self._socket.sendall(line(arrays=layout, end=end))
            told = self.heard()
            if "failed" in told:
                raise RuntimeError(f"the model raised {told['failed']}; see above")
            return {name: x.copy() for name, x in self.region.get(told["arrays"]).items()}, told["programs"]

    def stop(self) -> None:
        """It ends by itself if it has nothing to do, and is killed if it has."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        self.process.kill()

    def buried(self) -> str:
        """What it died of; nothing is left of it."""
        self.stop()
        code = self.process.wait()
        with self._busy:  # whoever waited for its answer knows by now
            self._socket.close()
            self.region.close()
        return signal.Signals(-code).name if code < 0 else f"exit {code}"


class Apart:
    """A servable in a process of its own, as long as `close` was not called.

    Args:
        target: the function that makes the servable there, as text: "module:name".
        options: its arguments: what JSON can say, paths and bytes.
        patience: seconds that loading, and then warming, may take.

    Raises:
        ArgumentError: no servable could be made, or the options cannot be told to another process.

    told: is called with each death: "hung", the signal, or the exit code.
    """

    def __init__(self, target: str, options: Mapping[str, Any], patience: float = 600.0):
        self.target, self.patience = target, patience
        self._start_with = first_line(target, options)
        self.told: Callable[[str], None] = lambda why: None
        self.about: dict[str, Any] = {}
        self.programs = self.deaths = 0
        self._engine: Engine | None = None  # that is up
        self._newest: Engine | None = None
        self._changed = threading.Condition()
        self._closed = self._hung = self._answered = False
        self._failure = ""
        self._start = 1.0  # seconds that a start takes
        self._until = 0.0  # when the next engine should be up
        self._keeper = threading.Thread(target=self._keep, name=f"keeper of {target}", daemon=True)
        self._keeper.start()
        with self._changed:
            self._changed.wait_for(lambda: self.about or self._failure)
        if self._failure:
            raise ArgumentError("An engine could not be started", at=target, got=self._failure)

    # ------------------------------------------------------------ what is asked of it
    @property
    def signature(self) -> Signature:
        spec = lambda shape, dtype, below: ShapeDtype(tuple(shape), dtype, below)
        sides = ({name: spec(*x) for name, x in self.about[key].items()} for key in ("inputs", "outputs"))
        return Signature(*sides)

    @property
    def up(self) -> bool:
        return self._engine is not None

    @property
    def back(self) -> float:
        """Seconds until it should be up."""
        return 0.0 if self.up else max(self._until - time.monotonic(), 0.1)

    def run(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs of inputs of a size that was warmed; waits until an engine is up.

        Raises:
            Died: the engine died of it, or there is none any more.
            RuntimeError: the model raised.
        """
        dead = None
        while True:
            engine = self.wait(dead)
            try:
                outputs, self.programs = engine.run(arrays)
                self._answered = True
                return outputs
            except (BrokenPipeError, ConnectionResetError):
                dead = engine  # before it was asked: nothing had begun
            except Died:
                self._fallen(engine)
                raise

    def wait(self, dead: Engine | None = None) -> Engine:
        """An engine that is up, and not the one that is known to be dead.

        Raises:
            Died: this is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._engine is not None and self._engine is not dead))
            if self._engine is None:
                raise Died("The engine was closed")
            return self._engine

    def kill(self) -> None:
        """Of an engine that does not answer any more."""
        with self._changed:
            if self._engine is not None:
                self._hung = True
                self._engine.process.kill()

    def close(self) -> None:
        with self._changed:
            self._closed, self._engine, engine = True, None, self._newest
            self._changed.notify_all()
        if engine is not None:
            engine.stop()
        self._keeper.join(5)

    # ------------------------------------------------------------ the keeper
    def _keep(self) -> None:
        """A thread that lives as long as this: Linux ends a process with the thread that started it."""
        quick = 0
        while not self._closed:
            engine, problem = None, ""
            begun = time.monotonic()
            try:
                engine = self._newest = Engine(self._start_with, self.patience)
                self._begin(engine)
                self._start = time.monotonic() - begun
                engine.process.wait()
            except Exception as error:  # whatever it is: the next one may come up
                problem = str(error) or type(error).__name__
            self._fallen(engine)
            why = engine.buried() if engine is not None else "was not started"
            if self._closed or not self.about:
                break
            self.deaths += 1
            quick = 0 if self._answered else quick + 1
            pause = min(PAUSE * 2**quick, LONGEST) if quick > 1 else 0.0
            why = "hung" if self._hung else why
            log.error("%s: %s, is started again in %.1f s. %s", self.target, why, pause, problem)
            self.told(why)
            with self._changed:
                self._answered = self._hung = False
                self._until = time.monotonic() + pause + self._start
                self._changed.wait_for(lambda: self._closed, pause)
        with self._changed:
            self._failure = problem or "it was closed"
            self._changed.notify_all()

    def _begin(self, engine: Engine) -> None:
        """Takes an engine that has begun; the first is up when it has loaded, those after it when they are warm.

        Raises:
            Died, OSError: it did not come so far.
            ArgumentError: it could not load its servable, or that is another one now.
        """
        about = engine.loaded()
        if not self.about:
            if keys := [name for name, (_, dtype, _) in about["inputs"].items() if dtype.startswith("key<")]:
                raise ArgumentError("Random keys do not go to another process", got=", ".join(keys))
            self.programs = about["programs"]
        else:
            if any(about[key] != self.about[key] for key in SAME):
                raise ArgumentError("What it would serve is another model now", fix="reload it")
            if about["digest"] != self.about["digest"]:
                log.warning("%s has changed on disk: the engine that starts now serves what is there", self.target)
            engine.warm()
        with self._changed:
            self.about, self._engine = about, None if self._closed else engine
            self._changed.notify_all()

    def _fallen(self, engine: Engine | None) -> None:
        with self._changed:
            if self._engine is engine:
                self._engine, self._until = None, time.monotonic() + self._start
