# SPDX-License-Identifier: Apache-2.0
"""Generation: rows of any lengths, samplers and beams against transformers, guesses, and how often it compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from batiste import nnx
from batiste.graph.errors import ArgumentError, RngError
from batiste.models import Decoder, DecoderConfig, beam_search, generate, load_decoder, save_decoder, speculate, stream
from batiste.models.sampling import Sampling, filtered, penalised
from batiste.models.speculative import verified

SMALL = DecoderConfig(vocab=32, features=16, layers=2, heads=4, kv_heads=2, hidden=24, rope_theta=100.0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9]]


def make(seed: int = 0, **changes) -> Decoder:
    return Decoder(SMALL.replace(**changes), rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make()


def alone(model: Decoder, prompt: list[int], steps: int) -> list[int]:
    """The likeliest tokens, read from the beginning again for each."""
    tokens = list(prompt)
    for _ in range(steps):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(nnx.jit(lambda m, t: m(t))(model, row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_rows_of_any_lengths_are_read_as_each_alone(model: Decoder) -> None:
    together = np.stack(list(stream(model, PROMPTS, 6)), axis=1)
    for row, prompt in zip(together, PROMPTS):
        assert row.tolist() == alone(model, prompt, 6)


@pytest.mark.parametrize("padded", ["left", "right"])
def test_padding_on_either_side_is_not_seen(model: Decoder, padded: str) -> None:
    lengths = [len(prompt) for prompt in PROMPTS]
    rows = np.full((3, 9), 31)
    for row, prompt in zip(rows, PROMPTS):
        row[slice(0, len(prompt)) if padded == "right" else slice(9 - len(prompt), 9)] = prompt
    found = generate(model, jnp.asarray(rows), 4, lengths=lengths, padded=padded)
    np.testing.assert_array_equal(found[:, 9:], np.stack(list(stream(model, PROMPTS, 4)), axis=1))


def test_a_window_is_a_ring_of_few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batiste.models.generation.PIECE", 4)
    model = make(window=3)
    prompts = [np.arange(21) % 32, [7, 5], np.arange(6) * 3]
    together = np.stack(list(stream(model, prompts, 9)), axis=1)
    for row, prompt in zip(together, prompts):
        assert row.tolist() == alone(model, list(prompt), 9)


def test_inside_a_plan_of_sizes_no_length_compiles_anew(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    plain = Decoder.hidden
    monkeypatch.setattr(Decoder, "hidden", lambda self, *args: traced.append(1) or plain(self, *args))
    list(stream(model, [[1] * 9], 8, sizes=(17, 20)))
    assert len(traced) == 2  # one program reads, one takes steps
    for length, steps in ((1, 16), (5, 12), (12, 5), (16, 1)):
        list(stream(model, [[2] * length], steps, Sampling(min_p=0.1), sizes=(17, 20)))
    assert len(traced) == 2


def test_ends_stop_a_row_and_the_stream(model: Decoder) -> None:
    free = np.stack(list(stream(model, PROMPTS, 6)), axis=1)
    end = int(free[0, 2])
    found = np.stack(list(stream(model, PROMPTS[:1], 6, ends=[end])), axis=1)
    assert found[0].tolist() == free[0, : free[0].tolist().index(end) + 1].tolist()
    padded = generate(model, jnp.asarray([PROMPTS[0]]), 6, ends=[end])
    assert padded.shape == (1, 14) and padded[0, -1] == end


@pytest.mark.parametrize(
    ("settings", "processor"),
    [
        ({"top_k": 5}, lambda: transformers.TopKLogitsWarper(5)),
        ({"top_p": 0.7}, lambda: transformers.TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, lambda: transformers.MinPLogitsWarper(0.1)),
        ({"repetition": 1.3}, lambda: transformers.RepetitionPenaltyLogitsProcessor(1.3)),
    ],
)
def test_samplers_are_those_of_transformers(settings: dict, processor) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32) * 2
    tokens = np.random.default_rng(1).integers(0, 50, (6, 7))
    expected = processor()(torch.tensor(tokens), torch.tensor(logits.copy())).numpy()
    s = Sampling(**settings).rows(6)
    occurred = np.zeros((6, 50), bool)
    np.put_along_axis(occurred, tokens, True, axis=1)
    found = filtered(penalised(jnp.asarray(logits), s, occurred, jnp.zeros((6, 50), int)), s)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_presence_and_frequency_are_taken_from_the_logits() -> None:
    counts = jnp.array([[0, 1, 3]])
    s = Sampling(presence=0.5, frequency=0.25).rows(1)
    found = penalised(jnp.zeros((1, 3)), s, jnp.zeros((1, 3), bool), counts)
    np.testing.assert_allclose(found, [[0, -0.75, -1.25]])


def test_the_same_key_draws_the_same_and_each_row_has_its_settings(model: Decoder) -> None:
    s, key = Sampling(temperature=np.array([3.0, 0.0])), jax.random.key(1)
    a, b = (np.stack(list(stream(model, [[1, 2]] * 2, 8, s, key=key))) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a[:, 1].tolist() == alone(model, [1, 2], 8) and (a[:, 0] != a[:, 1]).any()


@pytest.fixture(scope="module")
def theirs(model: Decoder, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("weights")
    save_decoder(model, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("end", "penalty"), [(None, 1.0), (9, 1.0), (9, 0.0), (4, 2.0)])
def test_beams_are_those_of_transformers(model: Decoder, theirs, end: int | None, penalty: float) -> None:
    prompt = PROMPTS[2]
    expected = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long), num_beams=3, num_return_sequences=3,
        max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=31, length_penalty=penalty,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    (found,) = beam_search(model, [prompt], 6, beams=3, ends=[] if end is None else [end], length_penalty=penalty)
    np.testing.assert_allclose([beam.score for beam in found], expected.sequences_scores.numpy(), rtol=1e-4)
    for beam, row in zip(found, expected.sequences[:, 5:].tolist()):
        assert beam.tokens == row[: len(beam.tokens)] and set(row[len(beam.tokens) :]) <= {31}


def test_greedy_guesses_give_the_tokens_of_the_model_alone(model: Decoder) -> None:
    for draft in (make(1, layers=1), model):
        rows: list[list[int]] = [[], [], []]
        turns = 0
        for new in speculate(model, draft, PROMPTS, 9, guesses=3):
            turns += 1
            for row, more in zip(rows, new):
                row += more
        assert [len(row) for row in rows] == [9, 9, 9]
        np.testing.assert_array_equal(rows, np.stack(list(stream(model, PROMPTS, 9)), axis=1))
    assert turns == 3  # the model's own guesses are all kept: four tokens a turn


def test_guesses_that_are_kept_are_distributed_as_the_model_draws() -> None:
    p, q = (jax.nn.softmax(2 * jax.random.normal(jax.random.key(i), (5,))) for i in (0, 1))
    n = 20000
    guess = jax.random.categorical(jax.random.key(2), jnp.log(q), shape=(n, 1))
    found = verified(guess, jnp.broadcast_to(q, (n, 1, 5)), jnp.broadcast_to(p, (n, 2, 5)), jax.random.key(3))
    counts = np.bincount(np.asarray(found.token_BG[:, 0]), minlength=5)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 23.5  # chi squared of 4, at 1e-4
    both = np.asarray(found.token_BG[found.count_B == 2, 1])
    expected = len(both) * np.asarray(p)
    assert ((np.bincount(both, minlength=5) - expected) ** 2 / expected).sum() < 23.5


def test_wrong_arguments_are_errors_with_a_fix(model: Decoder) -> None:
    with pytest.raises(ArgumentError, match="out of range"):
        list(stream(model, [[1]], 1, Sampling(top_p=1.5)))
    with pytest.raises(ArgumentError, match="one token or more"):
        list(stream(model, [[1], []], 1))
    with pytest.raises(ArgumentError, match="larger one"):
        list(stream(model, [[1] * 20], 1, sizes=(16,)))
    with pytest.raises(ArgumentError, match="same family"):
        next(speculate(model, make(vocab=16), [[1]], 1))
    with pytest.raises(RngError, match="pass key"):
        next(speculate(model, model, [[1]], 1, Sampling(temperature=1.0)))
    with pytest.raises(ArgumentError, match="without penalties"):
        next(speculate(model, model, [[1]], 1, Sampling(presence=1.0)))
    with pytest.raises(ArgumentError, match="beginnings"):
        beam_search(model, [[1]], 1, beams=0)
    with pytest.raises(ArgumentError, match="left or right"):
        generate(model, jnp.ones((1, 1), int), 1, padded="both")


def test_layers_that_stand_apart_compute_the_same_bits(model: Decoder, tmp_path) -> None:
    apart = model.apart()
    drawn = {"sampling": Sampling(0.8, top_k=5), "key": jax.random.key(1)}
    for settings in ({}, drawn):
        np.testing.assert_array_equal(*(np.stack(list(stream(m, PROMPTS, 4, **settings))) for m in (model, apart)))
    assert beam_search(apart, PROMPTS[:1], 4, beams=2) == beam_search(model, PROMPTS[:1], 4, beams=2)
    save_decoder(apart, tmp_path)
    for read, wanted in ((load_decoder(tmp_path), model), (load_decoder(tmp_path, apart=True), apart)):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(read), nnx.state(wanted))
    assert len(apart.blocks) == model.config.layers
