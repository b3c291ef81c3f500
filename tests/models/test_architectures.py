# SPDX-License-Identifier: Apache-2.0
"""The architectures that are configurations of the one decoder, against transformers with random weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from batiste import nnx
from batiste.models import Decoder, DecoderConfig, Stretch, generate
from batiste.models.kinds import LLAMA, settings_of
from batiste.models.mapping import entries

SMALL = DecoderConfig(vocab=64, features=32, layers=2, heads=4, kv_heads=2, hidden=48, context=256)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))
KINDS = {
    "llama": {},
    "llama, own head": {"tied": False},
    "llama 3.1": {"rope_stretch": Stretch(8.0, 1.0, 4.0, 64), "rope_theta": 5e5},
    "mistral": {"window": 5, "tied": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
}


def theirs(model: Decoder):
    """Transformers' model of the same configuration, with our tensors."""
    settings = settings_of(model.config.replace(rope_stretch=None))
    rope = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    if stretch := model.config.rope_stretch:
        rope |= {"rope_type": "llama3", "factor": stretch.factor, "low_freq_factor": stretch.low,
                 "high_freq_factor": stretch.high, "original_max_position_embeddings": stretch.context}  # fmt: skip
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **{**settings, "rope_parameters": rope})
    made = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.tensor(entry.to_theirs(np.asarray(entry.variable[...][at])))
               for entry in entries(model, LLAMA) for name, at in entry.parts()}  # fmt: skip
    missing, extra = made.load_state_dict(tensors, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}
    made.tie_weights()
    return made.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_what_follows_are_those_of_transformers(kind: str) -> None:
    model = Decoder(SMALL.replace(**KINDS[kind]), rngs=nnx.Rngs(0))
    for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("bias", "scale"):  # zeros and ones would hide what they do
            v[...] += 0.3 * jnp.sin(jnp.arange(v.size).reshape(v.shape))
    other = theirs(model)
    with torch.no_grad():
        expected = other(torch.tensor(TOKENS)).logits.numpy()
    found = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS))
    assert np.abs(found - expected).max() < 1e-4 * (expected.max() - expected.min())
    row = torch.tensor(TOKENS[:1])
    tokens = other.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False,
                            eos_token_id=None, pad_token_id=0)  # fmt: skip
    np.testing.assert_array_equal(generate(model, jnp.asarray(TOKENS[:1]), 8), tokens.numpy())
