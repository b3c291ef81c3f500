# SPDX-License-Identifier: Apache-2.0
"""ViT, ResNet and ConvNeXt: with drawn weights against transformers, files both ways, training, plans, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models import WeightsError, convnext, resnet, vit
from batiste.models.mapping import Table, entries


class Case(NamedTuple):
    build: Callable[..., Any]
    tiny: Any
    load: Callable[..., Any]
    save: Callable[..., Any]
    table: Table
    rules: Any
    reference: type
    settings: Any
    size: int


CASES = {
    "vit": Case(
        vit.Vit, vit.VITS["tiny"], vit.load_vit, vit.save_vit, vit.VIT, vit.RULES,
        transformers.ViTForImageClassification,
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
                               image_size=16, patch_size=4, num_labels=10), 16,
    ),
    "resnet": Case(
        resnet.ResNet, resnet.RESNETS["tiny"], resnet.load_resnet, resnet.save_resnet, resnet.RESNET, resnet.RULES,
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=10), 33,
    ),
    "resnet-basic": Case(
        resnet.ResNet, resnet.ResNetConfig((2, 1), (8, 16), "basic", stem=8, classes=10), resnet.load_resnet,
        resnet.save_resnet, resnet.RESNET, resnet.RULES, transformers.ResNetForImageClassification,
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic",
                                  num_labels=10), 32,
    ),
    "convnext": Case(
        convnext.ConvNext, convnext.CONVNEXTS["tiny"], convnext.load_convnext, convnext.save_convnext,
        convnext.CONVNEXT, convnext.RULES, transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], num_labels=10), 32,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def theirs(case: Case) -> Any:
    torch.manual_seed(0)
    model = case.reference(case.settings).eval()
    for name, value in model.state_dict().items():
        if "running_var" in name:
            torch.nn.init.uniform_(value, 0.5, 2.0)
        elif value.is_floating_point():  # also biases, norms and γ, which begin as constants
            torch.nn.init.normal_(value, std=0.3)
    return model


def images(case: Case, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, case.size, case.size, 3)).astype(np.float32)


def logits(reference: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(x.transpose(0, 3, 1, 2).copy())).logits.numpy()


def test_with_drawn_weights_it_computes_what_transformers_computes(case: Case, tmp_path: Path) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    model = case.load(tmp_path)
    for name in ("features", "depths", "channels", "classes"):
        assert getattr(model.config, name, None) == getattr(case.tiny, name, None)
    expected = logits(reference, images(case))
    np.testing.assert_allclose(model(images(case)), expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_it_is_saved_under_their_names_and_read_by_them(case: Case, tmp_path: Path) -> None:
    model = case.build(case.tiny, rngs=nnx.Rngs(0))
    model.eval()
    case.save(model, tmp_path)
    assert case.load(tmp_path).config == model.config
    found, told = case.reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] or all("num_batches" in name for name in told["missing_keys"])
    np.testing.assert_allclose(model(images(case)), logits(found.eval(), images(case)), rtol=1e-4, atol=1e-5)


def test_it_trains(case: Case) -> None:
    model = case.build(case.tiny, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x, labels = jnp.asarray(images(case, 8)), jnp.arange(8)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_table_and_the_rules_speak_of_all(case: Case) -> None:
    make = lambda: case.build(case.tiny, rngs=nnx.Rngs(0))
    names = {name for entry in entries(make(), case.table) for name, _ in entry.parts()}
    with_names = {name for name in theirs(case).state_dict() if "num_batches" not in name}
    assert len(names) == len(with_names)
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=case.rules, strict=True,
                         names={"heads": "tensor", "mlp": "tensor", "classes": "tensor"})  # fmt: skip
    assert "no rule" not in str(sharding.explain_sharding(make, plan))


PUBLISHED = [
    (vit.Vit, vit.VITS["vit-b16"], 86_567_656),
    (vit.Vit, vit.VITS["vit-b32"], 88_224_232),
    (vit.Vit, vit.VITS["vit-l16"], 304_326_632),
    (resnet.ResNet, resnet.RESNETS["resnet-18"], 11_689_512),
    (resnet.ResNet, resnet.RESNETS["resnet-34"], 21_797_672),
    (resnet.ResNet, resnet.RESNETS["resnet-50"], 25_557_032),
    (resnet.ResNet, resnet.RESNETS["resnet-101"], 44_549_160),
    (resnet.ResNet, resnet.RESNETS["resnet-152"], 60_192_808),
    (convnext.ConvNext, convnext.CONVNEXTS["convnext-tiny"], 28_589_128),
    (convnext.ConvNext, convnext.CONVNEXTS["convnext-base"], 88_591_464),
    (convnext.ConvNext, convnext.CONVNEXTS["convnext-large"], 197_767_336),
]


@pytest.mark.parametrize(("build", "config", "parameters"), PUBLISHED, ids=[str(row[2]) for row in PUBLISHED])
def test_published_configurations_have_the_published_number_of_parameters(build, config, parameters) -> None:
    model = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


def test_blocks_are_left_out_and_values_dropped_in_training_alone() -> None:
    config = convnext.ConvNextConfig((1, 2), (8, 16), classes=10, drop_path=0.9)
    wanting = convnext.ConvNext(config, rngs=nnx.Rngs(0))
    for stage in wanting.stages:
        for block in stage.blocks:
            block.gamma[...] = jnp.ones_like(block.gamma[...])
    dropping = vit.Vit(vit.VitConfig(16, 4, 16, 2, 4, 24, classes=10, dropout=0.5), rngs=nnx.Rngs(0))
    for model, size in ((wanting, 32), (dropping, 16)):
        x = jnp.ones((8, size, size, 3))
        assert len(np.unique(np.asarray(model(x)).round(4), axis=0)) > 1
        model.eval()
        assert len(np.unique(np.asarray(model(x)).round(4), axis=0)) == 1


def test_what_is_wrong_is_said(case: Case, tmp_path: Path) -> None:
    model = case.build(case.tiny, rngs=nnx.Rngs(0))
    with pytest.raises(ShapeError, match="channels last"):
        model(jnp.zeros((1, 3, 32, 32)))
    case.save(model, tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    first = next(iter(about.keys() & {"hidden_size", "hidden_sizes"}))
    wrong = (({"model_type": "llama"}, "of an architecture"), ({"hidden_act": "tanh"}, "hidden_act"),
             ({first: "16"}, "do not describe"))  # fmt: skip
    for changes, message in wrong:
        (tmp_path / "config.json").write_text(json.dumps({**about, **changes}))
        with pytest.raises(WeightsError, match=message):
            case.load(tmp_path)


def test_sizes_that_do_not_fit_are_said() -> None:
    with pytest.raises(ShapeError, match="resize the images"):
        vit.Vit(vit.VITS["tiny"], rngs=nnx.Rngs(0))(jnp.zeros((1, 20, 20, 3)))
    with pytest.raises(ArgumentError, match="choose divisors"):
        vit.VitConfig(16, 5, 16, 2, 4, 24)
    with pytest.raises(ArgumentError, match="patch is a size"):
        vit.VitConfig(16, 0, 16, 2, 4, 24)
    with pytest.raises(ArgumentError, match="bottleneck or basic"):
        resnet.ResNetConfig((1, 1), (8, 16), "wide")
    with pytest.raises(ArgumentError, match="as many depths"):
        convnext.ConvNextConfig((1, 1), (8, 16, 32))
