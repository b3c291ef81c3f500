# SPDX-License-Identifier: Apache-2.0
"""Which rows a process reads, and the batch that they make, with one process; two are in test_two_processes.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from batiste import sharding
from batiste.distributed import global_batch, process_slice
from batiste.graph.errors import ArgumentError, ShapeError


def test_without_a_plan_the_rows_are_divided_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert process_slice(12) == slice(6, 9)
    with pytest.raises(ShapeError, match="got 10 rows, expected a multiple of 4 processes"):
        process_slice(10)


def test_one_process_holds_all_rows_and_its_batch_is_that_of_the_plan() -> None:
    plan = sharding.ready_plan(data=2, fsdp=2, sequence=2)
    x = {"tokens": np.arange(32).reshape(8, 4), "weight": np.ones(8, np.float32), "step": 3}
    with sharding.use(plan):
        assert process_slice(8) == slice(0, 8)
        batch = global_batch(x)
    expected = plan.shard_batch({**x, "step": np.asarray(3)})
    for name, array in batch.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.sharding.is_equivalent_to(expected[name].sharding, array.ndim), name


def test_rows_that_do_not_divide_and_a_missing_plan_are_errors() -> None:
    plan = sharding.data_parallel()
    with pytest.raises(ShapeError, match="got 12 rows, expected a multiple of 8 parts of the plan's batch"):
        process_slice(12, plan)
    with pytest.raises(ShapeError, match="got 12 rows, expected a multiple of 8 parts on this process's devices"):
        global_batch(np.ones((12, 2)), plan)
    with pytest.raises(ArgumentError, match="a batch over all processes needs a plan"):
        global_batch(np.ones((8, 2)))
