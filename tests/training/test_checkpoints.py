# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by step, in both formats: what is written, kept, overwritten, found and read."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste import struct
from batiste.core.frozen_dict import FrozenDict
from batiste.errors import InvalidCheckpointError
from batiste.graph.config import config
from batiste.training import checkpoints, orbax_utils
from batiste.training.checkpoints import available_steps, latest_checkpoint, restore_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax", "ignore::UserWarning:orbax")


@struct.dataclass
class Point:
    x: Any
    y: Any = 2


TREE = {"a": np.arange(3), "b": {"c": jnp.ones(2)}, "l": [1, 2.5]}


@pytest.fixture
def msgpack():
    with config.temp_flip_flag("use_orbax_checkpointing", False):
        yield


@pytest.mark.parametrize("by_orbax", [False, True])
def test_values_come_back_in_both_formats(tmp_path, by_orbax) -> None:
    with config.temp_flip_flag("use_orbax_checkpointing", by_orbax):
        assert restore_checkpoint(tmp_path, TREE) is TREE
        path = save_checkpoint(tmp_path, TREE, 3)
        assert path == str(tmp_path / "checkpoint_3") and os.path.isdir(path) == by_orbax
        for place in (tmp_path, path):
            like = {"a": np.zeros(3, int), "b": {"c": jnp.zeros(2)}, "l": [0, 0]}
            restored = restore_checkpoint(place, like)
            jax.tree.map(np.testing.assert_array_equal, restored, TREE)
        assert restore_checkpoint(tmp_path, None)["l"] == {"0": 1, "1": 2.5}
        save_checkpoint(tmp_path, Point(jnp.ones(2)), 1, prefix="point_")
        point = restore_checkpoint(tmp_path, Point(jnp.zeros(2), 0), prefix="point_")
        assert isinstance(point, Point) and point.y == 2 and point.x.tolist() == [1, 1]


def test_the_latest_are_kept_and_some_between(tmp_path, msgpack) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, TREE, step, keep=2)
    assert available_steps(tmp_path) == [9, 10]
    for step in range(11, 20):
        save_checkpoint(tmp_path, TREE, step, keep=1, keep_every_n_steps=4)
    assert available_steps(tmp_path) == [9, 13, 17, 19]
    save_checkpoint(tmp_path, TREE, 19.5, keep=2)
    assert available_steps(tmp_path, step_type=float) == [19.0, 19.5]
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_19.5")
    assert latest_checkpoint(tmp_path, prefix="other_") is None and latest_checkpoint(tmp_path / "none") is None


def test_earlier_steps_are_saved_on_request_only(tmp_path, msgpack) -> None:
    for step in (4, 5):
        save_checkpoint(tmp_path, TREE, step, keep=3)
    for step in (4, 5):
        with pytest.raises(InvalidCheckpointError, match="outdated checkpoint at step"):
            save_checkpoint(tmp_path, TREE, step)
    save_checkpoint(tmp_path, {"new": 1}, 4, keep=3, overwrite=True)
    assert available_steps(tmp_path) == [4] and restore_checkpoint(tmp_path, None) == {"new": 1}
    with pytest.raises(ValueError, match="Matching checkpoint not found"):
        restore_checkpoint(tmp_path, None, step=5)


def test_a_save_that_was_cut_short_is_no_checkpoint(tmp_path, msgpack) -> None:
    save_checkpoint(tmp_path, TREE, 1)
    (tmp_path / "checkpoint_tmp").write_bytes(b"half")
    assert available_steps(tmp_path) == [1]
    (tmp_path / "checkpoint_2").write_bytes((tmp_path / "checkpoint_1").read_bytes()[:-3])
    with pytest.raises(ValueError, match="Unpack failed: incomplete input"):
        restore_checkpoint(tmp_path, TREE)


def test_saving_on_a_thread(tmp_path, msgpack) -> None:
    manager = checkpoints.AsyncManager()
    for step in (1, 2):
        checkpoints.save_checkpoint_multiprocess(tmp_path, TREE, step, async_manager=manager)
    manager.wait_previous_save()
    assert available_steps(tmp_path) == [2]
    manager.save_async(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        manager.wait_previous_save()


def test_orbax_overwrites_on_request_and_takes_what_is_lacking_from_the_target(tmp_path) -> None:
    save_checkpoint(tmp_path, {"a": np.arange(3)}, 1)
    with pytest.raises(ValueError, match="already exists"):
        save_checkpoint(tmp_path, {"a": np.arange(3)}, 1)
    save_checkpoint(tmp_path, {"a": np.arange(4)}, 1, overwrite=True)
    restored = restore_checkpoint(tmp_path, {"a": np.zeros(4), "new": 5})
    assert restored["a"].tolist() == [0, 1, 2, 3] and restored["new"] == 5
    with pytest.raises(ValueError, match="Orbax backend only accept pytree"):
        save_checkpoint(tmp_path, 3, 1)


def test_sharded_arrays_come_back_as_the_target_is_sharded(tmp_path) -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    sharded = jax.device_put(jnp.arange(8.0), sharding)
    assert orbax_utils.is_multi_device_array(sharded) and not orbax_utils.is_multi_device_array(jnp.ones(2))
    save_checkpoint(tmp_path, {"w": jnp.arange(8.0)}, 1)
    restored = restore_checkpoint(tmp_path, {"w": sharded})
    assert restored["w"].sharding == sharding and restored["w"].tolist() == list(range(8))


def test_arguments_for_orbax() -> None:
    args = orbax_utils.restore_args_from_target({"w": jnp.ones(2), "n": 3})
    assert args["w"].restore_type is jax.Array and args["w"].dtype == jnp.float32 and args["n"].restore_type is int
    assert list(orbax_utils.save_args_from_target({"w": jnp.ones(2)})) == ["w"]
    assert orbax_utils.maybe_construct_transformations({}, None) == {}
    assert orbax_utils.maybe_construct_transformations({}, {"w": 1}) == {"w": 1}


def test_old_names_are_counted_per_class() -> None:
    old = FrozenDict({"Dense_12": 1, "Dense_2": {"Conv_5": 2}, "x": 3})
    assert checkpoints.convert_pre_linen(old) == FrozenDict({"Dense_0": {"Conv_0": 2}, "Dense_1": 1, "x": 3})
    assert checkpoints.convert_pre_linen(3) == 3


def test_paths_and_order() -> None:
    assert checkpoints.safe_normpath("./a//b") == "a/b" and checkpoints.safe_normpath("gs://a//b") == "gs://a/b"
    assert checkpoints.natural_sort(["a-10", "a-2"], signed=False) == ["a-2", "a-10"]
    assert checkpoints.natural_sort(["f_10", "f_2", "f_-1", "f_0.5"]) == ["f_-1", "f_0.5", "f_2", "f_10"]
