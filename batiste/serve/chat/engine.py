# SPDX-License-Identifier: Apache-2.0
"""The engine: a thread that gives slots to jobs as they come and go, and takes steps for all of them together.

Each round:  jobs that ended, were cancelled or are late leave  ·  waiting jobs take free slots
             pieces of prompts are read, fewer the more slots are answering  ·  one step for all live slots

A job is refused when it comes, not when it has waited in vain: the queue is bounded, and nobody is let in who would
have to wait longer than it has time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np

from batiste.graph.errors import ArgumentError, BatisteError
from batiste.graph.leaving import leaves

from .queue import Waiting
from .sampling import Drawn, Sampling
from .slots import Slots

log = logging.getLogger(__name__)

End = Literal["stop", "length", "cancelled", "late", "unsound", "failed", "closed"]
"""Why a job ended: its reader said so; no tokens are left; nobody reads on; no time is left; the model gave no numbers;
the program failed; the engine was closed."""


GREEDY = Sampling()
UNEVEN = 1.25  # how much longer than of late a job may have to wait


class Refused(BatisteError):
    """The engine takes no job now.

    `after` says in how many seconds it is worth another try; `busy` is False if it is closing down.
    """

    def __init__(self, problem: str, *, after: float, busy: bool):
        super().__init__(problem, fix=f"try again in {math.ceil(after)} s")
        self.after, self.busy = after, busy


class Token(NamedTuple):
    """A token that was drawn, and, where asked for, the log probabilities of it and of the likeliest."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(eq=False)
class Job:
    """One answer to one prompt. Its functions are called by the engine's thread and must be quick.

    Args:
        prompt: tokens, at least one.
        limit: the most tokens of the answer.
        sampling, bias: how tokens are drawn; what is added to the logits of which tokens.
        take: is given each token; True says that the answer ends with it.
        end: is told once why the job ended.
        client: whose job it is: clients take turns.
        deadline: by `time.monotonic`, when nobody waits any more.
    """

    prompt: Sequence[int]
    limit: int
    take: Callable[[Token], bool]
    end: Callable[[End], None]
    sampling: Sampling = GREEDY
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    client: str = ""
    deadline: float = math.inf
    cancelled: bool = False
    came: float = 0.0  # by the same clock, when it was submitted

    @property
    def length(self) -> int:
        """Positions that it may fill."""
        return len(self.prompt) + self.limit

    def cancel(self) -> None:
        """Nobody reads on: the slot is free from the next round on."""
        self.cancelled = True


class Watcher(Protocol):
    """Is told what an engine does, by its thread."""

    def first(self, seconds: float, /) -> object:
        """A job got its first token, so long after it came."""

    def read(self, tokens: int, seconds: float) -> object:
        """Pieces of prompts were read."""

    def wrote(self, tokens: int, seconds: float) -> object:
        """A step was taken."""


class Figures(NamedTuple):
    """What the engine did and does: counts since the start, and what is so now."""

    tokens: int
    steps: int
    ended: Mapping[str, int]
    refused: int
    waiting: int
    live: int
    slots: int
    programs: int
    seconds_to_a_slot: float


class Engine:
    """Runs jobs in slots, in a thread of its own.

    Args:
        slots: a group of slots, or several of different lengths: a job takes a slot of the shortest that holds it.
        waiting: the most jobs that wait for a slot.

    Raises:
        ArgumentError: there are no slots.
    """

    def __init__(self, slots: Slots | Sequence[Slots], *, waiting: int = 64):
        groups = [slots] if isinstance(slots, Slots) else sorted(slots, key=lambda group: group.length)
        if not groups:
            raise ArgumentError("an engine needs slots", got="none", fix="pass Slots(model)")
        self._groups = [_Group(slots) for slots in groups]
        self._most_waiting = waiting
        self._waiting = Waiting()
        self._changed = threading.Condition()
        self._open, self._running = True, True
        self._tokens = self._steps = self._refused = 0
        self._ended: dict[str, int] = {}
        self.watcher: Watcher | None = None
        self._service = 0.0  # seconds for which a job holds a slot, of late
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="batiste-chat", daemon=True)
        self._thread.start()
        leaves(self)

    @property
    def length(self) -> int:
        """The most positions of a prompt and its answer."""
        return self._groups[-1].slots.length

    @property
    def vocab(self) -> int:
        return self._groups[0].slots.vocab

    @property
    def size(self) -> int:
        """How many slots there are."""
        return sum(group.slots.count for group in self._groups)

    @property
    def room(self) -> int:
        """How many jobs can hold a slot or wait for one."""
        return self.size + self._most_waiting

    @property
    def stalled(self) -> float:
        """For how many seconds a round has been going on: far above what a step takes, the device hangs."""
        return time.monotonic() - self._beat if self._busy() else 0.0

    @property
    def figures(self) -> Figures:
        with self._changed:
            return Figures(
                self._tokens, self._steps, dict(self._ended), self._refused, len(self._waiting),
                self._busy(), self.size,
                sum(group.slots.programs for group in self._groups), self._wait(),
            )  # fmt: skip

    def submit(self, *jobs: Job) -> None:
        """Takes these jobs, all or none.

        Raises:
            ArgumentError: a prompt is empty or has tokens outside the vocabulary, or a job does not fit into a slot.
            Refused: there is no room, or no time; or the engine is closing.
        """
        for job in jobs:
            if not job.prompt or job.limit < 1 or job.length > self.length:
                raise ArgumentError("a job's prompt and answer fit into a slot", expected=f"1 to {self.length} tokens",
                                    got=f"{len(job.prompt)} and up to {job.limit}")  # fmt: skip
            if not 0 <= min(job.prompt) <= max(job.prompt) < self.vocab:
                raise ArgumentError("a token is outside the vocabulary", got=f"{min(job.prompt)} … {max(job.prompt)}",
                                    expected=f"0 … {self.vocab - 1}")  # fmt: skip
        with self._changed:
            if not self._open:
                self._refused += len(jobs)
                raise Refused("The engine is closing down", after=5, busy=False)
            wait, free = self._wait(), self.size - self._busy()
            now = time.monotonic()
            crowded = len(self._waiting) + len(jobs) > self._most_waiting + max(free, 0)
            if crowded or any(now + UNEVEN * (wait + self._service) > job.deadline for job in jobs):
                self._refused += len(jobs)
                raise Refused("All slots are taken, and too many wait", after=max(wait, 1), busy=True)
            for job in jobs:
                job.came = now
                self._waiting.add(job)
            self._changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more jobs and ends those it has, within `timeout` seconds; whether all of them could end."""
        with self._changed:
            self._open = False
            self._changed.notify()
        until = math.inf if timeout is None else time.monotonic() + timeout
        while self._thread.is_alive() and self._pending() and time.monotonic() < until:
            time.sleep(0.005)
        ended = not self._pending()
        with self._changed:
            self._running = False
            self._changed.notify()
        self._thread.join(timeout=max(1.0, 0.0 if timeout is None else timeout))
        return ended

    def leave(self, timeout: float) -> None:
        self.close(0.0)
        self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pending(self) -> int:
        with self._changed:
            return len(self._waiting) + self._busy()

    def _wait(self) -> float:
        """Seconds until one more job would get a slot, judged by how long jobs held theirs of late."""
        ahead = len(self._waiting) + self._busy() - self.size + 1
        return max(0, math.ceil(ahead / self.size)) * self._service

    # ------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            while self._goes_on():
                self._beat = time.monotonic()
                self._leave()
                self._admit()
                for group in self._groups:
                    self._advanced(group)
        finally:
            with self._changed:
                self._open = False
                left = self._waiting.take(lambda job: True)
            for group in self._groups:
                for slot in group.held:
                    self._free(group, slot, "closed")
            for job in left:
                self._told(job, "closed")

    def _goes_on(self) -> bool:
        """Waits for something to do; False if the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running or self._waiting or self._busy())
            return self._running

    def _busy(self) -> int:
        return sum(group.busy for group in self._groups)

    def _leave(self) -> None:
        """Those whom nobody waits for any more, and who could not be answered in time if they began now."""
        now = time.monotonic()
        over = lambda job: job.cancelled or job.deadline < now
        with self._changed:
            gone = self._waiting.take(lambda job: over(job) or job.deadline < now + self._service)
        for job in gone:
            self._told(job, "cancelled" if job.cancelled else "late")
        for group in self._groups:
            for slot, held in group.held.items():
                if over(held.job):
                    self._free(group, slot, "cancelled" if held.job.cancelled else "late")

    def _admit(self) -> None:
        longest = 0
        for group in self._groups:
            fits = lambda job, least=longest, most=group.slots.length: least < job.length <= most
            for slot in group.free:
                with self._changed:
                    job = self._waiting.pop(fits)
                    if job is not None:
                        group.by_slot[slot] = _Held(job, time.monotonic())
            longest = group.slots.length

    def _advanced(self, group: _Group) -> None:
        try:
            self._advance(group)
        except Exception:
            log.exception("a program failed: the jobs in its slots are given up")
            group.lost = True
            for slot in group.held:
                self._free(group, slot, "failed")

    def _advance(self, group: _Group) -> None:
        """Reads pieces of prompts, the oldest first, and takes a step."""
        slots = group.slots
        if group.lost:
            slots.clear()
            group.lost = False
        for slot, held in group.held.items():
            if held.parts is None:
                slots.insert(slot, held.job.prompt, held.job.sampling, held.job.bias)
                held.parts = slots.parts(held.job.prompt)
        reading = sorted((held.began, slot) for slot, held in group.held.items() if held.parts)
        answering = group.busy - len(reading)
        parts = ((slot, part) for _, slot in reading for part in tuple(group.held[slot].parts or ()))
        start, tokens = time.monotonic(), 0
        for slot, part in itertools.islice(parts, max(1, len(reading) - answering)):
            slots.fill(slot, part)
            group.held[slot].read()
            tokens += len(part)
        if tokens and self.watcher is not None:
            slots.wait()
            self.watcher.read(tokens, time.monotonic() - start)
        live = np.zeros(slots.count, bool)
        live[[slot for slot, held in group.held.items() if not held.parts]] = True
        if live.any():
            start = time.monotonic()
            out = slots.step(live)
            self._steps += 1
            if self.watcher is not None:
                self.watcher.wrote(int(live.sum()), time.monotonic() - start)
            for slot in np.flatnonzero(live).tolist():
                self._give(group, slot, out)

    def _give(self, group: _Group, slot: int, out: Drawn) -> None:
        """Hands a job its token; where a job's own functions fail, it fails alone."""
        held = group.held[slot]
        if not out.sound[slot]:
            return self._free(group, slot, "unsound")
        token = Token(int(out.token[slot]))
        if held.job.sampling.logprobs:
            likeliest = zip(out.likeliest[slot].tolist(), out.likeliest_logprob[slot].tolist())
            token = Token(token.token, float(out.logprob[slot]), tuple(likeliest))
        held.given += 1
        if held.given == 1 and self.watcher is not None:
            self.watcher.first(time.monotonic() - held.job.came)
        self._tokens += 1
        try:
            over = held.job.take(token)
        except Exception:
            log.exception("the reader of an answer failed")
            return self._free(group, slot, "failed")
        if over or held.given >= held.job.limit:
            self._free(group, slot, "stop" if over else "length")

    def _free(self, group: _Group, slot: int, why: End) -> None:
        with self._changed:
            held = group.by_slot.pop(slot)
            seconds = time.monotonic() - held.began
            if why in ("stop", "length"):
                self._service += (seconds - self._service) * (0.2 if self._service else 1)
        self._told(held.job, why)

    def _told(self, job: Job, why: End) -> None:
        with self._changed:
            self._ended[why] = self._ended.get(why, 0) + 1
        with contextlib.suppress(Exception):  # whoever asked is gone
            job.end(why)


@dataclasses.dataclass
class _Held:
    """A job that holds a slot: since when, what is still to be read of its prompt, and how many tokens it was given."""

    job: Job
    began: float
    parts: list[Sequence[int]] | None = None
    given: int = 0

    def read(self) -> None:
        """A piece less is to be read."""
        self.parts = (self.parts or [])[1:]


class _Group:
    """Slots of one length, and the jobs that hold them; `lost` says that the device's memory of them is."""

    def __init__(self, slots: Slots):
        self.slots, self.lost = slots, False
        self.by_slot: dict[int, _Held] = {}

    @property
    def busy(self) -> int:
        return len(self.by_slot)

    @property
    def held(self) -> dict[int, _Held]:
        """A copy, so that slots may be freed on the way."""
        return dict(self.by_slot)

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.slots.count) if slot not in self.by_slot]
