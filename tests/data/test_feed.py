# SPDX-License-Identifier: Apache-2.0
"""Feeds of any iterable and of Grain's data sets: epochs, positions, and sources that cannot give what is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import pytest

from batiste.data import DataError, Loader, PositionError, feed, prefetch
from batiste.graph.errors import ArgumentError
from tests.data.records import Squares


def numbers() -> Iterator[int]:
    yield from range(5)


def shuffled() -> Any:
    return grain.MapDataset.source(Squares()).shuffle(seed=1).batch(4)


SOURCES = {
    "list": lambda: [10, 11, 12, 13, 14],
    "function": lambda: numbers,
    "feed": lambda: feed([1, 2, 3], epochs=2),
    "loader": lambda: Loader(Squares(), 5),
    "grain map data set": shuffled,
    "grain iter data set": lambda: shuffled().to_iter_dataset(),
    "grain loader": lambda: grain.DataLoader(
        data_source=Squares(),
        sampler=grain.samplers.IndexSampler(24, grain.sharding.NoSharding(), num_epochs=1),
        operations=[grain.transforms.Batch(4)],
    ),
}


def text(batches: Any) -> list[str]:
    return [str(batch) for batch in batches]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("done", [0, 2, 5])
@pytest.mark.parametrize("ahead", [None, 3])
def test_any_source_goes_on_from_its_position(source: str, done: int, ahead: int | None) -> None:
    def fresh() -> Any:
        made = feed(SOURCES[source](), epochs=2)
        return made if ahead is None else prefetch(made, ahead, lambda batch: batch)

    with fresh() as first, fresh() as second:
        for _ in range(done):
            next(first)
        position = json.loads(json.dumps(first.state()))
        rest = text(first)
        second.restore(position)
        assert text(second) == rest != []


def test_a_source_is_gone_through_as_often_as_asked() -> None:
    assert list(feed([1, 2], epochs=3)) == [1, 2] * 3
    assert len(list(feed(shuffled(), epochs=3))) == 18
    endless = feed(numbers, epochs=None)
    assert [next(endless) for _ in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_data_that_end_early_are_an_error() -> None:
    once = feed(numbers(), epochs=None)
    with pytest.raises(DataError, match=r"nothing in epoch 1: got generator, expected endless epochs") as error:
        list(once)
    assert "a function that makes the iterator" in str(error.value)
    with pytest.raises(DataError, match="nothing in epoch 0"):
        next(feed([], epochs=None))


def test_positions_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(PositionError, match="past the end of the data: got 2, expected 3 batches"):
        feed([1, 2]).restore({"epoch": 0, "item": 3})
    used = feed(numbers())
    next(used)
    with pytest.raises(PositionError, match="cannot go back"):
        used.restore({"epoch": 0, "item": 0})
    with pytest.raises(PositionError, match="no position of such data: got 7"):
        feed([1, 2]).restore(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PositionError, match="Grain refuses the position"):
        feed(shuffled()).restore({"epoch": 0, "item": 0, "grain": {"other": 1}})


@pytest.mark.parametrize(
    ("arguments", "message"), [((3,), "got int, expected an iterable"), (([], 0), "got 0, expected")]
)
def test_what_is_no_source_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        feed(arguments[0], epochs=arguments[-1])


def test_records_may_come_from_grain() -> None:
    batches = list(Loader(grain.MapDataset.source(Squares()).map(lambda record: record["i"]), 6, shuffle=False))
    np.testing.assert_array_equal(batches, np.arange(24).reshape(4, 6))
