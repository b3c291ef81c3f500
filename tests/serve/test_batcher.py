# SPDX-License-Identifier: Apache-2.0
"""The line in front of a model: batches, deadlines, and requests that spoil a batch."""

from __future__ import annotations

import os
import time
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest

from batiste.graph.errors import ArgumentError, DtypeError, ShapeError
from batiste.serve import Batcher, Refusal, Servable

from .stub import HANG, NAN, POISON, model


def rows(first: float, n: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.full((n, 4), first, np.float32)}


def status(item: Any, timeout: float = 10) -> int:
    """Of what became of it."""
    error = item.future.exception(timeout)
    return 200 if error is None else error.status


@pytest.fixture
def batcher(request):
    made = Batcher(model(), **getattr(request, "param", {}))
    yield made
    made.close(1)


def test_requests_share_batches_and_get_their_own_rows() -> None:
    sizes = []
    batcher = Batcher(model(0.02), linger=0.05, observe=lambda n, seconds: sizes.append(n))
    items = [batcher.submit(rows(i, 1 + i % 3), 5) for i in range(12)]
    for i, item in enumerate(items):
        np.testing.assert_array_equal(item.future.result(5)["y"], np.full((1 + i % 3, 4), 2 * i))
    batcher.close()
    assert sum(sizes) == 24 and max(sizes) == 4 and len(sizes) < 12


@pytest.mark.parametrize(("bad", "expected"), [(POISON, 500), (NAN, 500)])
def test_a_request_that_spoils_its_batch_fails_alone(bad: float, expected: int) -> None:
    batcher = Batcher(model(0.01), linger=0.05)
    for place in range(4):
        items = [batcher.submit(rows(bad if i == place else i), 5) for i in range(4)]
        assert [status(item) for item in items] == [expected if i == place else 200 for i in range(4)]
    batcher.close()


def test_one_that_hangs_is_given_up_and_the_others_are_answered() -> None:
    batcher = Batcher(model(), linger=0.05, patience=0.3)
    items = [batcher.submit(rows(HANG if i == 2 else i), 30) for i in range(4)]
    assert [status(item) for item in items] == [200, 200, 503, 200]
    assert status(batcher.submit(rows(1.0), 5)) == 200, "another thread has taken over"
    batcher.close()


def test_waiting_rows_are_taken_so_that_all_are_done_soonest() -> None:
    batcher = Batcher(model())
    for costs, rows, expected in (
        ({1: 1.0, 2: 2.0, 4: 4.0}, 3, 2),  # by the row: no padding is worth it
        ({1: 1.0, 4: 1.1}, 3, 4),  # by the batch: padding costs nothing
        ({1: 1.0, 4: 4.0, 16: 16.0}, 15, 4),
        ({1: 1.0, 4: 4.0, 16: 10.0}, 15, 16),
        ({1: 1.0, 4: 4.0}, 4, 4),
        ({}, 3, 3),  # nothing has been measured
    ):
        batcher.costs = costs
        assert batcher._worth(rows) == expected, (costs, rows)
    batcher.close(1)


def test_a_line_that_fits_no_size_is_not_padded_where_that_costs_more() -> None:
    sizes: list[int] = []

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(x))
        time.sleep(0.01 * len(x))
        return {"y": x}

    spec = {"x": "float32[batch, 4]"}, {"y": "float32[batch, 4]"}
    batcher = Batcher(Servable.of_function(run, spec, "slow", buckets={"batch": (1, 4, 16)}))
    batcher.warm()
    sizes.clear()
    first = batcher.submit(rows(0.0, 4), 10)  # while it is computed, five wait
    items = [batcher.submit(rows(float(i)), 10) for i in range(5)]
    assert [status(item) for item in (first, *items)] == [200] * 6
    assert sorted(sizes) == [1, 4, 4]
    batcher.close(1)


def test_who_cannot_be_answered_in_time_is_refused_at_once() -> None:
    batcher = Batcher(model(0.05), waiting=8)
    batcher.warm()
    items, refused = [], []
    for _ in range(40):
        try:
            items.append(batcher.submit(rows(1.0), 5))
        except Refusal as error:
            refused.append(error)
    assert refused and all(error.status == 429 and error.headers["retry-after"] for error in refused)
    assert {status(item) for item in items} == {200}
    blocker = batcher.submit(rows(1.0, 4), 5)
    with pytest.raises(Refusal, match="Too many requests wait"):
        batcher.submit(rows(1.0), 0.001)
    assert status(blocker) == 200
    batcher.close()


def test_late_and_cancelled_requests_are_not_computed() -> None:
    seen = []
    batcher = Batcher(model(0.1), linger=0, observe=lambda n, seconds: seen.append(n))
    first = batcher.submit(rows(1.0, 4), 5)
    time.sleep(0.03)
    gone, late = batcher.submit(rows(2.0, 4), 5), batcher.submit(rows(3.0, 4), 0.02)
    batcher.cancel(gone)
    assert [status(first), status(gone), status(late)] == [200, 499, 504]
    batcher.close()
    assert seen == [4]


def test_closing_answers_what_was_accepted() -> None:
    batcher = Batcher(model(0.02))
    items = [batcher.submit(rows(i), 5) for i in range(16)]
    batcher.close(5)
    assert {status(item, 0) for item in items} == {200}
    with pytest.raises(Refusal, match="unloaded"):
        batcher.submit(rows(1.0), 5)


def test_an_answer_is_the_same_alone_and_in_company() -> None:
    import jax
    import jax.numpy as jnp

    kernel = jax.random.normal(jax.random.key(0), (4, 16))
    net = jax.jit(lambda x: {"y": jnp.tanh(x @ kernel)})
    served = Servable.of_function(
        lambda x: net(x), ({"x": "float32[batch, 4]"}, {"y": "float32[batch, 16]"}), "net", buckets={"batch": (8,)}
    )
    count = 1000 if os.environ.get("BATISTE_FAULTS") == "long" else 60
    batcher = Batcher(served, linger=0.02, waiting=3 * count)
    random = np.random.default_rng(0)
    inputs = [{"x": random.normal(size=(1 + i % 3, 4)).astype(np.float32)} for i in range(count)]
    items = [batcher.submit(x, 10) for x in inputs]
    wait([item.future for item in items])
    for x, item in zip(inputs, items):
        np.testing.assert_array_equal(item.future.result()["y"], served.answer(x)["y"])
    batcher.close()


def test_bad_inputs_never_reach_the_line(batcher: Batcher) -> None:
    with pytest.raises(ShapeError, match=r"got 5, expected 1 to 4"):
        batcher.submit(rows(1.0, 5), 1)
    with pytest.raises(DtypeError, match="float64"):
        batcher.submit({"x": np.zeros((1, 4))}, 1)
    with pytest.raises(ArgumentError, match="other names"):
        batcher.submit({}, 1)
    assert not batcher.queued


def test_what_cannot_be_served_in_batches_is_refused() -> None:
    with pytest.raises(ArgumentError, match="rows"):
        Servable.of_function(lambda x: {"y": x}, ({"x": "float32[4]"}, {"y": "float32[4]"}), "fixed")
    with pytest.raises(ArgumentError, match="would compile"):
        Servable.of_function(lambda x: {"y": x}, ({"x": "float32[b, t]"}, {"y": "float32[b, t]"}), "open")
