# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a save, what was acknowledged is there afterwards; whatever happens to a file, it is noticed.

The faults of the operations are all tried, one by one; the short tier draws fewer random ones than the long tier
(`make faults`).
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste import checkpoint
from batiste.checkpoint.files import Fs
from tests.faults.disks import ERRORS, Counted, Crash, Crashing, Forgetful, Refusing

LONG = os.environ.get("BATISTE_FAULTS") == "long"
ROOT = Path(__file__).parents[2]
Ack = Callable[[int], None]


def state(value: int, spread: bool = False) -> dict[str, Any]:
    x = jnp.full((8, 4), value, jnp.float32)
    if spread:
        x = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d")))
    return {"w": x, "n": value}


def held(tree: Any) -> int:
    """The value of a state that is whole."""
    assert (np.asarray(tree["w"]) == tree["n"]).all()
    return tree["n"]


# ---------------------------------------------------------------- what is done while something goes wrong


def saves(fs: Fs, folder: Path, ack: Ack) -> None:
    for value in (1, 2):
        checkpoint.save(folder / "new" / "x.ckpt", state(value), fs=fs)
        ack(value)


def background_saves(fs: Fs, folder: Path, ack: Ack) -> None:
    for value in (1, 2):
        checkpoint.save_async(folder / "x.ckpt", state(value), fs=fs).wait()
        ack(value)


def spread_saves(fs: Fs, folder: Path, ack: Ack) -> None:
    for value in (1, 2):
        checkpoint.save(folder / "x.ckpt", state(value, spread=True), fs=fs)
        ack(value)


def managed_saves(fs: Fs, folder: Path, ack: Ack) -> None:
    with checkpoint.Manager(folder / "run", keep=1, fs=fs) as manager:
        for value in (1, 2, 3):
            manager.save(value, state(value), wait=True)
            ack(value)


PROGRAMS = (saves, background_saves, spread_saves, managed_saves)


def found(folder: Path) -> int:
    """The newest value that a program which starts now finds; 0 if there is none."""
    if (folder / "run").is_dir():
        restored = checkpoint.Manager(folder / "run").restore_latest(state(0))
        return held(restored.state) if restored else 0
    for path in (folder / "x.ckpt", folder / "new" / "x.ckpt"):
        if path.exists():
            return held(checkpoint.load(path, into=state(0)))
    return 0


def left_behind(folder: Path) -> list[str]:
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt" and path.name != ".lock"
    ]


def operations(program: Any, folder: Path) -> list[str]:
    fs = Counted()
    folder.mkdir()
    program(fs, folder, lambda value: None)
    fs.bury()
    return fs.kinds


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_crash_at_any_operation_loses_nothing_that_was_acknowledged(program: Any, tmp_path: Path) -> None:
    kinds = operations(program, tmp_path / "count")
    assert {"create", "write", "sync", "rename", "sync_folder"} <= set(kinds)
    for at in range(len(kinds)):
        for late in (False, True):
            folder = tmp_path / f"{at}-{late}"
            folder.mkdir()
            acks = [0]
            fs = Crashing(at, late)
            with pytest.raises(Crash):
                program(fs, folder, acks.append)
            fs.bury()
            checkpoint.saving._unheard.clear()  # the process that would have heard is no more
            assert acks[-1] <= found(folder) <= acks[-1] + 1, f"{kinds[at]} ({at}), late={late}"
            program(Fs(), folder, acks.append)
            assert found(folder) == acks[-1]
            assert not left_behind(folder)


@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_error_of_any_operation_is_one_typed_error_and_loses_nothing(
    program: Any, code: int, tmp_path: Path
) -> None:
    kinds = operations(program, tmp_path / "count")
    for at in range(len(kinds)):
        for for_good in (False, True):
            folder = tmp_path / f"{at}-{for_good}"
            folder.mkdir()
            acks = [0]
            fs = Refusing(at, code, for_good)
            heard: checkpoint.SaveError | None = None
            try:
                program(fs, folder, acks.append)
            except checkpoint.SaveError as error:
                heard = error
            if heard is None:
                assert kinds[at] == "close", "only giving a lock free may fail unheard"
            else:
                assert all(word in str(heard) for word in (os.strerror(code), errno.errorcode[code], str(folder)))
                assert isinstance(heard.__cause__, OSError)
            fs.bury()
            assert acks[-1] <= found(folder) <= acks[-1] + 1, f"{kinds[at]} ({at})"
            assert for_good or not left_behind(folder)
            program(Fs(), folder, acks.append)
            assert found(folder) == acks[-1]
            assert not left_behind(folder)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_power_loss_at_any_moment_leaves_what_was_acknowledged(program: Any, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    fs = Forgetful(folder)
    program(fs, folder, fs.acknowledged)
    fs.bury()
    tried = 0
    for upto, after in fs.disks_after_power_loss(tmp_path):
        acked = max([args[0] for kind, *args in fs.journal[:upto] if kind == "ack"], default=0)
        if upto and fs.journal[upto - 1][0] == "ack" and program is not managed_saves:
            assert fs.unsynced(upto) == []
        assert acked <= found(after) <= acked + 1
        tried += 1
    assert tried > 100


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """/dev/full takes no byte: the system's own error comes through."""

    class Full(Fs):
        def create(self, path: Path) -> int:
            super().close(super().create(path))
            return os.open("/dev/full", os.O_WRONLY)

    checkpoint.save(tmp_path / "x.ckpt", state(1))
    with pytest.raises(checkpoint.SaveError, match=r"No space left on device .ENOSPC.*\n  Fix: free some space"):
        checkpoint.save(tmp_path / "x.ckpt", state(2), fs=Full())
    assert found(tmp_path) == 1
    assert not left_behind(tmp_path)


# ---------------------------------------------------------------- damaged files


def damage(content: bytes, other: bytes, rng: random.Random) -> bytes | None:
    """A file that is not what it was; None is one that is gone."""
    size, at = len(content), rng.randrange(len(content))
    length = min(rng.choice((1, 2, 16, 100, 1000)), size - at)
    kind = rng.choice(("flip", "flip", "flip", "truncate", "zeros", "insert", "swap", "remove", "delete", "other"))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == "truncate":
        return content[:at]
    if kind == "zeros":
        return content[:at] + bytes(length) + content[at + length :]
    if kind == "insert":
        return content[:at] + rng.randbytes(length) + content[at:]
    if kind == "swap":
        to = rng.randrange(at + length, size + 1) if at + length < size else at
        return (
            content[:at]
            + content[to : to + length]
            + content[at + length : to]
            + content[at : at + length]
            + content[to + length :]
        )
    if kind == "remove":
        return content[:at] + content[at + length :]
    return None if kind == "delete" else rng.choice((other, other[:at] + content[at:], content[:at] + other[at:]))


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "sharded"])
def test_every_damage_is_noticed_and_the_newest_whole_step_is_taken(spread: bool, tmp_path: Path) -> None:
    manager = checkpoint.Manager(tmp_path / "run", keep=None)
    rng = random.Random(7 + spread)
    for step in (1, 2):
        noise = np.random.default_rng(step)
        tree = state(step, spread) | {
            "deep": {"noise": noise.standard_normal(500).astype("f4")},
            "key": jax.random.key(step),
        }
        manager.save(step, tree, wait=True)
    manager.close()
    path = manager.path(2)
    whole, other = path.read_bytes(), manager.path(1).read_bytes()
    target = state(0) | {"deep": {"noise": np.zeros(500, "f4")}, "key": jax.random.key(0)}
    count = tried = 5000 if LONG else 250
    named = 0
    while count:
        bad = damage(whole, other, rng)
        if bad == whole:
            continue
        count -= 1
        path.unlink(missing_ok=True)
        if bad is None:
            restored = checkpoint.Manager(tmp_path / "run").restore_latest(target)
            assert restored is not None and held(restored.state) == 1
            continue
        path.write_bytes(bad)
        if bad == other:  # a sound file under a wrong name
            checkpoint.verify(path)
        else:
            with pytest.raises(checkpoint.CorruptError, match="damaged") as caught:
                checkpoint.load(path, into=target)
            assert str(path) in str(caught.value)
            named += "The entry '" in str(caught.value)
        with pytest.warns(checkpoint.CheckpointWarning, match="Went back to step 1 .*\n  step 2: "):
            restored = checkpoint.Manager(tmp_path / "run").restore_latest(target)
        assert restored is not None and restored.step == held(restored.state) == 1
        assert list(restored.skipped) == [2]
    assert named > tried / 8, "damage within an array names it"
    manager.path(1).write_bytes(other[:-1])
    path.write_bytes(whole[:-1])
    with pytest.raises(checkpoint.CorruptError, match=r"No step can be restored:\n  step 2: .*\n.*\n  step 1: "):
        checkpoint.Manager(tmp_path / "run").restore_latest(target)


# ---------------------------------------------------------------- two writers, readers, and the ends of programs


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path: Path) -> None:
    first = checkpoint.Manager(tmp_path, keep=2)
    first.save(1, state(1), wait=True)
    second = checkpoint.Manager(tmp_path)
    with pytest.raises(checkpoint.LockedError, match="written by another Manager of this program"):
        second.save(2, state(2))
    for step in range(2, 100 if LONG else 30):
        first.save(step, state(step))
        for _ in range(10 if LONG else 2):
            restored = second.restore_latest(state(0))
            assert restored is not None
            assert held(restored.state) == restored.step in (step - 1, step)
    first.close()
    assert second.save(1000, state(1000), wait=True)
    second.close()


PROGRAM = """
import os, sys, warnings
import jax.numpy as jnp
from batiste import checkpoint
folder, end = sys.argv[1:]
manager = checkpoint.Manager(folder, keep=None)
state = lambda value: {"w": jnp.full((8, 4), value, jnp.float32), "n": value}
if end == "hold":
    manager.save(1, state(1), wait=True)
    print("held", flush=True)
    sys.stdin.read()
try:
    manager.save(5, state(5) if end != "large" else {"w": jnp.ones((3000, 1000)), "n": 5})
except checkpoint.LockedError as error:
    print("locked", error)
    sys.exit(3)
if end == "exit": sys.exit(0)
if end == "status": sys.exit(7)
if end == "raise": raise KeyError("of the program")
if end == "full":
    class Full(checkpoint.Fs):
        def write(self, file, data): raise OSError(28, "No space left on device")
    checkpoint.save_async(folder + "/other.ckpt", state(1), fs=Full())
"""


def program(folder: Path, end: str, **more: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=env)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), end], **pipes, **more)


ENDS = {"fall off": 0, "exit": 0, "status": 7, "raise": 1, "large": 0, "full": 1}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_without_waiting_has_saved_or_says_that_it_has_not(end: str, tmp_path: Path) -> None:
    for number in range(10 if LONG else 1):
        ended = program(tmp_path / str(number), end)
        out, err = ended.communicate(timeout=120)
        assert ended.returncode == ENDS[end], out + err
        restored = checkpoint.Manager(tmp_path / str(number)).restore_latest()
        assert restored is not None and restored.step == 5
        assert ("NOT saved: Could not write" in err and "ENOSPC" in err) == (end == "full")


def test_two_programs_one_folder_and_a_lock_whose_holder_was_killed(tmp_path: Path) -> None:
    holder = program(tmp_path, "hold")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    refused = program(tmp_path, "exit")
    out, _ = refused.communicate(timeout=120)
    assert refused.returncode == 3
    assert "locked The folder is being written by another program" in out
    holder.kill()
    holder.communicate()
    (tmp_path / f".0000000009.ckpt.{holder.pid}-0.partial").write_bytes(b"half")
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(6, state(6), wait=True)
        assert manager.steps() == [1, 6]
    assert not left_behind(tmp_path)


def test_an_error_in_the_background_comes_out_of_the_next_save(tmp_path: Path) -> None:
    manager = checkpoint.Manager(tmp_path, fs=Refusing(6, errno.ENOSPC, for_good=True))
    manager.save(1, state(1))
    with pytest.raises(checkpoint.SaveError, match="No space left"):
        manager.save(2, state(2))
    manager._fs = Fs()
    manager.save(3, state(3), wait=True)
    assert manager.steps() == [3]
    manager.close()
    checkpoint.save_async(tmp_path / "x", state(1), fs=Refusing(2, errno.EIO, for_good=True))._thread.join()
    with pytest.raises(checkpoint.SaveError, match="Input/output error"):
        checkpoint.save(tmp_path / "y", state(1))
    with warnings.catch_warnings():
        checkpoint.save(tmp_path / "y", state(1))
