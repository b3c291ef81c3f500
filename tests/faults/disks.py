# SPDX-License-Identifier: Apache-2.0
"""File systems that go wrong on purpose: that crash, that refuse, that forget what was not synced."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batiste.checkpoint import files
from batiste.checkpoint.files import Fs

CHANGES = (
    "create",
    "write",
    "sync",
    "close",
    "rename",
    "remove",
    "make_folder",
    "remove_folder",
    "sync_folder",
    "lock",
)


class Crash(BaseException):
    """The process is no more."""


class Counted(Fs):
    """Counts the operations that change something, and gives `fault` the chance to interfere."""

    def __init__(self) -> None:
        self.count, self.open_files, self.kinds = 0, [], []

    def fault(self, number: int, kind: str, args: tuple[Any, ...]) -> None:
        """Called before each operation."""

    def _do(self, kind: str, *args: Any) -> Any:
        number, self.count = self.count, self.count + 1
        self.kinds.append(kind)
        self.fault(number, kind, args)
        result = getattr(Fs, kind)(self, *args)
        if kind in ("create", "lock"):
            self.open_files.append(result)
        elif kind == "close":
            self.open_files.remove(args[0])
        return result

    def close(self, file: int) -> None:
        if file in self.open_files:
            self._do("close", file)
        else:
            super().close(file)  # it was open for reading

    def bury(self) -> None:
        """What the system does when a process ends: its files are closed, its locks are gone."""
        for file in self.open_files:
            os.close(file)
        self.open_files.clear()
        files._held.clear()


for kind in set(CHANGES) - {"close"}:
    setattr(Counted, kind, lambda self, *args, kind=kind: self._do(kind, *args))


class Crashing(Counted):
    """Crashes before operation `at`, or (when `late`) after it, a write being half done. Nothing works from then on."""

    def __init__(self, at: int, late: bool):
        super().__init__()
        self.at, self.late = at, late

    def fault(self, number: int, kind: str, args: tuple[Any, ...]) -> None:
        if number == self.at and self.late:
            if kind == "write":
                args = (args[0], args[1][: len(args[1]) // 2])
            if kind not in ("close", "lock"):
                getattr(Fs, kind)(self, *args)
        if number >= self.at:
            raise Crash


class Refusing(Counted):
    """Refuses operation `at` with an error, and with `for_good` all that follow."""

    def __init__(self, at: int, code: int, for_good: bool):
        super().__init__()
        self.at, self.code, self.for_good, self.refused = at, code, for_good, False

    def fault(self, number: int, kind: str, args: tuple[Any, ...]) -> None:
        if number == self.at or (self.for_good and number > self.at):
            self.refused = True
            if kind == "close":
                os.close(args[0])
                self.open_files.remove(args[0])
            raise OSError(self.code, os.strerror(self.code))


class Forgetful(Counted):
    """Keeps a journal, from which `after_power_loss` tells what a disk may hold that lost power at any moment."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.journal, self._names = folder, [], {}

    def _do(self, kind: str, *args: Any) -> Any:
        content = bytes(args[1]) if kind == "write" else None
        result = super()._do(kind, *args)
        if kind == "create":
            self._names[result] = args[0]
            self.journal.append((kind, args[0], result))
        elif kind == "write":
            assert content is not None
            self.journal.append((kind, args[0], content[:result]))
        elif kind not in ("close", "lock"):
            self.journal.append((kind, *args))
        return result

    def acknowledged(self, value: Any) -> None:
        self.journal.append(("ack", value))

    def unsynced(self, upto: int) -> list[str]:
        """Names of files and folders with changes that no sync followed, among the first operations."""
        open_names: dict[int, Path] = {}
        dirty: set[Path] = set()
        for kind, *args in self.journal[:upto]:
            if kind == "create":
                open_names[args[1]] = args[0]
                dirty |= {args[0], args[0].parent}
            elif kind == "write":
                dirty.add(open_names[args[0]])
            elif kind == "sync":
                dirty.discard(open_names[args[0]])
            elif kind == "sync_folder":
                dirty.discard(args[0])
            elif kind in ("rename", "remove", "make_folder", "remove_folder"):
                dirty.add(args[-1].parent)
                if kind == "rename" and args[0] in dirty:
                    dirty = dirty - {args[0]} | {args[1]}
        return sorted(map(str, dirty))

    def disks_after_power_loss(self, beside: Path) -> Iterator[tuple[int, Path]]:
        """After each number of operations, and with each fate of what was not synced: a folder with what is left."""
        for upto in range(len(self.journal) + 1):
            for tail in ("empty", "zeros", "half"):
                for names_kept in (True, False):
                    after = beside / f"{upto}-{tail}-{names_kept}"
                    after.mkdir()
                    for path, content in self.after_power_loss(upto, tail, names_kept):
                        if content is None:
                            (after / path).mkdir()
                        else:
                            (after / path).write_bytes(content)
                    yield upto, after
                    shutil.rmtree(after)

    def after_power_loss(self, upto: int, tail: str, names_kept: bool) -> Iterator[tuple[Path, bytes | None]]:
        """Paths with their content (None: a folder), relative to the folder, after the first `upto` operations.

        Args:
            tail: what became of bytes that were not synced: `empty`, `zeros` or `half`.
            names_kept: whether changes of names in folders that were not synced happened.
        """
        written: dict[int, bytes] = {}  # by number of the file's creation
        durable: dict[int, int] = {}
        number_of: dict[int, int] = {}  # of an open file
        now: dict[Path, int | None] = {}
        safe: dict[Path, int | None] = {}
        moved: list[tuple[Path, Path]] = []  # folders
        for number, (kind, *args) in enumerate(self.journal[:upto]):
            if kind == "create":
                number_of[args[1]] = number
                written[number], durable[number] = b"", 0
                now[args[0]] = number
            elif kind == "write":
                written[number_of[args[0]]] += args[1]
            elif kind == "sync":
                durable[number_of[args[0]]] = len(written[number_of[args[0]]])
            elif kind == "rename":
                if now[args[0]] is None:
                    moved.append((args[0], args[1]))
                    now = _renamed(now, *moved[-1])
                now[args[1]] = now.pop(args[0])
            elif kind in ("remove", "remove_folder"):
                now.pop(args[0])
            elif kind == "make_folder":
                now[args[0]] = None
            elif kind == "sync_folder":
                safe = {path: file for path, file in safe.items() if path.parent != args[0]}
                safe |= {path: file for path, file in now.items() if path.parent == args[0]}
                for old, new in moved:
                    safe = _renamed(safe, old, new) if new.parent == args[0] else safe
        names = now if names_kept else safe
        for path in sorted(names):
            above = [parent for parent in path.parents if parent != self.folder and self.folder in parent.parents]
            if all(parent in names for parent in above):
                number = names[path]
                yield (
                    path.relative_to(self.folder),
                    None if number is None else _lost(written[number], durable[number], tail),
                )


def _renamed(names: dict[Path, int | None], old: Path, new: Path) -> dict[Path, int | None]:
    """What is below a folder that has another name now."""
    return {new / path.relative_to(old) if old in path.parents else path: file for path, file in names.items()}


def _lost(content: bytes, durable: int, tail: str) -> bytes:
    rest = content[durable:]
    kept = {"empty": b"", "zeros": bytes(len(rest)), "half": rest[: len(rest) // 2]}
    return content[:durable] + kept[tail]


ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)
