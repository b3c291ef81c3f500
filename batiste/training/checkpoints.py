# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a functional training loop, by step: directories of Orbax, or files of msgpack.

The flag `flax_use_orbax_checkpointing` says which are written; both are read. A checkpoint is written under another
name first, so that one that was cut short is never taken for whole.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from batiste import io
from batiste.core.frozen_dict import FrozenDict
from batiste.errors import InvalidCheckpointError, MPACheckpointingRequiredError
from batiste.graph.config import config
from batiste.graph.errors import ArgumentError
from batiste.graph.fitting import changes_are_meant
from batiste.serialization import from_state_dict, msgpack_restore, to_bytes, to_state_dict
from batiste.training import orbax_utils

__all__ = [
    "AsyncManager",
    "available_steps",
    "config",
    "convert_pre_linen",
    "latest_checkpoint",
    "natural_sort",
    "restore_checkpoint",
    "safe_normpath",
    "save_checkpoint",
    "save_checkpoint_multiprocess",
]

NUMBER = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)")
SIGNED_NUMBER = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)")
SCHEME = re.compile(r"^(?P<scheme>[a-z][a-z0-9.+-]+://)?(?P<path>.*)", re.IGNORECASE)
MODULE_NUMBER = re.compile(r"(.*)_\d+$")
UNFINISHED = "tmp"
Step = int | float

# ---------------------------------------------------------------- names


def natural_sort(file_list: Iterable[str], signed: bool = True) -> list[str]:
    """Names in the order of the numbers in them.

    >>> natural_sort(["step_10", "step_9", "step_-1", "step_1e3"])
    ['step_-1', 'step_9', 'step_10', 'step_1e3']
    """
    number = SIGNED_NUMBER if signed else NUMBER

    def parts(name: str) -> list[Any]:
        return [float(part) if number.fullmatch(part) else part for part in number.split(name)]

    return sorted(file_list, key=parts)


def safe_normpath(path: str) -> str:
    """A path without `.`, `..` and double slashes; `scheme://` in front of it stays.

    >>> safe_normpath("gs://bucket//a/../b")
    'gs://bucket/b'
    """
    found = SCHEME.match(path)
    assert found is not None
    return (found["scheme"] or "") + os.path.normpath(found["path"])


def _base(ckpt_dir: Any, prefix: str) -> str:
    return safe_normpath(os.path.join(os.path.abspath(ckpt_dir) if "://" not in str(ckpt_dir) else ckpt_dir, prefix))


def _step_of(path: str, base: str) -> float:
    return float(path[len(base) :])


def _all_checkpoints(base: str) -> list[str]:
    """The finished checkpoints, by step."""
    folder, prefix = os.path.split(base)
    if not io.isdir(folder):
        return []
    names = (name for name in io.listdir(folder) if SIGNED_NUMBER.fullmatch(name.removeprefix(prefix)))
    return natural_sort(os.path.join(folder, name) for name in names if name.startswith(prefix))


def latest_checkpoint(ckpt_dir: str | os.PathLike, prefix: str = "checkpoint_") -> str | None:
    """The path of the checkpoint with the largest step, if there is one."""
    return next(reversed(_all_checkpoints(_base(ckpt_dir, prefix))), None)


def available_steps(
    ckpt_dir: str | os.PathLike, prefix: str = "checkpoint_", step_type: type = int
) -> list[int | float]:
    """The steps of the checkpoints, in order."""
    base = _base(ckpt_dir, prefix)
    return [step_type(path[len(base) :]) for path in _all_checkpoints(base)]


# ---------------------------------------------------------------- saving


class AsyncManager:
    """Saves on a thread, one checkpoint after the other, while training goes on."""

    def __init__(self, max_workers: int = 1):
        self.executor = ThreadPoolExecutor(max_workers=max_workers)
        self.save_future: Future | None = None

    def wait_previous_save(self) -> None:
        """Returns when nothing is being saved; raises what went wrong."""
        if self.save_future is not None:
            self.save_future.result()

    def save_async(self, task: Callable[[], Any]) -> None:
        """Runs `task` on the thread, after the one before."""
        self.wait_previous_save()
        self.save_future = self.executor.submit(task)


def save_checkpoint(
    ckpt_dir: str | os.PathLike,
    target: Any,
    step: Step,
    prefix: str = "checkpoint_",
    keep: int = 1,
    overwrite: bool = False,
    keep_every_n_steps: int | None = None,
    async_manager: AsyncManager | None = None,
    orbax_checkpointer: Any = None,
) -> str:
    """Writes the values of `target`, removes old checkpoints, and returns the path of the new one.

    Args:
        target: a pytree, or anything that has a state dict.
        prefix: the checkpoint is called `prefix` and the step.
        keep: how many of the latest checkpoints stay.
        overwrite: checkpoints of this and later steps may be there; they are removed.
        keep_every_n_steps: of the older checkpoints, those stay that are at least so many steps apart.
        async_manager: saves on its thread; this function returns at once.
        orbax_checkpointer: saves in place of a `PyTreeCheckpointer` made here.

    Raises:
        InvalidCheckpointError: there is a checkpoint of this or a later step (msgpack), and `overwrite` is false.
        ValueError: there is a checkpoint of this step (Orbax), and `overwrite` is false.
    """
    base = _base(ckpt_dir, prefix)
    path = f"{base}{step}"
    by_orbax = orbax_checkpointer is not None or config.flax_use_orbax_checkpointing
    if by_orbax and jax.tree.all(jax.tree.map(lambda leaf: leaf is target, target)):
        raise ArgumentError(
            "Orbax backend only accept pytree as save target", fix="put the value into a dict, or save with numpy"
        )
    if not by_orbax and not overwrite and any(_step_of(old, base) >= step for old in _all_checkpoints(base)):
        raise InvalidCheckpointError(path, step)
    if not by_orbax and not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(target)):
        raise MPACheckpointingRequiredError(path, step)
    io.makedirs(os.path.dirname(path))
    state = to_state_dict(target)
    if not by_orbax:
        encoded = to_bytes(jax.tree.map(jax.device_get, state))

    def save() -> None:
        if by_orbax:
            checkpointer = orbax_checkpointer or orbax_utils.orbax().PyTreeCheckpointer()
            checkpointer.save(path, state, save_args=orbax_utils.save_args_from_target(state), force=overwrite)
        else:
            _write(path, base, encoded)
        if jax.process_index() == 0:
            _remove_old(base, step, keep, overwrite, keep_every_n_steps)

    if async_manager is None:
        save()
    else:
        async_manager.save_async(save)
    return path


def save_checkpoint_multiprocess(
    ckpt_dir: str | os.PathLike,
    target: Any,
    step: Step,
    prefix: str = "checkpoint_",
    keep: int = 1,
    overwrite: bool = False,
    keep_every_n_steps: int | None = None,
    async_manager: AsyncManager | None = None,
    gda_manager: Any = None,
    orbax_checkpointer: Any = None,
) -> str:
    """`save_checkpoint`, called by every process; arrays that span processes are written by Orbax.

    Args:
        gda_manager: taken for the sake of older programs; Orbax needs none.
    """
    return save_checkpoint(
        ckpt_dir, target, step, prefix, keep, overwrite, keep_every_n_steps, async_manager, orbax_checkpointer
    )


def _write(path: str, base: str, encoded: bytes) -> None:
    if jax.process_index() != 0:
        return
    with io.GFile(base + UNFINISHED, "wb") as file:
        file.write(encoded)
    if io.isdir(path):
        io.rmtree(path)
    io.rename(base + UNFINISHED, path, overwrite=True)


def _remove_old(base: str, step: Step, keep: int, overwrite: bool, keep_every_n_steps: int | None) -> None:
    paths = _all_checkpoints(base)
    if overwrite:
        for path in [path for path in paths if _step_of(path, base) > step]:
            _remove(path)
            paths.remove(path)
    kept = float("-inf")
    for path in paths[:-keep]:
        if keep_every_n_steps and _step_of(path, base) - kept >= keep_every_n_steps:
            kept = _step_of(path, base)
        else:
            _remove(path)


def _remove(path: str) -> None:
    (io.rmtree if io.isdir(path) else io.remove)(path)


# ---------------------------------------------------------------- restoring


def restore_checkpoint(
    ckpt_dir: str | os.PathLike,
    target: Any,
    step: Step | None = None,
    prefix: str = "checkpoint_",
    parallel: bool = True,
    gda_manager: Any = None,
    allow_partial_mpa_restoration: bool = False,
    orbax_checkpointer: Any = None,
    orbax_transforms: dict | None = None,
) -> Any:
    """A value like `target` with the values of a checkpoint; with `target=None`, its state dict.

    Without a checkpoint, `target` is returned. Files that Flax wrote are read as well.

    Args:
        ckpt_dir: the directory of the checkpoints, or the path of one.
        step: which; the latest unless given.
        parallel, gda_manager, allow_partial_mpa_restoration: taken for the sake of older programs.
        orbax_checkpointer: restores in place of a `PyTreeCheckpointer` made here.
        orbax_transforms: how the names in the checkpoint become those in `target`.

    Raises:
        ValueError: there is no checkpoint of `step`, or its structure is another than that of `target`.
    """
    path = _which(ckpt_dir, step, prefix)
    if path is None:
        return target
    if not io.isdir(path):
        with io.GFile(path, "rb") as file:
            state = msgpack_restore(file.read())
    else:
        checkpointer = orbax_checkpointer or orbax_utils.orbax().PyTreeCheckpointer()
        state = _restored_by_orbax(checkpointer, path, target, orbax_transforms)
    if target is None:
        return state
    with changes_are_meant():  # a target of other shapes takes those of the file, as in Flax
        return from_state_dict(target, state)


def _restored_by_orbax(checkpointer: Any, path: str, target: Any, transforms: Any) -> Any:
    if target is None:
        return checkpointer.restore(path)
    like = to_state_dict(target)
    return checkpointer.restore(
        path,
        item=like,
        restore_args=jax.tree.map(_as_saved, orbax_utils.restore_args_from_target(like)),
        transforms=orbax_utils.maybe_construct_transformations(like, transforms),
    )


def _as_saved(args: Any) -> Any:
    """The dtype and kind of number that was saved, not those of the target: no value is rounded in silence."""
    kind = args.restore_type if args.restore_type in (np.ndarray, jax.Array) else None
    return dataclasses.replace(args, dtype=None, restore_type=kind)


def _is_checkpoint(path: str) -> bool:
    """Whether this is one checkpoint, and not a directory of them."""
    marks = ("_METADATA", "manifest.ocdbt", "checkpoint")
    return any(io.exists(os.path.join(path, mark)) for mark in marks) if io.isdir(path) else io.exists(path)


def _which(ckpt_dir: Any, step: Step | None, prefix: str) -> str | None:
    if step is None:
        given = _base(ckpt_dir, "")
        return given if _is_checkpoint(given) else latest_checkpoint(ckpt_dir, prefix)
    path = f"{_base(ckpt_dir, prefix)}{step}"
    if not io.exists(path):
        raise ArgumentError(f"Matching checkpoint not found: {path}")
    return path


def convert_pre_linen(params: Any) -> Any:
    """Parameters with modules counted per class (`Dense_0`, `Conv_0`), where once all were counted together.

    >>> convert_pre_linen({"Dense_0": 1, "Conv_1": 2, "Dense_2": 3})
    {'Conv_0': 2, 'Dense_0': 1, 'Dense_1': 3}
    """
    if not isinstance(params, dict | FrozenDict):
        return params
    counts: dict[str, int] = {}
    renamed = {}
    for name in natural_sort(params):
        value = convert_pre_linen(params[name])
        found = MODULE_NUMBER.match(name)
        if found:
            kind = found[1]
            name, counts[kind] = f"{kind}_{counts.get(kind, 0)}", counts.get(kind, 0) + 1
        renamed[name] = value
    return FrozenDict(renamed) if isinstance(params, FrozenDict) else renamed
