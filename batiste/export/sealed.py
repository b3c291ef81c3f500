# SPDX-License-Identifier: Apache-2.0
"""A folder that is whole or refused: the digest and size of every file in a manifest, written last, perhaps signed.

    manifest.json    {"format": 1, "files": {name: [sha256, bytes]}}
    manifest.hmac    HMAC-SHA256 of the manifest under a key, in hex

The folder is written under another name and renamed when all of it is on the medium. It is read as bytes, of which
nothing was parsed before its digest was right: a damaged program can bring down the process that parses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import json
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from batiste.checkpoint.errors import SaveError
from batiste.checkpoint.files import Fs, is_alive, make_folders, typed, write_all
from batiste.graph.errors import ArgumentError

from .errors import BundleError

MANIFEST, SIGNATURE = "manifest.json", "manifest.hmac"
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,-]{0,127}")
FILES, MANIFEST_BYTES = 4096, 1 << 20
MAX_BYTES = 16 << 30
PIECE = 16 << 20
UNFINISHED = ".unfinished"
Content = Iterable[Any]  # buffers, one after the other
T = TypeVar("T")
_counter = itertools.count()
_writing: set[Path] = set()  # what this process writes now


# ---------------------------------------------------------------- writing


def write_folder(fs: Fs, path: Path, files: Mapping[str, Content], key: bytes | None, check: Callable[[Path], T]) -> T:
    """Writes the files and their manifest, so that `path` is at every moment absent or whole; what `check` returns.

    Args:
        check: is called with the folder when all of it is on the medium, and before it takes its name.

    Raises:
        SaveError: the path is taken, or the operating system refused something; nothing is left behind.
    """
    path = Path(os.path.abspath(path))
    refuse_taken(path)
    refuse_short(key)
    part = path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}{UNFINISHED}")
    with typed(path, "write the bundle"):
        make_folders(fs, path.parent)
        _remove_unfinished(fs, path)
        _writing.add(part)
        try:
            fs.make_folder(part)
            listed = {name: _write(fs, part / name, content) for name, content in files.items()}
            manifest = json.dumps({"format": FORMAT, "files": listed}, indent=1).encode()
            if key is not None:
                _write(fs, part / SIGNATURE, [signature(manifest, key)])
            _write(fs, part / MANIFEST, [manifest])
            fs.sync_folder(part)
            checked = check(part)
            fs.rename(part, path)
        except Exception:
            with contextlib.suppress(OSError):
                _remove(fs, part)
            raise
        finally:
            _writing.discard(part)
        fs.sync_folder(path.parent)
    return checked


def refuse_taken(path: Path) -> None:
    """Raises SaveError if something has this name: a bundle is never written over."""
    if os.path.lexists(path):
        raise SaveError("There is something already", at=str(path), fix="export to another path, or remove it first")


def _write(fs: Fs, path: Path, content: Content) -> tuple[str, int]:
    """Writes a file to the medium; its digest and size."""
    digest, size = hashlib.sha256(), 0
    file = fs.create(path)
    try:
        for piece in content:
            view = memoryview(piece).cast("B")
            digest.update(view)
            write_all(fs, file, view)
            size += len(view)
        fs.sync(file)
    finally:
        fs.close(file)
    return digest.hexdigest(), size


def _remove_unfinished(fs: Fs, path: Path) -> None:
    """Removes what programs left behind that were ended while they wrote this bundle."""
    for name in fs.names(path.parent):
        ours = name.startswith(f".{path.name}.") and name.endswith(UNFINISHED)
        if ours and not _is_written(path.parent / name):
            _remove(fs, path.parent / name)


def _is_written(part: Path) -> bool:
    """Whether the process that began a folder may still be at it."""
    pid = part.name.removesuffix(UNFINISHED).rpartition(".")[2].partition("-")[0]
    return part in _writing if pid == str(os.getpid()) else is_alive(pid)


def _remove(fs: Fs, folder: Path) -> None:
    for name in fs.names(folder):
        fs.remove(folder / name)
    fs.remove_folder(folder)


def signature(manifest: bytes, key: bytes) -> bytes:
    """What stands in manifest.hmac."""
    return hmac.new(key, b"batiste bundle\0" + manifest, "sha256").hexdigest().encode()


def refuse_short(key: bytes | None) -> None:
    """Raises ArgumentError if a key could be guessed."""
    if key is not None and len(key) < 16:
        raise ArgumentError("The key to sign with is short", got=f"{len(key)} bytes", expected="16 or more",
                            fix="make one with `openssl rand -hex 32`")  # fmt: skip


# ---------------------------------------------------------------- reading


def read_folder(
    path: Path, key: bytes | None, allow_unsigned: bool, max_bytes: int = MAX_BYTES
) -> tuple[str, dict[str, memoryview]]:
    """The digest of the manifest, and the bytes of every file, each as it was written. Nothing of them was parsed.

    Raises:
        BundleError: a file is missing, a link, of another size or digest; or the manifest is not signed with the key.
    """
    refuse_short(key)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"There is no bundle: {error.strerror}", at=str(path), fix="look at the path") from error
    try:
        manifest = bytes(_read(folder, path, MANIFEST, None, MANIFEST_BYTES))
        if key is not None:
            _check_signature(folder, path, manifest, key, allow_unsigned)
        listed = _listed(path, manifest, max_bytes)
        contents = {}
        for name, (digest, size) in listed.items():
            contents[name] = _read(folder, path, name, size, size)
            if hashlib.sha256(contents[name]).hexdigest() != digest:
                raise _damaged(path / name, "its SHA-256 is not that of the manifest")
        return hashlib.sha256(manifest).hexdigest(), contents
    finally:
        os.close(folder)


def _check_signature(folder: int, path: Path, manifest: bytes, key: bytes, allow_unsigned: bool) -> None:
    if allow_unsigned and SIGNATURE not in os.listdir(folder):
        return
    try:
        given = bytes(_read(folder, path, SIGNATURE, None, 64))
    except BundleError as error:
        raise BundleError("The bundle is not signed, and a key was given", at=str(path),
                          fix="export it with the key, or pass allow_unsigned=True") from error  # fmt: skip
    if not hmac.compare_digest(given, signature(manifest, key)):
        raise BundleError("The bundle is not signed with this key", at=str(path),
                          fix="do not use it: somebody else wrote or changed it")  # fmt: skip


def _damaged(path: Path, problem: str) -> BundleError:
    return BundleError(f"The bundle is damaged: {problem}", at=str(path), fix="copy or export it anew")


def _listed(path: Path, manifest: bytes, max_bytes: int) -> dict[str, tuple[str, int]]:
    """The files that a manifest names, with digest and size; names without any path."""
    try:
        parsed: Any = json.loads(manifest)
        files: Any = parsed["files"]
        if type(parsed["format"]) is not int or type(files) is not dict or not 0 < len(files) <= FILES:
            raise ValueError("no list of files")
        if parsed["format"] > FORMAT:
            raise ValueError(f"format {parsed['format']} is of a later release")
        for name, (digest, size) in files.items():
            if not NAME.fullmatch(name) or name in (MANIFEST, SIGNATURE):
                raise ValueError(f"the name {name[:80]!r}")
            if type(digest) is not str or type(size) is not int or size < 0:
                raise ValueError(f"what it says of {name!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path / MANIFEST, f"the manifest is malformed ({error!s:.200})") from None
    total = sum(size for _, size in files.values())
    if total > max_bytes:
        raise BundleError("The bundle is larger than max_bytes", at=str(path), got=f"{total} bytes",
                          expected=f"at most {max_bytes}")  # fmt: skip
    return {name: (digest, size) for name, (digest, size) in files.items()}


def _read(folder: int, path: Path, name: str, size: int | None, most: int) -> memoryview:
    """A plain file of the folder, of this size; links, pipes and devices are refused."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise _damaged(path / name, f"the file cannot be read ({error.strerror})") from error
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise _damaged(path / name, "this is no plain file")
        if about.st_size > most or (size is not None and about.st_size != size):
            raise _damaged(path / name, f"it has {about.st_size} bytes, not {'at most ' if size is None else ''}{most}")
        content = mmap.mmap(-1, max(1, about.st_size))  # pages of its own: JAX takes arrays from there without a copy
        view = memoryview(content)[: about.st_size]
        while view:
            count = os.readv(file, [view[:PIECE]])
            if not count:
                raise _damaged(path / name, "the file ends early")
            view = view[count:]
        return memoryview(content)[: about.st_size]
    except OSError as error:
        raise _damaged(path / name, f"the file cannot be read ({error.strerror})") from error
    finally:
        os.close(file)
