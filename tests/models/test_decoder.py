# SPDX-License-Identifier: Apache-2.0
"""The decoder: its formula against plain JAX, its choices, its sizes, its cache, and its plans."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.models import RULES, Decoder, DecoderConfig, generate
from batiste.models.decoder import rope_angles, rotated
from batiste.models.registry import configuration
from batiste.precision import policy

BENCH = Path(__file__).parents[2] / "bench"
SMALL = DecoderConfig(vocab=32, features=16, layers=2, heads=4, kv_heads=2, hidden=24, rope_theta=100.0)
TOKENS = jax.random.randint(jax.random.key(0), (8, 9), 0, 32)
CHOICES = {
    "llama": {},
    "palm": {"parallel": True, "kv_heads": 1, "z_loss": 1e-4},
    "qwen2": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "mistral": {"window": 4},
    "gelu": {"gated": False},
    "gpt2": {"gated": False, "norm": "layer", "bias": True, "qkv_bias": True, "learned_positions": True, "context": 32},
    "gemma": {"norm": "rms+1", "post_norms": True, "window": 4, "full_every": 2, "attn_cap": 5.0, "qk_norm": True},
    "mixtral": {"experts": 4},
}


def make(**changes) -> Decoder:
    return Decoder(SMALL.replace(**changes), rngs=nnx.Rngs(0))


def test_the_numbers_are_those_of_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    plain, scale = importlib.import_module("plain_decoder"), importlib.import_module("scale")
    found = make().loss(TOKENS, chunks=2)
    expected = plain.loss(SMALL, scale.same_start(SMALL), TOKENS, jnp.float32, "scan", None, 2, None)
    np.testing.assert_allclose(found.loss / found.weight, expected, rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_has_the_parameters_it_says_and_looks_at_the_past_alone(choice: str) -> None:
    model = make(**CHOICES[choice])
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == model.config.parameters
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 32)
    differs = jnp.any(model(TOKENS) != model(changed), axis=(0, 2))
    np.testing.assert_array_equal(differs, np.arange(9) >= 5)


@pytest.mark.parametrize("choice", CHOICES)
def test_with_a_cache_the_same_tokens_are_chosen(choice: str) -> None:
    model = make(**CHOICES[choice])
    tokens = generate(model, TOKENS[:2], 4)
    np.testing.assert_array_equal(tokens[:, 9:], model(tokens[:, :-1]).argmax(-1)[:, 8:])


def test_a_window_sees_no_further() -> None:
    model = make(window=3, layers=1)
    changed = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 32)
    differs = jnp.any(model(TOKENS) != model(changed), axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(differs), [2, 3, 4])


def test_rope_turns_by_differences_of_positions() -> None:
    q, k = jax.random.normal(jax.random.key(2), (2, 1, 1, 1, 8))
    products = []
    for start in (0, 5):
        angles = [rope_angles(jnp.array([start + step]), 8, 100.0) for step in (0, 3)]
        products.append(jnp.sum(rotated(q, *angles[0]) * rotated(k, *angles[1])))
    np.testing.assert_allclose(*products, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_that_count() -> None:
    model, weights = make(), jnp.ones(TOKENS.shape).at[:, 6:].set(0)
    whole, cut = model.loss(TOKENS, weights, chunks=3), model.loss(TOKENS[:, :6], chunks=1)
    np.testing.assert_allclose(whole.loss, cut.loss, rtol=1e-5)
    logits = jax.nn.log_softmax(model(TOKENS[:, :5]))
    np.testing.assert_allclose(cut.loss, -jnp.take_along_axis(logits, TOKENS[:, 1:6, None], -1).sum(), rtol=1e-5)
    assert make(z_loss=0.1).loss(TOKENS).loss > make().loss(TOKENS).loss
    assert make(z_loss=0.1).loss(TOKENS, z_loss=0.0).loss == make().loss(TOKENS).loss


def test_in_bfloat16_the_loss_is_near_and_logits_are_float32() -> None:
    model = make()
    mixed = policy("bfloat16")(model)
    assert mixed(TOKENS).dtype == jnp.float32
    assert mixed.cache(1, 4).k_LBSKC.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.loss(TOKENS).loss, model.loss(TOKENS).loss, rtol=1e-2)


loss_and_gradients = nnx.jit(nnx.value_and_grad(lambda model, tokens: model.loss(tokens, chunks=2).loss))


@pytest.mark.parametrize("sizes", [{"fsdp": -1}, {"fsdp": 4, "tensor": 2}], ids=["fsdp", "fsdp_tensor"])
def test_on_a_mesh_loss_and_gradients_are_those_of_one_device(sizes: dict[str, int]) -> None:
    expected = loss_and_gradients(make(), TOKENS)
    plan = sharding.ready_plan(rules=RULES, least=16, **sizes)
    with sharding.use(plan):
        model = make()
        found = loss_and_gradients(model, plan.shard_batch(TOKENS))
    assert not model.blocks.layers.mlp.up.kernel[...].sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_rules_speak_of_every_parameter_of_every_choice() -> None:
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=RULES, strict=True,
                         names={"heads": "tensor", "kv_heads": None, "mlp": "tensor", "vocab": "tensor"})  # fmt: skip
    for changes in CHOICES.values():
        table = str(sharding.explain_sharding(lambda changes=changes: make(**changes), plan))
        assert "no rule" not in table


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("llama2-7b", 6_738_415_616),
     ("llama3-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096), ("qwen2-0.5b", 494_032_768),
     ("qwen3-0.6b", 596_049_920), ("gpt2/gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200),
     ("gemma2-2b", 2_614_341_888), ("gemma2-9b", 9_241_705_984), ("gemma2-27b", 27_227_128_320),
     ("gemma3-270m", 268_098_176), ("gemma3-1b", 999_885_952), ("mixtral-8x7b", 46_702_792_704),
     ("qwen3-30b-a3b", 30_532_122_624)],
)  # fmt: skip
def test_published_configurations_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert configuration(name)[1].parameters == parameters


def test_drawn_tokens_follow_key_and_top_k() -> None:
    model, key = make(), jax.random.key(3)
    drawn = [generate(model, TOKENS[:1], 3, temperature=2.0, key=k) for k in (key, key, jax.random.key(4))]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    np.testing.assert_array_equal(generate(model, TOKENS[:1], 3, temperature=2.0, top_k=1, key=key),
                                  generate(model, TOKENS[:1], 3))  # fmt: skip


def test_wrong_sizes_and_arguments_are_errors_with_a_fix() -> None:
    with pytest.raises(ArgumentError, match="kv_heads that divide heads"):
        SMALL.replace(kv_heads=3)
    with pytest.raises(ArgumentError, match="pass head_dim"):
        SMALL.replace(features=18)
    with pytest.raises(ArgumentError, match="even"):
        SMALL.replace(head_dim=3)
    with pytest.raises(ArgumentError, match="layers"):
        SMALL.replace(layers=0)
    model = make()
    with pytest.raises(ShapeError, match="rows of tokens"):
        model(TOKENS[0])
    with pytest.raises(ArgumentError, match="top_k"):
        generate(model, TOKENS, 0)
    with pytest.raises(RngError, match="key"):
        generate(model, TOKENS, 1, temperature=1.0)
    with pytest.raises(ShapeError, match="prompt"):
        generate(model, TOKENS[:, :0], 1)
