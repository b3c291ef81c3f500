# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite: small image classifiers, without squeeze-and-excitation, with ReLU6.

x = stem(images);  x = block(x) for each block;  logits = fc(mean over rows and columns of head(x))

Dims, in the suffixes of names:  B batch   Y rows   X columns   C channels   K classes

Source: Tan and Le 2019, "EfficientNet", table 1 and eq. 3; Liu 2020, "Higher accuracy on vision models with
    EfficientNet-Lite" (what is left out for small devices); Sandler et al. 2018, "MobileNetV2", figure 3 (the block).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import List, Module, Rngs, data
from batiste.graph.errors import ArgumentError

from .files import open_weights
from .images import ConvNorm, check_images, conv_norm, drop_path
from .mapping import Table, load, save
from .safetensors import SHARD_BYTES

RULES = (
    ("fc/kernel", (None, "classes")),
    ("fc/bias", ("classes",)),
    ("{kernel,scale,bias}", (...,)),
)
"""Only the classifier has a dim that a `tensor` axis divides; convolutions are divided by the batch, and by `fsdp`."""

EFFICIENTNET = Table(
    {
        **conv_norm("stem", "_conv_stem", "_bn0"),
        **conv_norm("blocks/{}/expand", "_blocks.{}._expand_conv", "_blocks.{}._bn0"),
        **conv_norm("blocks/{}/depthwise", "_blocks.{}._depthwise_conv", "_blocks.{}._bn1"),
        **conv_norm("blocks/{}/project", "_blocks.{}._project_conv", "_blocks.{}._bn2"),
        **conv_norm("head", "_conv_head", "_bn1"),
        "fc/kernel": "_fc.weight",
        "fc/bias": "_fc.bias",
    },
    ignored=("*.num_batches_tracked",),
)
"""Our path -> the name in the PyTorch conversions of the published checkpoints."""

# repeats, size of the kernel, stride, expansion, channels; the first and the last are not repeated more often
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
EPSILON, MOMENTUM = 1e-3, 0.99


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """The sizes of a classifier.

    Args:
        width, depth: factors on the channels and on the repeats of `stages`.
        size: of the images it was trained on; others work.
        classes: how many.
        dropout: in training, before the classifier.
        drop_path: in training, the share of images that skip the last block; it grows from 0 with depth.
        stages: repeats, size of the kernel, stride, expansion and channels of each run of blocks.
        stem, head: channels of the first and the last convolution, whatever the width.

    Raises:
        ArgumentError: a size or a factor is not above zero.
    """

    width: float
    depth: float
    size: int
    dropout: float = 0.2
    classes: int = 1000
    drop_path: float = 0.2
    stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
    stem: int = 32
    head: int = 1280

    def __post_init__(self):
        for name in ("width", "depth", "size", "classes", "stem", "head"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"a classifier's {name} is above zero", got=getattr(self, name))

    def channels(self, published: int) -> int:
        """The multiple of 8 next to width · published, less than a tenth below it

        >>> [EFFICIENTNETS[f"lite{i}"].channels(40) for i in range(5)]
        [40, 40, 48, 48, 56]
        """
        if self.width == 1:
            return published
        wide = self.width * published
        rounded = max(8, int(wide + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wide else rounded

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """Inputs, outputs, expansion, size of the kernel and stride of each block."""
        found, inputs = [], self.stem
        for i, (repeats, size, stride, expansion, published) in enumerate(self.stages):
            outputs = self.channels(published)
            ends = i in (0, len(self.stages) - 1)
            for repeat in range(repeats if ends else math.ceil(self.depth * repeats)):
                found.append((inputs, outputs, expansion, size, 1 if repeat else stride))
                inputs = outputs
        return found


_c = EfficientNetConfig
EFFICIENTNETS = {
    "tiny": _c(1, 1, 32, classes=10, stages=((1, 3, 1, 1, 8), (2, 3, 2, 2, 12), (1, 5, 1, 2, 16)), stem=8, head=24),
    "lite0": _c(1.0, 1.0, 224, 0.2),
    "lite1": _c(1.0, 1.1, 240, 0.2),
    "lite2": _c(1.1, 1.2, 260, 0.3),
    "lite3": _c(1.2, 1.4, 280, 0.3),
    "lite4": _c(1.4, 1.8, 300, 0.3),
}
"""Published configurations, and `tiny` for trying."""


class EfficientNet(Module):
    """logits[B, K] of images[B, Y, X, 3], which `images.prepared(picture, config.size, LITE)` makes of pictures

    >>> model = EfficientNet(EFFICIENTNETS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)
    """

    def __init__(self, config: EfficientNetConfig, *, rngs: Rngs):
        blocks, last = config.blocks(), config.channels(config.stages[-1][-1])
        self.config = config
        self.stem = ConvNorm(3, config.stem, 3, 2, epsilon=EPSILON, momentum=MOMENTUM, rngs=rngs)
        self.blocks = List(MBConv(*sizes, drop=config.drop_path * i / len(blocks), rngs=rngs)
                           for i, sizes in enumerate(blocks))  # fmt: skip
        self.head = ConvNorm(last, config.head, epsilon=EPSILON, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)
        self.fc = nn.Linear(config.head, config.classes, rngs=rngs)

    def __call__(self, images_BYX3: Array) -> Array:
        return self.fc(self.dropout(self.features(images_BYX3).mean((1, 2))))

    def features(self, images_BYX3: Array) -> Array:
        """x[B, Y / 32, X / 32, C] before the mean"""
        check_images(self, images_BYX3)
        x_BYXC = nn.relu6(self.stem(images_BYX3))
        for block in self.blocks:
            x_BYXC = block(x_BYXC)
        return nn.relu6(self.head(x_BYXC))


class MBConv(Module):
    """x + project(relu6(depthwise(relu6(expand(x))))); without `x +` where the size changes"""

    def __init__(self, inputs: int, outputs: int, expansion: int, size: int, stride: int, *, drop: float, rngs: Rngs):
        wide = inputs * expansion
        same = {"epsilon": EPSILON, "momentum": MOMENTUM, "rngs": rngs}
        self.expand = data(ConvNorm(inputs, wide, **same) if expansion > 1 else None)
        self.depthwise = ConvNorm(wide, wide, size, stride, groups=wide, **same)
        self.project = ConvNorm(wide, outputs, **same)
        self.is_added = stride == 1 and inputs == outputs
        self.drop = drop_path(drop if self.is_added else 0.0, rngs)

    def __call__(self, x_BYXC: Array) -> Array:
        y_BYXC = x_BYXC if self.expand is None else nn.relu6(self.expand(x_BYXC))
        y_BYXC = self.project(nn.relu6(self.depthwise(y_BYXC)))
        if not self.is_added:
            return y_BYXC
        return x_BYXC + (y_BYXC if self.drop is None else self.drop(y_BYXC))


# ---------------------------------------------------------------- files
def load_efficientnet(path: str | Path, config: EfficientNetConfig = EFFICIENTNETS["lite0"], *,
                      dtype: DTypeLike = jnp.float32) -> EfficientNet:  # fmt: skip
    """A classifier with the weights of a file; it keeps its statistics, and does not drop, until `model.train()`.

    Raises:
        WeightsError: the file is damaged or incomplete, or of another model; before memory is taken.
    """
    model = load(lambda rngs: EfficientNet(config, rngs=rngs), open_weights(path), EFFICIENTNET, path, dtype=dtype)
    model.eval()
    return model


def save_efficientnet(model: EfficientNet, folder: str | Path, *, dtype: DTypeLike | None = None,
                      shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with the names of PyTorch's conversions into a folder; says which files."""
    return save(model, EFFICIENTNET, folder, dtype=dtype, shard_bytes=shard_bytes)
