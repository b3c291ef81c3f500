# SPDX-License-Identifier: Apache-2.0
"""Everything that checkpoints do to a file system goes through one small class, so that each fault can be tried."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from batiste.checkpoint.errors import LockedError, SaveError
from batiste.graph.optional import need

PARTIAL = ".partial"
_counter = itertools.count()
_held: set[str] = set()  # folders that Managers of this process write; record locks do not tell two of them apart
_held_lock = threading.Lock()
_writing: set[Path] = set()  # what this process writes now


class Fs:
    """The operations of a local file system that change something, one method each, and reading."""

    def create(self, path: Path) -> int:
        """A new empty file, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, file: int, data: memoryview) -> int:
        """Writes as much as the system takes, and says how much that was."""
        return os.write(file, data)

    def sync(self, file: int) -> None:
        """Returns when what was written is on the medium."""
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file another name; whoever looks sees the old state or the new one."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        """Removes a folder that is empty."""
        os.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Returns when the names in a folder are on the medium."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def lock(self, path: Path) -> int:
        """An open file that nobody else has locked; the system lets go of it when the process ends, however it does."""
        fcntl = need("fcntl", extra="checkpoint")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            held = error.errno in (errno.EAGAIN, errno.EACCES)
            raise (BlockingIOError(errno.EAGAIN, "somebody holds the lock") if held else error) from error
        return file

    def open(self, path: Path) -> int:
        """A file, open for reading."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self, file: int) -> int:
        return os.fstat(file).st_size

    def read(self, file: int, into: memoryview, offset: int) -> int:
        """Reads at an offset as much as the system gives, and says how much that was."""
        return os.preadv(file, [into], offset)

    def names(self, path: Path) -> list[str]:
        """The names in a folder, in order."""
        return sorted(os.listdir(path))


@contextlib.contextmanager
def typed(path: Path, doing: str) -> Iterator[None]:
    """Errors of the operating system as one of ours that says what was done, where, and why it failed."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"Could not {doing}: {error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})",
            at=str(path),
            fix=_fix(error.errno),
        ) from error


def _fix(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or save elsewhere; earlier checkpoints are as they were"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "save to a folder that this user may write"
    if code in (errno.EMFILE, errno.ENFILE):
        return "close files, or raise the limit with `ulimit -n`; earlier checkpoints are as they were"
    if code in (errno.ENOENT, errno.ENOTDIR):
        return "save to a path whose folder can be made"
    return "look at the disk; earlier checkpoints are as they were"


def make_folders(fs: Fs, path: Path) -> None:
    """Makes a folder and those above it, each on the medium before the next."""
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            with contextlib.suppress(FileExistsError):  # another program was quicker
                fs.make_folder(folder)
            fs.sync_folder(folder.parent)


def write_all(fs: Fs, file: int, data: memoryview) -> None:
    while data:
        data = data[fs.write(file, data) :]


def write_sealed(fs: Fs, path: Path, write: Callable[[int], object]) -> None:
    """Writes a file so that at every moment `path` is the old file or the whole new one, also after a power loss.

    The content goes to a file beside it and to the medium; that takes the name; then the folder goes to the medium.

    Args:
        write: puts the content into an open file.

    Raises:
        SaveError: the operating system refused something; the old file is as it was.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}{PARTIAL}")
    with typed(path, "write"):
        make_folders(fs, path.parent)
        remove_partial(fs, path.parent, of=path.name)
        _writing.add(partial)
        try:
            file = fs.create(partial)
            try:
                write(file)
                fs.sync(file)
            finally:
                fs.close(file)
            fs.rename(partial, path)
        except Exception:
            with contextlib.suppress(OSError):
                fs.remove(partial)
            raise
        finally:
            _writing.discard(partial)
        fs.sync_folder(path.parent)


def remove_partial(fs: Fs, folder: Path, of: str | None = None) -> None:
    """Removes what writers left behind that are no more; of one file, or (with the folder locked) of all."""
    for name in fs.names(folder):
        if not (name.startswith(f".{of}." if of else ".") and name.endswith(PARTIAL)):
            continue
        pid = name.removesuffix(PARTIAL).rpartition(".")[2].partition("-")[0]
        if of is None or not _is_written(folder / name, pid):
            with contextlib.suppress(FileNotFoundError):
                fs.remove(folder / name)


def _is_written(partial: Path, pid: str) -> bool:
    """Whether the process that began a file may still be at it."""
    return partial in _writing if pid == str(os.getpid()) else is_alive(pid)


def is_alive(pid: str) -> bool:
    """Whether a process of this number runs."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    return True


class FolderLock:
    """One writer per folder. A lock whose process is dead is no lock: the system gave it back.

    Raises:
        LockedError: another program, or another Manager of this one, holds it.
    """

    def __init__(self, fs: Fs, folder: Path):
        self._fs, self._file, self._key = fs, -1, os.path.realpath(folder)
        with _held_lock:
            if self._key in _held:
                raise self._refusal(folder, "another Manager of this program")
            try:
                with typed(folder, "lock the folder"):
                    self._file = fs.lock(folder / ".lock")
            except SaveError as error:
                if isinstance(error.__cause__, BlockingIOError):
                    raise self._refusal(folder, "another program") from error
                raise
            _held.add(self._key)

    @staticmethod
    def _refusal(folder: Path, who: str) -> LockedError:
        return LockedError(
            f"The folder is being written by {who}", at=str(folder), fix="close that one first, or use another folder"
        )

    def release(self) -> None:
        with _held_lock:
            if self._file >= 0:
                with contextlib.suppress(OSError):  # closed it is nevertheless, and what was saved is safe
                    self._fs.close(self._file)
                self._file = -1
                _held.discard(self._key)
