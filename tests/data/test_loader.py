# SPDX-License-Identifier: Apache-2.0
"""Loaders: every record once per epoch, in an order of the seed alone, and exactly from any position on."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batiste.data import DataError, Loader, PositionError, prefetch
from batiste.graph.errors import ArgumentError, ShapeError
from tests.data.records import Squares, noisy

SOURCES = {"arrays": lambda: {"i": np.arange(24)}, "records": Squares}


def seen(batches: Any) -> list[list[int]]:
    return [np.asarray(batch["i"]).tolist() for batch in batches]


@given(size=st.integers(1, 40), batch=st.integers(1, 12), last=st.sampled_from(["partial", "pad", "drop"]))
def test_an_epoch_has_each_record_once(size: int, batch: int, last: Any) -> None:
    batch = min(size, batch)
    loader = Loader({"i": np.arange(size)}, batch, seed=3, last=last)
    batches = list(loader)
    assert len(batches) == len(loader)
    rows = [i for b in batches for i, w in zip(b["i"], b.get("weight", np.ones(batch))) if w]
    assert len(set(rows)) == len(rows) == (size // batch * batch if last == "drop" else size)
    if last != "partial":
        assert {b["i"].shape for b in batches} == {(batch,)}


@pytest.mark.parametrize("source", SOURCES)
def test_epochs_have_orders_of_their_own_and_the_seed_decides(source: str) -> None:
    def run(seed: int) -> list[list[int]]:
        return seen(Loader(SOURCES[source](), 8, seed=seed).feed(epochs=2))

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    assert first[:3] != first[3:]
    assert seen(Loader(SOURCES[source](), 8, shuffle=False).feed(epochs=2)) == 2 * [
        list(range(begin, begin + 8)) for begin in (0, 8, 16)
    ]


def test_iterating_again_goes_through_the_next_epoch() -> None:
    loader = Loader({"i": np.arange(24)}, 8)
    assert seen(loader) + seen(loader) == seen(loader.feed(epochs=2))
    again = Loader({"i": np.arange(24)}, 8)
    third = iter(again)
    third.restore(iter(loader).state())
    assert seen(third) == seen(loader.feed(epochs=3))[6:]
    assert seen(again) == seen(loader.feed(epochs=4))[9:]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
def test_a_loader_that_is_iterated_epoch_by_epoch_goes_on_from_its_position(done: int, ahead: bool) -> None:
    def fresh() -> Any:
        loader = Loader({"i": np.arange(24)}, 8)
        return prefetch(loader) if ahead else loader

    def epochs(loader: Any) -> list[list[list[int]]]:
        return [seen(loader) for _ in range(3)]

    first, second = fresh(), fresh()
    seen(first)
    under_way = iter(first)
    for _, _ in zip(range(done), under_way):
        pass
    position = first.state()
    assert (position["epoch"], position["step"]) == ((1, done) if done <= 3 else (2, 0))
    rest = seen(under_way)
    second.restore(position)
    assert epochs(second) == ([rest] if done <= 3 else []) + epochs(first)[: 2 if done <= 3 else 3]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("done", [0, 1, 3, 5, 6, 8])
def test_a_restored_feed_goes_on_exactly(source: str, done: int) -> None:
    options: dict[str, Any] = {} if source == "arrays" else {"record": noisy}
    loader = Loader(SOURCES[source](), 9, last="partial", **options)
    feed = loader.feed(epochs=3)
    for _ in range(done):
        next(feed)
    position = json.loads(json.dumps(feed.state()))
    rest = list(feed)
    again = Loader(SOURCES[source](), 9, last="partial", **options).feed(epochs=3)
    again.restore(position)
    others = list(again)
    assert len(rest) == len(others) == 9 - done
    jax.tree.map(np.testing.assert_array_equal, rest, others)


@pytest.mark.parametrize("last", ["pad", "drop"])
def test_processes_share_the_same_global_batches(last: Any) -> None:
    def of(index: int, count: int) -> list[Any]:
        return list(Loader({"i": np.arange(22)}, 8, last=last, process_index=index, process_count=count))

    whole = of(0, 1)
    for count in (2, 4):
        parts = zip(*(of(index, count) for index in range(count)))
        for batch, shares in zip(whole, parts, strict=True):
            joined = jax.tree.map(lambda *x: np.concatenate(x), *shares)
            weight = batch.get("weight", np.ones(8)) > 0
            np.testing.assert_array_equal(joined["i"][weight], batch["i"][weight])
            if last == "pad":
                np.testing.assert_array_equal(joined["weight"], batch["weight"])


def test_random_numbers_of_a_record_do_not_depend_on_its_batch() -> None:
    def noise(batch: int) -> dict[int, float]:
        batches = list(Loader(Squares(), batch, record=noisy))
        return {int(i): n for b in batches for i, n in zip(b["i"], b["noise"])}

    assert noise(4) == noise(6)
    assert len(set(noise(4).values())) == 24


def test_a_transform_gets_the_batch_and_numbers_of_its_own() -> None:
    def shift(batch: Any, rng: np.random.Generator) -> Any:
        return batch[0] + rng.integers(1000), batch[1]

    loader = Loader((np.zeros(8), np.arange(8)), 4, transform=shift, last="pad")
    (a, _, ones), (b, _, _) = loader
    assert a[0] != b[0]
    assert ones.tolist() == [1, 1, 1, 1]


def test_a_bad_record_is_named_and_the_feed_goes_on_at_its_position() -> None:
    source = Squares(bad=5, how="raise")
    feed = Loader(source, 4, shuffle=False).feed()
    next(feed)
    with pytest.raises(DataError, match=r"OSError: the image is truncated at record 5, epoch 0, batch 1") as error:
        next(feed)
    assert error.value.record == 5
    source.bad = -1
    assert seen([next(feed)]) == [[4, 5, 6, 7]]


def test_records_of_different_shapes_are_named() -> None:
    with pytest.raises(DataError, match=r"Records of one batch differ at record 2: got \[\(\), \(2,\)\], expected"):
        list(Loader(Squares(bad=2, how="shape"), 4, shuffle=False))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ArgumentError, "wrong batch: got 0, expected 1 or more"),
        ({"batch": 25, "last": "drop"}, ArgumentError, "got 25, expected at most the 24 records"),
        ({"batch": 4, "last": "some"}, ArgumentError, "wrong last: got 'some'"),
        ({"batch": 4, "workers": -1}, ArgumentError, "wrong number of workers"),
        ({"source": {"a": np.ones(3), "b": np.ones(4)}}, ShapeError, r"got \['a'\]: 3, \['b'\]: 4"),
        ({"source": {"a": np.float32(3)}}, ShapeError, r"\['a'\]: a number"),
        ({"source": {}}, ShapeError, "got no array"),
        ({"source": iter("abc")}, ArgumentError, r"batiste.data.feed\(source\)"),
        ({"source": []}, ArgumentError, "got '0 records'"),
        ({"source": np.ones(4), "record": noisy}, ArgumentError, "use transform="),
    ],
)
def test_wrong_arguments_are_explained(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Loader(**{"source": Squares(), "batch": 4, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_index": 2, "process_count": 2}, "wrong process_index: got 2, expected 0 to 1"),
        ({"process_index": 0, "process_count": 3}, "got 8, expected a multiple of 3 processes"),
        ({"process_index": 0, "process_count": 2, "last": "partial"}, "last='pad'"),
    ],
)
def test_shares_that_cannot_be_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        next(Loader(Squares(), 8, **{"last": "drop", **options}).feed())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 25}, "one of other data"),
        ({"seed": 7}, "one of other data"),
        ({"step": 4}, "past the end of an epoch"),
        ({"epoch": -1}, "no position of such data"),
        ({"step": None}, "no position of such data"),
    ],
)
def test_positions_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    feed = Loader(Squares(), 8).feed()
    with pytest.raises(PositionError, match=message):
        feed.restore({**feed.state(), **change})
    assert len(list(feed)) == 3


def test_weights_need_a_place() -> None:
    with pytest.raises(ArgumentError, match="got ndarray, expected a dict"):
        list(Loader(np.ones(3), 2, last="pad"))
