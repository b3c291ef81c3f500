# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run in a folder: which are saved, which are kept, and which is gone back to."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax

from batiste.checkpoint.errors import CheckpointWarning, CorruptError, LockedError, NotFoundError
from batiste.checkpoint.files import FolderLock, Fs, make_folders, remove_partial, typed
from batiste.checkpoint.saving import FS, Saving, peek, reading, save_async
from batiste.checkpoint.sealed import Sealed, beside
from batiste.checkpoint.together import remove_beside, together
from batiste.distributed import exchange
from batiste.graph.errors import ArgumentError

NAME = re.compile(r"(\d{10,18})\.ckpt")


class Restored(NamedTuple):
    """What `Manager.restore_latest` found: the step, the values, and which later steps were passed over, and why."""

    step: int
    state: Any
    skipped: dict[int, str]


class Manager:
    """A folder of checkpoints, one file per step, with one writer.

    The newest `keep` are kept, the `best` one, and the last healthy one, which rotation never takes. The folder is
    locked from the first save until `close()` or the end of the process; reading needs no lock.

    Programs of several processes make one in each, of the same folder, and save and restore in all of them: each writes
    and reads what it holds, the first one keeps the folder, and all take the same step.

    Args:
        keep: how many of the newest steps stay; None for all.
        best: a metric of which the best step stays as well: `"loss"` (the smallest) or `("accuracy", "max")`.
        every: `save` does something at steps that are multiples of this.

    Raises:
        ArgumentError: an argument has no sense.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int | None = 3,
        best: str | tuple[str, Literal["min", "max"]] | None = None, every: int = 1, fs: Fs = FS,
    ):  # fmt: skip
        if (keep is not None and keep < 1) or every < 1:
            raise ArgumentError("keep and every count from 1", got=f"keep={keep}, every={every}")
        self.folder, self.keep, self.every = Path(os.path.abspath(folder)), keep, every
        self.best_metric, self.best_mode = (best, "min") if isinstance(best, str) else best or (None, "min")
        if self.best_mode not in ("min", "max"):
            raise ArgumentError("best is a metric, or (metric, 'min' or 'max')", got=best)
        self._fs = fs
        self._lock: FolderLock | None = None
        self._saving: Saving | None = None
        self._begun = False
        self._known: dict[int, tuple[bool, dict[str, float]]] = {}  # of each step: healthy, metrics

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"{step:010d}.ckpt"

    def steps(self) -> list[int]:
        """The steps that have a file, in order."""
        names = self._fs.names(self.folder) if self.folder.is_dir() else ()
        return sorted(int(found[1]) for name in names if (found := NAME.fullmatch(name)))

    def _steps_of_the_first(self) -> list[int]:
        """The steps as process 0 sees them: another may look at a later time, or through another cache."""
        return json.loads(exchange(f"steps in {self.folder}", json.dumps(self.steps()))[0])

    # ------------------------------------------------------------ saving

    def save(
        self, step: int, tree: Any, *, metrics: Mapping[str, float] | None = None, healthy: bool | None = None,
        force: bool = False, wait: bool = False,
    ) -> bool:  # fmt: skip
        """Begins to save a step in the background, and says whether it is one that is to be saved.

        Waits for the save before, of which an error comes out here, and then removes what need not be kept.

        Args:
            force: save also a step that is no multiple of `every`.
            wait: return when the checkpoint is on the medium.

        Raises:
            LockedError: another program writes into the folder.
            SaveError: this save (with `wait`), the one before, or the removal of an old step failed.
        """
        if not force and step % self.every:
            return False
        self.wait()
        self._begin()
        self._saving = save_async(self.path(step), tree, step=step, healthy=healthy, metrics=metrics, fs=self._fs)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when what was begun is on the medium, and old steps are removed."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.wait()
            self._known.pop(int(saving.path.stem), None)
            if jax.process_index() == 0:
                self._remove_orphans(saving.path.name)
                self._rotate()

    def close(self) -> None:
        """Waits, and gives the folder free."""
        try:
            self.wait()
        finally:
            self._begun = False
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _begin(self) -> None:
        """Before the first save: nobody writes until the first process has the folder."""
        if not self._begun:
            lead = jax.process_index() == 0
            together(f"lock {self.folder}", self._take_lock if lead else lambda: None, LockedError)
            self._begun = True

    def _take_lock(self) -> None:
        if self._lock is None:
            with typed(self.folder, "make the folder"):
                make_folders(self._fs, self.folder)
            self._lock = FolderLock(self._fs, self.folder)
            with typed(self.folder, "remove what a stopped save left"):
                remove_partial(self._fs, self.folder)

    def _rotate(self) -> None:
        """Removes steps, oldest first, but for those that are kept."""
        steps = self.steps()
        if self.keep is None or len(steps) <= self.keep:
            return
        about = {step: self._about(step) for step in steps}
        kept = {*steps[-self.keep :], self.last_healthy(about), self.best(about)}
        with typed(self.folder, "remove an old step"):
            for step in steps:
                if step not in kept:
                    self._fs.remove(self.path(step))
                    remove_beside(self._fs, self.path(step))
                    self._known.pop(step, None)

    def _remove_orphans(self, newest: str) -> None:
        """Removes what processes wrote of steps that were never sealed; they may be at the step after `newest`."""
        with typed(self.folder, "remove what a stopped save left"):
            names = self._fs.names(self.folder)
            for name in names:
                if (of := beside(name)) and of <= newest and of not in names:
                    self._fs.remove(self.folder / name)

    def _about(self, step: int) -> tuple[bool, dict[str, float]]:
        """Whether a step is healthy, and its metrics; a damaged one is not, and has none."""
        if step not in self._known:
            try:
                about = peek(self.path(step), fs=self._fs)
                self._known[step] = (about["healthy"] and about["step"] == step, about["metrics"])
            except (CorruptError, OSError):
                return False, {}
        return self._known[step]

    def last_healthy(self, about: Mapping[int, tuple[bool, dict[str, float]]] | None = None) -> int | None:
        """The newest step without NaN or infinite values."""
        about = about or {step: self._about(step) for step in self.steps()}
        return max((step for step, (healthy, _) in about.items() if healthy), default=None)

    def best(self, about: Mapping[int, tuple[bool, dict[str, float]]] | None = None) -> int | None:
        """The healthy step with the best metric; the newer one of equals."""
        about = about or {step: self._about(step) for step in self.steps()}
        name, sign = self.best_metric, 1 if self.best_mode == "max" else -1
        ranks = [(sign * table[name], step) for step, (healthy, table) in about.items() if healthy and name in table]
        return max(ranks)[1] if ranks else None

    # ------------------------------------------------------------ going back

    def restore(self, step: int, into: Any = None, **options: Any) -> Any:
        """The values of one step; `into` and the options are those of `load`.

        Raises:
            NotFoundError, CorruptError, MismatchError: as `load`; also a file that holds another step.
        """
        self.wait()

        def read() -> Callable[[], Any]:
            path = self.path(step)
            if not path.exists():
                raise NotFoundError("There is no such step", at=str(path), got=step, expected=self.steps())
            with Sealed(self._fs, path) as found:
                held = found.about.get("step")
            if held != step:
                raise CorruptError("The file holds another step", at=str(path), got=held, expected=step)
            return reading(path, into, fs=self._fs, **options)

        return together(f"restore {self.folder}", read, CorruptError)()

    def restore_latest(self, into: Any = None, *, healthy: bool = False, **options: Any) -> Restored | None:
        """The newest step that is whole, or None in an empty folder. Damaged ones are passed over with a warning.

        Args:
            healthy: pass over steps with NaN or infinite values too.

        Raises:
            CorruptError: there are steps, and none is whole.
            MismatchError: the newest whole step does not fit `into`.
        """
        self.wait()
        skipped: dict[int, str] = {}
        for step in reversed(self._steps_of_the_first()):
            try:
                if healthy and not self._about(step)[0]:
                    skipped[step] = "it is not healthy"
                    continue
                state = self.restore(step, into, **options)
            except NotFoundError:  # the writer removed it meanwhile
                continue
            except CorruptError as error:
                skipped[step] = str(error)
            else:
                if skipped:
                    text = f"Went back to step {step} of {self.folder}:{_reasons(skipped)}"
                    warnings.warn(text, CheckpointWarning, stacklevel=2)
                return Restored(step, state, skipped)
        if skipped:
            raise CorruptError(f"No step can be restored:{_reasons(skipped)}\n", at=str(self.folder))
        return None


def _reasons(skipped: Mapping[int, str]) -> str:
    return "".join(f"\n  step {step}: {reason}" for step, reason in skipped.items())
