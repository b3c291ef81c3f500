# SPDX-License-Identifier: Apache-2.0
"""ResNet v1.5: image classifiers whose blocks add to what they get.

x = pool(relu(stem(images)));  x = relu(shortcut(x) + convs(x)) for each block;  logits = head(mean of x)

Dims, in the suffixes of names:  B batch   Y rows   X columns   C channels   K classes

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1 and figure 5; v1.5: the
    3x3 convolution of a bottleneck has the stride, not the one before it (Goyal et al. 2017, "Accurate, Large Minibatch
    SGD", section 5.1).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import List, Module, Rngs, data
from batiste.graph.errors import ArgumentError

from .images import ConvNorm, check_images, conv_norm
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings, labels

RULES = (("head/kernel", (None, "classes")), ("head/bias", ("classes",)), ("{kernel,scale,bias}", (...,)))
"""Only the classifier has a dim that a `tensor` axis divides; convolutions are divided by the batch, and by `fsdp`."""

BLOCK = "resnet.encoder.stages.{}.layers.{}."
RESNET = Table(
    {
        **conv_norm("stem", "resnet.embedder.embedder.convolution", "resnet.embedder.embedder.normalization"),
        **conv_norm("stages/{}/{}/convs/{}", BLOCK + "layer.{}.convolution", BLOCK + "layer.{}.normalization"),
        **conv_norm("stages/{}/{}/shortcut", BLOCK + "shortcut.convolution", BLOCK + "shortcut.normalization"),
        "head/kernel": "classifier.1.weight",
        "head/bias": "classifier.1.bias",
    },
    ignored=("*.num_batches_tracked",),
)
"""Our path -> the name in Hugging Face's checkpoints of classifiers."""

SETTINGS = Settings("resnet", {"stem": "embedding_size", "channels": "hidden_sizes", "depths": "depths",
                               "block": "layer_type"},
                    {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False,
                     "num_channels": 3})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The sizes of a classifier.

    Args:
        depths, channels: blocks of each stage, and what they give.
        block: `bottleneck`, convolutions of 1x1, 3x3 and 1x1 with a quarter of the channels; `basic`, two of 3x3.
        stem: channels of the first convolution.
        classes: how many.

    Raises:
        ArgumentError: an unknown block, stages that are not as many, or sizes below one.
    """

    depths: tuple[int, ...]
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    block: str = "bottleneck"
    stem: int = 64
    classes: int = 1000

    def __post_init__(self):
        sizes = (*self.depths, *self.channels, self.stem, self.classes)
        if len(self.depths) != len(self.channels) or min(sizes) < 1 or self.block not in ("bottleneck", "basic"):
            raise ArgumentError("a ResNet has channels for each stage", got=str(self),
                                expected="as many depths as channels, a block that is bottleneck or basic")  # fmt: skip


_basic = {"channels": (64, 128, 256, 512), "block": "basic"}
RESNETS = {
    "tiny": ResNetConfig((1, 2), (16, 32), stem=8, classes=10),
    "resnet-18": ResNetConfig((2, 2, 2, 2), **_basic),
    "resnet-34": ResNetConfig((3, 4, 6, 3), **_basic),
    "resnet-50": ResNetConfig((3, 4, 6, 3)),
    "resnet-101": ResNetConfig((3, 4, 23, 3)),
    "resnet-152": ResNetConfig((3, 8, 36, 3)),
}
"""Published configurations, and `tiny` for trying."""


class ResNet(Module):
    """logits[B, K] of images[B, Y, X, 3], which `images.prepared(picture, 224)` makes of pictures

    >>> model = ResNet(RESNETS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)
    """

    def __init__(self, config: ResNetConfig, *, rngs: Rngs):
        self.config = config
        self.stem = ConvNorm(3, config.stem, 7, 2, even=True, rngs=rngs)
        sizes = (config.stem, *config.channels)
        self.stages = List(
            List(Block(config.block, b if i else a, b, 2 if stage and not i else 1, rngs=rngs) for i in range(depth))
            for stage, (a, b, depth) in enumerate(zip(sizes, config.channels, config.depths))
        )
        self.head = nn.Linear(sizes[-1], config.classes, rngs=rngs)

    def __call__(self, images_BYX3: Array) -> Array:
        return self.head(self.features(images_BYX3).mean((1, 2)))

    def features(self, images_BYX3: Array) -> Array:
        """x[B, Y / 32, X / 32, C] before the mean"""
        check_images(self, images_BYX3)
        x_BYXC = nn.relu(self.stem(images_BYX3))
        x_BYXC = nn.max_pool(x_BYXC, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            for block in stage:
                x_BYXC = block(x_BYXC)
        return x_BYXC


class Block(Module):
    """relu(shortcut(x) + convs(x)), relu between the convolutions"""

    def __init__(self, kind: str, inputs: int, outputs: int, stride: int, *, rngs: Rngs):
        narrow = outputs // 4
        shapes = ((inputs, narrow, 1, 1), (narrow, narrow, 3, stride), (narrow, outputs, 1, 1)) \
            if kind == "bottleneck" else ((inputs, outputs, 3, stride), (outputs, outputs, 3, 1))  # fmt: skip
        self.convs = List(ConvNorm(*shape, even=True, rngs=rngs) for shape in shapes)
        changes = stride > 1 or inputs != outputs
        self.shortcut = data(ConvNorm(inputs, outputs, 1, stride, even=True, rngs=rngs) if changes else None)

    def __call__(self, x_BYXC: Array) -> Array:
        y_BYXC = x_BYXC
        for i, conv in enumerate(self.convs):
            y_BYXC = conv(nn.relu(y_BYXC) if i else y_BYXC)
        return nn.relu((x_BYXC if self.shortcut is None else self.shortcut(x_BYXC)) + y_BYXC)


# ---------------------------------------------------------------- files
FILES = Published(ResNet, ResNetConfig, SETTINGS, RESNET, "classifier.1.bias")


def load_resnet(path: str | Path, config: ResNetConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> ResNet:
    """A classifier with the weights of a folder or a file; it keeps its statistics until `model.train()`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_resnet(model: ResNet, folder: str | Path, *, dtype: DTypeLike | None = None,
                shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    return FILES.save(model, folder, dtype, shard_bytes, **labels(model.config.classes))
