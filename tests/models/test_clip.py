# SPDX-License-Identifier: Apache-2.0
"""CLIP: both towers with drawn weights against transformers, files both ways, training, plans, errors."""

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
from batiste.models import WeightsError
from batiste.models.clip import CLIP, CLIPS, RULES, Clip, ClipConfig, load_clip, save_clip
from batiste.models.mapping import entries

TOKENS = np.array([[1, 5, 7, 9, 29, 0], [1, 29, 0, 0, 0, 0], [1, 8, 29, 29, 29, 29], [1, 2, 3, 4, 5, 29]])


def make() -> Clip:
    return Clip(CLIPS["tiny"], rngs=nnx.Rngs(0))


def images(batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, 16, 16, 3)).astype(np.float32)


def theirs() -> transformers.CLIPModel:
    text = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 29}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    model = transformers.CLIPModel(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


def logits(reference: transformers.CLIPModel) -> np.ndarray:
    with torch.no_grad():
        pixels = torch.tensor(images().transpose(0, 3, 1, 2).copy())
        return reference(input_ids=torch.tensor(TOKENS), pixel_values=pixels).logits_per_image.numpy()


def test_with_drawn_weights_it_computes_what_transformers_computes(tmp_path: Path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    model = load_clip(tmp_path)
    assert model.config == CLIPS["tiny"]
    np.testing.assert_allclose(model(images(), TOKENS), logits(reference), rtol=1e-4, atol=1e-5)


def test_it_is_saved_under_their_names_and_read_by_them(tmp_path: Path) -> None:
    model = make()
    save_clip(model, tmp_path)
    assert load_clip(tmp_path).config == model.config
    expected = logits(transformers.CLIPModel.from_pretrained(tmp_path).eval())
    np.testing.assert_allclose(model(images(), TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_it_learns_which_text_belongs_to_which_image() -> None:
    model = make()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x, tokens = jnp.asarray(images(4)), jnp.asarray(TOKENS)

    @nnx.jit
    def step(model: Clip, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradient = nnx.value_and_grad(lambda model: model.loss(x, tokens))(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(25)]
    assert losses[-1] < 0.3 * losses[0]
    assert model(x, tokens).argmax(1).tolist() == [0, 1, 2, 3]


def test_what_follows_the_end_of_a_text_does_not_matter() -> None:
    text = make().text
    np.testing.assert_allclose(text(jnp.array([[1, 5, 29, 0, 0]])), text(jnp.array([[1, 5, 29, 7, 3]])), atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(text(TOKENS), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("clip-vit-b32", 151_277_313), ("clip-vit-b16", 149_620_737), ("clip-vit-l14", 427_616_513)],
)
def test_published_configurations_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = jax.eval_shape(lambda: Clip(CLIPS[name], rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


def test_the_table_and_the_rules_speak_of_all() -> None:
    names = {name for entry in entries(make(), CLIP) for name, _ in entry.parts()}
    assert names == {name for name in theirs().state_dict() if "position_ids" not in name}
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=RULES, strict=True,
                         names={"heads": "tensor", "mlp": "tensor", "vocab": "tensor"})  # fmt: skip
    assert "no rule" not in str(sharding.explain_sharding(make, plan))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="resize the images"):
        make().image(jnp.zeros((1, 20, 20, 3)))
    with pytest.raises(ShapeError, match="cut longer texts"):
        make().text(jnp.zeros((1, 9), int))
    with pytest.raises(ArgumentError, match="choose divisors"):
        ClipConfig(text_heads=7)
    with pytest.raises(ArgumentError, match="vocab is a size"):
        ClipConfig(vocab=0)
    save_clip(make(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    with pytest.raises(WeightsError, match="hidden_act='gelu'"):
        load_clip(tmp_path)
