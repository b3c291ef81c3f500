# SPDX-License-Identifier: Apache-2.0
"""The architectures that are configurations of the one decoder, against transformers with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mixtral import modeling_mixtral

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.models import (
    Decoder,
    DecoderConfig,
    Stretch,
    WeightsError,
    generate,
    kinds,
    load_decoder,
    save_decoder,
    torch_activations,
    verify,
)
from batiste.models.bert import BERT
from batiste.models.decoder import SparseMlp
from batiste.models.kinds import KINDS, kind_of
from batiste.models.whisper import WHISPER

SMALL = DecoderConfig(vocab=64, features=32, layers=2, heads=4, kv_heads=2, hidden=48, context=256)
GEMMA = {"norm": "rms+1", "post_norms": True, "activation": "gelu", "embed_scale": True, "window": 5, "full_every": 2,
         "head_dim": 12, "layers": 3, "epsilon": 1e-6}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))
MODELS = {
    "llama": {"rope_theta": 5e5},
    "llama, own head": {"tied": False},
    "llama 3.1": {"rope_stretch": Stretch(8.0, 1.0, 4.0, 64), "rope_theta": 5e5},
    "mistral": {"window": 5, "tied": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "gpt2": {"gated": False, "norm": "layer", "bias": True, "qkv_bias": True, "learned_positions": True, "kv_heads": 4},
    "gemma2": {**GEMMA, "attn_cap": 1.0, "logit_cap": 2.0, "query_scale": 20},
    "gemma3_text": {**GEMMA, "qk_norm": True, "query_scale": 20, "rope_theta": 1e6, "local_theta": 100.0},
    "mixtral": {"experts": 4, "tied": False},
    "qwen3_moe": {"experts": 4, "top_k": 3, "qk_norm": True, "head_dim": 16, "tied": False},
}
LAYERS = {  # that are compared, of the last block
    "gpt2": {"embed", "places", "norm", "", "attn_norm", "attn/out", "mlp/up", "mlp/down"},
    "gemma2": {"embed", "attn_post", "mlp_post", ""},
    "gemma3_text": {"embed", "attn/query_norm", "attn/key_norm", "attn_post", "mlp_post", ""},
    "mixtral": {"embed", "mlp_norm", "attn/out", ""},
    "qwen3_moe": {"embed", "mlp_norm", "attn/out", ""},
}
logits_of = nnx.jit(lambda model, tokens: model(tokens))


class Case(NamedTuple):
    """A model, its files, and transformers' model of them."""

    kind: str
    model: Decoder
    folder: Path
    theirs: Any


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = Decoder(SMALL.replace(**MODELS[request.param]), rngs=nnx.Rngs(0))
    parameters: Any = nnx.state(model, nnx.Param)
    for path, v in nnx.to_flat_state(parameters):
        if path[-1] in ("bias", "scale"):  # zeros and ones would hide what they do
            v[...] += 0.3 * jnp.sin(jnp.arange(v.size).reshape(v.shape))
    folder = tmp_path_factory.mktemp("ours")
    save_decoder(model, folder)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs, said = loaded
    assert not said["missing_keys"] and not said["unexpected_keys"]
    return Case(request.param, model, folder, theirs.eval())


def test_logits_and_what_follows_are_those_of_transformers(case: Case) -> None:
    with torch.no_grad():
        expected = case.theirs(torch.tensor(TOKENS)).logits.numpy()
    found = np.asarray(logits_of(case.model, TOKENS))
    assert np.abs(found - expected).max() < 1e-4 * (expected.max() - expected.min())
    row = torch.tensor(TOKENS[:1])
    tokens = case.theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)  # fmt: skip
    np.testing.assert_array_equal(generate(case.model, jnp.asarray(TOKENS[:1]), 8), tokens.numpy())


def test_their_files_are_read_as_ours_are(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path)
    for folder in (case.folder, tmp_path):
        found = load_decoder(folder)
        assert found.config == case.model.config
        assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(found), nnx.state(case.model)))


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"], indirect=True)
def test_every_layer_is_theirs(case: Case) -> None:
    part = case.theirs.transformer if case.kind == "gpt2" else case.theirs
    with torch.no_grad():
        expected = torch_activations(part, torch.tensor(TOKENS))
        expected["logits"] = case.theirs(torch.tensor(TOKENS)).logits.numpy()
    table = kind_of(case.model.config)[1].table
    found = verify(case.model, expected, (TOKENS,), table=table, names={"": "logits"})
    assert found, str(found)
    last = f"blocks/{case.model.config.layers - 1}/"
    assert LAYERS[case.kind] <= {d.layer.removeprefix(last) for d in found.differences}


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"], indirect=True)
def test_a_cache_gives_the_logits_of_the_whole_a_token_at_a_time(case: Case) -> None:
    expected = logits_of(case.model, TOKENS)
    read = nnx.jit(lambda model, tokens, cache: model.hidden(tokens, cache))
    x_BTD, cache = read(case.model, TOKENS[:, :9], case.model.cache(2, 24))
    found = [x_BTD]
    for t in range(9, 24):
        x_BTD, cache = read(case.model, TOKENS[:, t : t + 1], cache)
        found.append(x_BTD)
    logits = case.model.logits(jnp.concatenate(found, axis=1))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(expected.max() - expected.min()))


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"], indirect=True)
def test_routers_add_to_the_loss_what_theirs_add(case: Case) -> None:
    c, model = case.model.config, nnx.clone(case.model)
    with torch.no_grad():
        logits = case.theirs(torch.tensor(TOKENS[:, :-1]), output_router_logits=True).router_logits
        balance = float(modeling_mixtral.load_balancing_loss_func(logits, c.experts, c.top_k))
        z = float(torch.cat(logits).logsumexp(-1).square().mean())
    plain = model.loss(jnp.asarray(TOKENS))
    for weights, expected in (((0.5, 0.0), 0.5 * balance), ((0.1, 0.2), 0.1 * balance + 0.2 * z)):
        model.config = c.replace(balance_loss=weights[0], router_z_loss=weights[1])
        for one in (model, model.apart()):
            found = one.loss(jnp.asarray(TOKENS))
            np.testing.assert_allclose((found.loss - plain.loss) / found.weight, expected, rtol=1e-5)
    assert kind_of(model.config)[0] == case.kind


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"], indirect=True)
def test_it_learns_and_every_parameter_has_a_finite_gradient(case: Case) -> None:
    model = nnx.clone(case.model)

    @nnx.jit
    def step(model, tokens):
        loss, gradients = nnx.value_and_grad(lambda model: model.loss(tokens, chunks=2).loss / 46)(model)
        nnx.update(model, jax.tree.map(lambda x, g: x - 0.1 * g, nnx.state(model, nnx.Param), gradients))
        return loss, gradients

    losses, gradients = zip(*(step(model, TOKENS) for _ in range(4)))
    assert losses[-1] < losses[0] < 100
    logits = jax.nn.log_softmax(logits_of(case.model, TOKENS)[:, :-1])
    np.testing.assert_allclose(losses[0], -jnp.take_along_axis(logits, TOKENS[:, 1:, None], -1).mean(), rtol=1e-4)
    for path, g in nnx.to_flat_state(gradients[0]):
        assert np.isfinite(g[...]).all() and np.any(g[...] != 0), path


def test_settings_that_no_decoder_here_has_are_refused(tmp_path: Path) -> None:
    save_decoder(Decoder(SMALL.replace(**MODELS["gemma3_text"]), rngs=nnx.Rngs(0)), tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    alternate = ["full_attention", "full_attention", "sliding_attention"]
    for changes, message in (
        ({"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": alternate}, "layers with a window alternate"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, "stretches RoPE in a way"),
        ({"model_type": "gemma7"}, "of an architecture that this decoder is not"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(about | changes))
        with pytest.raises(WeightsError, match=message):
            load_decoder(tmp_path)


def test_choices_that_contradict_each_other_are_refused() -> None:
    for changes, message in (
        ({"full_every": 2}, "layers differ where some have a window"),
        ({"experts": 4, "top_k": 5}, "top_k from 1"),
        ({"norm": "batch"}, "a few kinds"),
    ):
        with pytest.raises(ArgumentError, match=message):
            SMALL.replace(**changes)
    for name, changes in MODELS.items():
        said = kind_of(SMALL.replace(**changes))[0]
        assert said in KINDS and name.startswith(said)
    assert {field.name for field in dataclasses.fields(DecoderConfig)} >= {*KINDS["gpt2"].names}


def test_with_a_capacity_late_positions_pass_by() -> None:
    config = SMALL.replace(experts=4)
    mlp = [SparseMlp(c, rngs=nnx.Rngs(0)) for c in (config, config.replace(capacity=0.5))]
    x_BTD = jax.random.normal(jax.random.key(0), (1, 8, 32))
    found = [jnp.any(m(x_BTD) != 0, axis=-1) for m in mlp]
    assert found[0].all() and not found[1].all() and found[1].any()


def test_the_page_says_how_long_files_and_tables_are() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "models.md").read_text()
    tables = {"decoder": kinds.LLAMA, "bert": BERT, "whisper": WHISPER}
    for name, table in tables.items():
        lines = len((root / "batiste" / "models" / f"{name}.py").read_text().splitlines())
        (row,) = (line for line in page.splitlines() if line.startswith("| ") and f"(`{name}.py`" in line)
        assert row.endswith(f"| {lines} | {len(table.names)} |"), f"{name}: {lines} lines, {len(table.names)} names"
    assert f"| GPT-2 | 0 | {len(kinds.GPT2.names)} |" in page
