# SPDX-License-Identifier: Apache-2.0
"""Packing: every token once and in its document's order, rows nearly full, and exactly from any position on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batiste.data import PositionError, pack
from batiste.graph.errors import ArgumentError, ShapeError


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends)]


def pieces(batches: Any) -> list[list[int]]:
    """The pieces in the rows, by their segment ids."""
    found = []
    for batch in batches:
        for tokens, segments, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"]):
            for number in range(1, segments.max() + 1):
                found.append(tokens[segments == number].tolist())
                assert positions[segments == number].tolist() == list(range(len(found[-1])))
            assert not tokens[segments == 0].any()
    return found


@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 5), st.integers(1, 9))
def test_every_token_is_there_once_in_pieces_of_its_document(lengths: list[int], batch: int, window: int) -> None:
    texts = documents(lengths)
    found = pieces(pack(texts, 8, batch, window=window))
    expected = [text[i : i + 8].tolist() for text in texts for i in range(0, len(text), 8)]
    assert sorted(found) == sorted(expected)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 2000).tolist()
    batches = list(pack(documents(lengths), 256, 16))
    filled = np.concatenate([batch["segment_ids"] for batch in batches]) > 0
    assert filled[:-16].mean() > 0.98


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_a_restored_feed_goes_on_exactly(done: int) -> None:
    texts = documents(np.random.default_rng(1).integers(1, 9, 60).tolist())
    first, second = (pack(texts, 8, 3, window=16) for _ in range(2))
    for _ in range(done):
        next(first)
    second.restore(json.loads(json.dumps(first.state())))
    rest, others = list(first), list(second)
    assert len(rest) == len(others) > 0
    for one, other in zip(rest, others):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_long_documents_are_split_cut_or_refused() -> None:
    texts = documents([10])
    assert sorted(map(len, pieces(pack(texts, 4, 1)))) == [2, 4, 4]
    assert pieces(pack(texts, 4, 1, long="cut")) == [[1, 2, 3, 4]]
    with pytest.raises(ShapeError, match=r"got \(10,\), expected one dim of at most 4 tokens"):
        next(pack(texts, 4, 1, long="error"))
    with pytest.raises(ShapeError, match=r"got \(2, 3\)"):
        next(pack([np.ones((2, 3))], 4, 1))


def test_wrong_arguments_and_positions_are_refused() -> None:
    with pytest.raises(ArgumentError, match="wrong length: got 0"):
        pack([[1]], 0, 1)
    with pytest.raises(ArgumentError, match="wrong long: got 'no'"):
        pack([[1]], 4, 1, long="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PositionError, match="past the end of a lot"):
        pack([[1]], 4, 1).restore({"lot": {"epoch": 0, "item": 0}, "row": 5})
