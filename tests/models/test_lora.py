# SPDX-License-Identifier: Apache-2.0
"""Adapters: what they leave alone, what is trained, their files, merging, and the same over weights of few bits."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.graph.errors import ArgumentError
from batiste.models import (
    Decoder,
    DecoderConfig,
    WeightsError,
    add_lora,
    load_adapters,
    load_decoder,
    merge_lora,
    remove_lora,
    save_adapters,
    save_decoder,
    select,
)  # fmt: skip
from batiste.nn.lora import LoRAParam
from batiste.quant import quantize
from batiste.training import train_step

SMALL = DecoderConfig(vocab=32, features=16, layers=2, heads=4, kv_heads=2, hidden=24)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)
LAYERS = ("blocks/*/attn/query", "blocks/*/attn/out", "*/mlp/up")


def make(bits: int | None = None) -> Decoder:
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    return model if bits is None else quantize(model, bits, keep=("*Norm", "embed"))


def adapted(bits: int | None = None, *, moved: bool = True) -> Decoder:
    model = make(bits)
    for i, layer in enumerate(add_lora(model, *LAYERS, rank=3, alpha=6, rngs=nnx.Rngs(1)).values()):
        if moved:
            layer.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(i), layer.lora_b.shape)
    return model


def mean_loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    sums = model.loss(tokens, chunks=1)
    return sums.loss / sums.weight


def test_select_finds_parts_by_their_paths() -> None:
    model = make()
    assert list(select(model, "blocks/*/attn/*/kernel")) == [
        f"blocks/layers/attn/{name}/kernel" for name in ("key", "out", "query", "value")]  # fmt: skip
    assert select(model, "norm") == {"norm": model.norm}


def test_new_adapters_change_nothing_and_layers_of_a_stack_differ() -> None:
    model = adapted(moved=False)
    np.testing.assert_array_equal(model(TOKENS), make()(TOKENS))
    a = model.blocks.layers.attn.query.lora_a
    assert a.shape == (2, 16, 3) and (a[0] != a[1]).any()
    assert model.blocks.layers.attn.out.lora_a.shape == (2, 16, 3)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_training_moves_the_adapters_alone(bits: int | None) -> None:
    model = adapted(bits, moved=False)
    before = {path: jax.tree.map(np.array, v.get_value())
              for path, v in select(model, "*").items() if isinstance(v, nnx.Variable)}  # fmt: skip
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=LoRAParam)
    step = train_step(mean_loss)
    losses = [float(step(model, optimizer, TOKENS)["loss"]) for _ in range(5)]
    assert losses[-1] < losses[0]
    for path, v in select(model, "*").items():
        if isinstance(v, nnx.Variable):
            same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before[path], v.get_value()))
            assert same != isinstance(v, LoRAParam), path
    moments = jax.tree.leaves(nnx.state(optimizer.opt_state))
    assert sum(x.size for x in moments) < 2.1 * sum(x.size for x in jax.tree.leaves(nnx.state(model, LoRAParam)))


@pytest.mark.parametrize("bits", [None, 4])
def test_merged_the_model_computes_the_same_and_is_plain_again(bits: int | None, tmp_path: Path) -> None:
    model = adapted(bits)
    expected = model(TOKENS)
    merge_lora(model)
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-5)
    assert not any(isinstance(v, LoRAParam) for v in select(model, "*").values())
    if bits is None:
        save_decoder(model, tmp_path)
        np.testing.assert_array_equal(load_decoder(tmp_path)(TOKENS), model(TOKENS))


def test_removed_the_model_is_as_it_was() -> None:
    model = adapted()
    assert (model(TOKENS) != make()(TOKENS)).any()
    remove_lora(model)
    np.testing.assert_array_equal(model(TOKENS), make()(TOKENS))


def test_files_hold_the_adapters_alone(tmp_path: Path) -> None:
    model, other = adapted(), adapted(moved=False)
    files = save_adapters(model, tmp_path)
    assert sum(file.stat().st_size for file in files) < 16_000
    load_adapters(other, tmp_path)
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))
    wrong = make()
    add_lora(wrong, *LAYERS, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match="the rank they were trained with"):
        load_adapters(wrong, tmp_path)


def test_a_shared_layer_stays_shared() -> None:
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer, layer)
    add_lora(model, "layers/0", rank=1, rngs=nnx.Rngs(0))
    assert model.layers[0] is model.layers[1] and model(jnp.ones((1, 3))).shape == (1, 3)


def test_wrong_patterns_are_errors_with_a_fix() -> None:
    model = make()
    for patterns, message in ((("nothing",), "select"), (("*/attn",), "narrower patterns"), (("embed",), "Embed")):
        with pytest.raises(ArgumentError, match=message):
            add_lora(model, *patterns, rngs=nnx.Rngs(0))
    add_lora(model, *LAYERS, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="one around each"):
        add_lora(model, "*/query", rngs=nnx.Rngs(0))


def test_the_example_lowers_the_perplexity_of_held_out_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    sizes = {"--steps": 20, "--length": 16, "--batch": 4, "--held": 4, "--rate": 1e-2, "--out": tmp_path}
    options = [str(word) for option in sizes.items() for word in option]
    monkeypatch.setattr("sys.argv", ["lora.py", "--model", "tiny", *options])
    assert importlib.import_module("lora").main() == 0
    assert "held-out tokens" in capsys.readouterr().out and (tmp_path / "model.safetensors").exists()
