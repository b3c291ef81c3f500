# SPDX-License-Identifier: Apache-2.0
"""Whisper: with drawn weights against transformers, a cache, files both ways, training."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models.mapping import entries
from batiste.models.whisper import (
    RULES,
    WHISPER,
    WHISPERS,
    Whisper,
    WhisperConfig,
    load_whisper,
    save_whisper,
)

SPECTRUM = np.random.default_rng(0).normal(size=(2, 20, 6)).astype(np.float32)
TOKENS = np.array([[1, 5, 7, 9], [1, 2, 3, 4]])


def make() -> Whisper:
    return Whisper(WHISPERS["tiny"], rngs=nnx.Rngs(0))


def theirs() -> transformers.WhisperForConditionalGeneration:
    config = transformers.WhisperConfig(
        vocab_size=30, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=6, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.4)
    return model


def logits(reference: transformers.WhisperForConditionalGeneration, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        spectrum = torch.tensor(SPECTRUM.transpose(0, 2, 1).copy())
        return reference(input_features=spectrum, decoder_input_ids=torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    folder = tmp_path_factory.mktemp("whisper")
    theirs().save_pretrained(folder)
    return load_whisper(folder)


def test_with_drawn_weights_it_computes_what_transformers_computes(loaded: Whisper) -> None:
    assert loaded.config == WHISPERS["tiny"]
    expected = logits(theirs(), TOKENS)
    np.testing.assert_allclose(loaded(SPECTRUM, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_piece_after_another_is_the_whole(loaded: Whisper) -> None:
    said = loaded.heard(loaded.encode(SPECTRUM), 8)
    parts = []
    for part in (TOKENS[:, :1], TOKENS[:, 1:3], TOKENS[:, 3:]):
        found, said = loaded.decode(part, said)
        parts.append(found)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), loaded(SPECTRUM, TOKENS), atol=1e-5)


def test_it_is_saved_under_their_names_and_read_by_them(tmp_path: Path) -> None:
    model = make()
    save_whisper(model, tmp_path)
    assert load_whisper(tmp_path).config == model.config
    reference = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(model(SPECTRUM, TOKENS), logits(reference, TOKENS), rtol=1e-4, atol=1e-5)


def test_it_learns_a_text_by_heart() -> None:
    model = Whisper(WhisperConfig(16, 1, 4, 24, vocab=30, length=12, bands=6, moments=10, dropout=0.1),
                    rngs=nnx.Rngs(0))  # fmt: skip
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Whisper, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Whisper) -> jax.Array:
            found = model(SPECTRUM, TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(found, TOKENS[:, 1:]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("whisper-tiny", 37_760_640), ("whisper-base", 72_593_920), ("whisper-small", 241_734_912),
     ("whisper-large-v2", 1_543_304_960)],
)  # fmt: skip
def test_published_configurations_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = jax.eval_shape(lambda: Whisper(WHISPERS[name], rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


def test_the_table_and_the_rules_speak_of_all() -> None:
    names = {name for entry in entries(make(), WHISPER) for name, _ in entry.parts()}
    assert names == set(theirs().state_dict()) - {"proj_out.weight"}
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=RULES, strict=True,
                         names={"heads": "tensor", "mlp": "tensor", "vocab": "tensor"})  # fmt: skip
    assert "no rule" not in str(sharding.explain_sharding(make, plan))


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ShapeError, match="moments come before bands"):
        make().encode(jnp.zeros((1, 6, 20)))
    with pytest.raises(ArgumentError, match="choose divisors"):
        WhisperConfig(16, 1, 3, 24)
    with pytest.raises(ArgumentError, match="vocab is a size"):
        WhisperConfig(16, 1, 4, 24, vocab=0)
