# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of programs of several processes: each writes what it holds, the first one seals the whole.

    0000000002.ckpt                 of process 0, written last: it names the others' files and their digests
    0000000002.ckpt.1-6e0c31.part   of process 1

All processes must see one folder. A save is acknowledged to all of them or to none; one that was cut off leaves at most
files that no checkpoint names.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax

from batiste.checkpoint import sealed
from batiste.checkpoint.errors import CheckpointError, SaveError
from batiste.checkpoint.files import Fs, write_sealed
from batiste.checkpoint.sealed import Written, beside
from batiste.distributed import exchange

T = TypeVar("T")


def together(name: str, work: Callable[[], T], error: type[CheckpointError]) -> T:
    """What `work` returns, where every process comes to its end of it; else its own error, or one of type `error`.

    >>> together("lunch", lambda: 3, SaveError)
    3
    """
    if jax.process_count() == 1:
        return work()
    result, failed = None, None
    try:
        result = work()
    except Exception as found:
        failed = found
    words = exchange(name, "" if failed is None else str(failed) or type(failed).__name__)
    if failed is not None:
        raise failed
    for process, word in enumerate(words):
        if word:
            raise error(f"Process {process} of {len(words)} failed: {word}", at=name)
    return result  # pyright: ignore[reportReturnType]


def write(fs: Fs, path: Path, leaves: Callable[[], Iterable[Written]], about: dict[str, Any]) -> None:
    """Writes a checkpoint, alone or with the other processes; on return all of it is on the medium.

    Args:
        leaves: everything, of each array the boxes that this process is to write.
        about: what the manifest says; `healthy` is found where it is None.

    Raises:
        SaveError: this process, or another, could not write; an earlier checkpoint at `path` is as it was.
    """
    if jax.process_count() == 1:
        write_sealed(fs, path, lambda file: sealed.write(fs, file, leaves(), lambda finite: _judged(about, finite)))
    elif jax.process_index():
        part = path.with_name(f"{path.name}.{jax.process_index()}-{secrets.token_hex(3)}.part")
        try:
            together(f"save {path}", lambda: _follow(fs, path, part, leaves), SaveError)
        except BaseException:
            with contextlib.suppress(OSError):
                fs.remove(part)
            raise
    else:
        together(f"save {path}", lambda: _lead(fs, path, leaves, about), SaveError)


def _judged(about: dict[str, Any], finite: bool) -> dict[str, Any]:
    return {**about, "healthy": finite} if about.get("healthy") is None else about


def _follow(fs: Fs, path: Path, part: Path, leaves: Callable[[], Iterable[Written]]) -> None:
    word: dict[str, Any] = {"file": part.name}
    try:

        def put(file: int) -> None:
            held = [leaf for leaf in leaves() if leaf.boxes]
            word["digest"] = sealed.write(fs, file, held, lambda finite: word.setdefault("about", {"healthy": finite}))

        write_sealed(fs, part, put)
    except Exception as error:
        exchange(f"parts of {path}", json.dumps({"error": str(error)}))
        raise
    exchange(f"parts of {path}", json.dumps(word))


def _lead(fs: Fs, path: Path, leaves: Callable[[], Iterable[Written]], about: dict[str, Any]) -> None:
    heard: list[dict[str, Any]] = []

    def seal(finite: bool) -> dict[str, Any]:
        heard.append({})  # from here on nobody waits for a word of this process
        heard[1:] = [json.loads(word) for word in exchange(f"parts of {path}", "{}")[1:]]
        for process, word in enumerate(heard):
            if "error" in word:
                raise SaveError("Another process could not write what it holds", at=str(path),
                                got=f"process {process}: {word['error']}")  # fmt: skip
        finite = finite and all(word["about"]["healthy"] for word in heard[1:])
        return {**_judged(about, finite), "files": [[word["file"], word["digest"]] for word in heard[1:]]}

    try:
        write_sealed(fs, path, lambda file: sealed.write(fs, file, leaves(), seal))
    except Exception as error:
        if not heard:
            exchange(f"parts of {path}", json.dumps({"error": str(error)}))
        raise
    remove_beside(fs, path, keep={word["file"] for word in heard[1:]})


def remove_beside(fs: Fs, path: Path, keep: set[str] | frozenset[str] = frozenset()) -> None:
    """Removes the files of other processes that belong to a checkpoint, but for some."""
    for name in fs.names(path.parent):
        if beside(name) == path.name and name not in keep:
            with contextlib.suppress(FileNotFoundError):
                fs.remove(path.with_name(name))
