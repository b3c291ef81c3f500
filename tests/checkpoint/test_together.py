# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several processes, which are threads here: all is saved, or nothing; what is damaged is found."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from batiste import checkpoint
from batiste.checkpoint import CorruptError, SaveError, together
from batiste.checkpoint.files import Fs
from batiste.checkpoint.sealed import Sealed, Written

N = 3
ABOUT = {"step": 7, "healthy": None, "metrics": {}}
WHOLE = np.arange(12, dtype=np.float32).reshape(6, 2)


class Full(Fs):
    """A disk without room."""

    def write(self, file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs a function of a process's number in N threads; what each returned, or its error."""
    here, words, meeting = threading.local(), [""] * N, threading.Barrier(N)

    def exchange(name: str, word: str) -> list[str]:
        words[here.index] = f"{name}\0{word}"
        meeting.wait(10)
        heard = [each.split("\0") for each in words]
        meeting.wait(10)
        assert {each[0] for each in heard} == {name}, "all are at one place"
        return [each[1] for each in heard]

    monkeypatch.setattr(together, "exchange", exchange)
    monkeypatch.setattr(jax, "process_count", lambda: N)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(here, "index", 0))

    def run(work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * N

        def one(index: int) -> None:
            here.index = index
            try:
                results[index] = work(index)
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(N)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results

    return run


def held(index: int, value: np.ndarray = WHOLE) -> list[Written]:
    """Two rows of an array, and of process 0 all that every process has."""
    boxes = (((2 * index, 0), value[2 * index : 2 * index + 2]),)
    own = [Written("n", scalar=3), Written("b", np.dtype("int8"), (2,), (((0,), np.ones(2, np.int8)),))]
    empty = [Written("n", scalar=3), Written("b", np.dtype("int8"), (2,))]
    return [Written("w", value.dtype, value.shape, boxes), *(empty if index else own)]


def saved(path: Path, processes: Callable[..., list[Any]], value: np.ndarray = WHOLE, full: int = -1) -> list[Any]:
    fs = {full: Full()}
    return processes(lambda i: together.write(fs.get(i, Fs()), path, lambda: held(i, value), dict(ABOUT)))


def test_each_writes_what_it_holds_and_the_whole_is_read(tmp_path: Path, processes: Any) -> None:
    path = tmp_path / "a.ckpt"
    assert saved(path, processes) == [None] * N
    first = sorted(file.name for file in tmp_path.iterdir())
    assert len(first) == N and first[0] == "a.ckpt"
    np.testing.assert_array_equal(checkpoint.load(path)["w"], WHOLE)
    assert checkpoint.load(path)["n"] == 3 and checkpoint.verify(path)["healthy"] is True
    with Sealed(Fs(), path) as found:
        entry = found.entries["w"]
        some = found.read(entry, [(slice(2, 4), slice(None))])
    np.testing.assert_array_equal(some[2:4], WHOLE[2:4])

    bad = WHOLE.copy()
    bad[5, 1] = np.nan
    assert saved(path, processes, bad) == [None] * N
    assert checkpoint.peek(path)["healthy"] is False, "what one process holds is not finite"
    names = sorted(file.name for file in tmp_path.iterdir())
    assert len(names) == N and not {*names[1:]} & {*first[1:]}, "the files of the save before are gone"


@pytest.mark.parametrize("full", [0, 2])
def test_a_disk_that_is_full_in_one_process_fails_the_save_of_all(tmp_path: Path, processes: Any, full: int) -> None:
    path = tmp_path / "a.ckpt"
    saved(path, processes)
    before = sorted(tmp_path.iterdir())
    errors = saved(path, processes, WHOLE + 1, full)
    assert all(isinstance(error, SaveError) and "ENOSPC" in str(error) for error in errors), errors
    assert f"process {full}" in str(errors[1]).lower()
    assert sorted(tmp_path.iterdir()) == before, "nothing new is left"
    np.testing.assert_array_equal(checkpoint.load(path)["w"], WHOLE)


def test_a_part_that_is_missing_damaged_or_of_another_save_is_found(tmp_path: Path, processes: Any) -> None:
    path = tmp_path / "a.ckpt"
    saved(path, processes)
    part = next(tmp_path.glob("a.ckpt.2-*.part"))
    content = part.read_bytes()
    for position in (20, len(content) // 2, len(content) - 3):
        flipped = bytearray(content)
        flipped[position] ^= 1
        part.write_bytes(flipped)
        with pytest.raises(CorruptError, match="damaged"):
            checkpoint.load(path)
    part.unlink()
    with pytest.raises(CorruptError, match=f"the file {part.name} is missing, which another process wrote"):
        checkpoint.load(path)
    saved(tmp_path / "b.ckpt", processes, WHOLE + 1)
    part.write_bytes(next(tmp_path.glob("b.ckpt.2-*.part")).read_bytes())
    with pytest.raises(CorruptError, match="it belongs to another save"):
        checkpoint.load(path)
    with pytest.raises(CorruptError, match="the parts do not make up the array"):
        Sealed(Fs(), next(tmp_path.glob("b.ckpt.2-*.part")))


def test_what_one_process_cannot_read_none_restores(processes: Any) -> None:
    def work(index: int) -> str:
        if index == 1:
            raise CorruptError("a bit is another")
        return "read"

    errors = processes(lambda i: together.together("restore", lambda: work(i), CorruptError))
    assert all(isinstance(error, CorruptError) for error in errors)
    assert str(errors[1]).startswith("a bit is another")
    assert "Process 1 of 3 failed: a bit is another" in str(errors[2])
