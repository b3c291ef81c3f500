# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: every setting against its definition, row by row, in one program for all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.models.sampling import filtered, least_of
from batiste.serve.chat.sampling import Draws, Sampling, drawn

V = 40
LOGITS = np.random.default_rng(0).normal(0, 2, (4, V)).astype(np.float32)
NONE = np.zeros((4, V), bool), np.zeros((4, V), np.int32), np.zeros((4, V), np.float32)


def rows(*samplings: Sampling) -> Draws:
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *(s.row() for s in samplings))


FILTER, DRAW = jax.jit(filtered), jax.jit(drawn)


def kept_by_sorting(logits: np.ndarray, s: Sampling) -> set[int]:
    """The definition: sort, cut, and renormalise in between."""
    order = np.argsort(-logits)
    if s.top_k:
        order = order[: s.top_k]
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    if s.top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(p), s.top_p)) + 1]
        p = p[: len(order)]
    return set(order[p >= s.min_p * p.max()].tolist())


SETTINGS = [
    Sampling(1.0), Sampling(1.0, top_k=1), Sampling(1.0, top_k=7), Sampling(1.0, top_k=V), Sampling(1.0, top_k=10**6),
    Sampling(1.0, top_p=0.5), Sampling(1.0, top_p=0.95), Sampling(1.0, top_p=0.0), Sampling(1.0, min_p=0.1),
    Sampling(1.0, min_p=1.0), Sampling(1.0, top_k=9, top_p=0.8), Sampling(1.0, top_k=20, top_p=0.9, min_p=0.05),
]  # fmt: skip


@pytest.mark.parametrize("i", range(0, len(SETTINGS), 4))
def test_the_filters_keep_what_sorting_would_keep(i: int) -> None:
    settings = SETTINGS[i : i + 4]
    found = np.asarray(FILTER(LOGITS, rows(*settings).how))
    for row, setting in enumerate(settings):
        assert set(np.flatnonzero(np.isfinite(found[row]))) == kept_by_sorting(LOGITS[row], setting), setting
        np.testing.assert_array_equal(found[row][np.isfinite(found[row])], LOGITS[row][np.isfinite(found[row])])


def test_the_threshold_is_found_among_extreme_numbers() -> None:
    x = np.array([[-np.inf, -3e38, -1e-40, -0.0, 1e-45, 1.0, 3e38, np.inf]], np.float32)
    for k, expected in enumerate(sorted(x[0], reverse=True), 1):
        found = least_of(jnp.asarray(x), jnp.ones_like(x), jnp.array([float(k)]))
        assert found[0] == expected or (abs(found[0]) < 1e-37 and abs(expected) < 1e-37)  # subnormals may be zero


def test_penalties_by_their_formulas() -> None:
    prompted, generated, bias = (x.copy() for x in NONE)
    prompted[:, 3], generated[:, 5], generated[:, 6], bias[:, 7] = True, 2, 1, 4.0
    settings = Sampling(repetition=2.0, presence=0.5, frequency=0.25)
    expected = LOGITS.copy()
    for token, times in ((3, 0), (5, 2), (6, 1)):
        expected[:, token] = np.where(expected[:, token] > 0, expected[:, token] / 2, expected[:, token] * 2)
        expected[:, token] -= 0.5 * (times > 0) + 0.25 * times
    expected[:, 7] += 4
    out = DRAW(LOGITS, rows(*[settings] * 4), np.zeros(4, int), np.ones(4, bool), prompted, generated, bias)
    np.testing.assert_array_equal(out.token, expected.argmax(-1))
    assert (expected.argmax(-1) != LOGITS.argmax(-1)).any()


def test_draws_follow_the_distribution() -> None:
    """χ² of 4,000 draws of a row, whose seed and count alone decide; 99.9 % of all are below 72.1."""
    draws, count = rows(*[Sampling(1.0, seed=s) for s in range(4)]), 1000
    live = np.ones(4, bool)
    tokens = jax.jit(jax.vmap(lambda n: drawn(jnp.asarray(LOGITS[:1].repeat(4, 0)), draws, jnp.full(4, n), live, *NONE)
                              .token))(jnp.arange(count))  # fmt: skip
    p = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
    seen = np.bincount(np.asarray(tokens).ravel(), minlength=V)
    assert ((seen - 4 * count * p) ** 2 / (4 * count * p)).sum() < 72.1


def test_a_row_draws_the_same_in_any_company() -> None:
    """Greedy, narrow, reporting and idle neighbours take other branches of the program."""
    mine = Sampling(0.8, top_p=0.9, seed=7)
    companies = [
        [Sampling()] * 3, [Sampling(1.0)] * 3, [Sampling(1.0, top_k=3, logprobs=True)] * 3,
        [Sampling(0.3, min_p=0.5)] * 3,
    ]  # fmt: skip
    tokens = set()
    for neighbours in companies:
        for live in (np.ones(4, bool), np.array([True, False, False, False])):
            out = DRAW(LOGITS, rows(mine, *neighbours), np.full(4, 3), live, *NONE)
            tokens.add(int(out.token[0]))
    assert len(tokens) == 1


def test_log_probabilities_are_those_of_the_model() -> None:
    """Whatever the temperature: 20 of the likeliest, best first, and that of the token itself."""
    out = DRAW(
        LOGITS, rows(*[Sampling(2.0, top_k=5, logprobs=True, seed=1)] * 4), np.zeros(4, int), np.ones(4, bool), *NONE
    )
    logp = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.likeliest_logprob, -np.sort(-logp)[:, :20], rtol=1e-5)
    np.testing.assert_array_equal(out.likeliest, np.argsort(-logp)[:, :20])
    np.testing.assert_allclose(out.logprob, logp[np.arange(4), np.asarray(out.token)], rtol=1e-5)


def test_rows_without_numbers_are_known() -> None:
    logits = LOGITS.copy()
    logits[1, 4], logits[2, 9], logits[3] = np.nan, np.inf, -np.inf
    out = DRAW(logits, rows(*[Sampling()] * 4), np.zeros(4, int), np.ones(4, bool), *NONE)
    assert np.asarray(out.sound).tolist() == [True, False, False, False]


def test_choices_of_one_seed_differ_and_repeat() -> None:
    keys = [Sampling(seed=s, choice=c).row().key.tobytes() for s in range(50) for c in range(4)]
    assert len(set(keys)) == 200
    assert Sampling(seed=2**63, choice=1).row().key.tolist() == Sampling(seed=2**63, choice=1).row().key.tolist()
