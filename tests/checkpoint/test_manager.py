# SPDX-License-Identifier: Apache-2.0
"""Which steps of a run are saved, which are kept, and which is gone back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from batiste import checkpoint
from batiste.graph.errors import ArgumentError

GOOD, BAD = {"w": jnp.ones(3)}, {"w": jnp.array([1, jnp.nan, 1])}


def saved(folder: Path, states: dict[int, Any], metrics: dict[int, float] | None = None, **options: Any) -> list[int]:
    """The steps that a Manager leaves."""
    with checkpoint.Manager(folder, **options) as manager:
        for step, tree in states.items():
            found = {"loss": metrics[step]} if metrics and step in metrics else None
            manager.save(step, tree, metrics=found)
    return manager.steps()


def test_the_newest_the_best_and_the_last_healthy_one_stay(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 3.0, 4: 0.5, 5: 2.0}
    states = {step: BAD if step >= 4 else GOOD for step in range(1, 8)}
    assert saved(tmp_path / "a", states, losses, keep=2, best="loss") == [2, 3, 6, 7]
    assert saved(tmp_path / "b", states, losses, keep=2, best=("loss", "max")) == [1, 3, 6, 7]
    assert saved(tmp_path / "c", states, keep=1) == [3, 7]
    assert saved(tmp_path / "d", states, keep=None) == list(states)
    assert saved(tmp_path / "e", states, dict.fromkeys(states, float("nan")), keep=1, best="loss") == [7]


def test_the_last_healthy_step_is_gone_back_to_when_asked(tmp_path: Path) -> None:
    saved(tmp_path, {1: GOOD, 2: BAD, 3: BAD}, keep=1)
    manager = checkpoint.Manager(tmp_path)
    restored = manager.restore_latest(GOOD)
    assert restored is not None and restored.step == 3
    with pytest.warns(checkpoint.CheckpointWarning, match=r"Went back to step 1 .*\n  step 3: it is not healthy"):
        restored = manager.restore_latest(GOOD, healthy=True)
    assert restored is not None and restored.step == manager.last_healthy() == 1


def test_only_multiples_of_every_are_saved_or_what_is_forced(tmp_path: Path) -> None:
    with checkpoint.Manager(tmp_path, keep=None, every=10) as manager:
        assert [manager.save(step, GOOD) for step in (0, 5, 10)] == [True, False, True]
        assert manager.save(13, GOOD, force=True, wait=True)
        assert manager.steps() == [0, 10, 13]


def test_a_step_that_is_saved_again_is_the_new_one(tmp_path: Path) -> None:
    with checkpoint.Manager(tmp_path, keep=1, best="loss") as manager:
        manager.save(1, BAD, metrics={"loss": 1.0}, wait=True)
        assert manager.last_healthy() is None
        manager.save(1, GOOD, metrics={"loss": 2.0}, wait=True)
        assert manager.last_healthy() == manager.best() == 1


def test_an_empty_folder_a_missing_step_a_swapped_file_and_senseless_arguments(tmp_path: Path) -> None:
    manager = checkpoint.Manager(tmp_path / "none")
    assert manager.restore_latest(GOOD) is None
    assert not (tmp_path / "none").exists(), "reading makes nothing"
    saved(tmp_path, {2: GOOD, 3: GOOD})
    with pytest.raises(checkpoint.NotFoundError, match=r"no such step at .*: got 4, expected .2, 3."):
        checkpoint.Manager(tmp_path).restore(4)
    manager = checkpoint.Manager(tmp_path)
    manager.path(2).replace(manager.path(3))
    with pytest.raises(checkpoint.CorruptError, match=r"holds another step at .*: got 2, expected 3"):
        manager.restore(3)
    for options in ({"keep": 0}, {"every": 0}, {"best": ("loss", "least")}):
        with pytest.raises(ArgumentError):
            checkpoint.Manager(tmp_path, **options)


def test_a_model_that_does_not_fit_is_no_reason_to_go_back(tmp_path: Path) -> None:
    saved(tmp_path, {1: {"w": jnp.ones(4)}, 2: GOOD})
    with pytest.raises(checkpoint.MismatchError, match=r"float32\[3\] +float32\[4\]"):
        checkpoint.Manager(tmp_path).restore_latest({"w": jnp.ones(4)})
