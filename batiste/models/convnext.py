# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt: image classifiers of convolutions alone, built as transformers are.

x = norm(stem(images));  x = x + γ block(x), stage by stage;  logits = head(norm(mean of x))

Dims, in the suffixes of names:  B batch   Y rows   X columns   C channels   K classes

Source: Liu et al. 2022, "A ConvNet for the 2020s", figure 4 and table 9; Touvron et al. 2021, "Going deeper with Image
    Transformers", eq. 4 (γ).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import List, Module, Param, Rngs, data, make
from batiste.graph.errors import ArgumentError
from batiste.nn.initializers import constant

from .images import check_images, drop_path
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings, labels

RULES = (
    ("up/kernel", (None, "mlp")),
    ("up/bias", ("mlp",)),
    ("down/kernel", ("mlp", None)),
    ("head/kernel", (None, "classes")),
    ("{kernel,scale,bias,gamma}", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`."""

STAGE = "convnext.encoder.stages.{}."
CONVNEXT = Table({
    f"{ours}/{p}": f"{theirs}.{'bias' if p == 'bias' else 'weight'}"
    for ours, theirs, kind in (
        ("stem", "convnext.embeddings.patch_embeddings", "kernel"),
        ("stem_norm", "convnext.embeddings.layernorm", "scale"),
        ("stages/{}/norm", STAGE + "downsampling_layer.0", "scale"),
        ("stages/{}/halve", STAGE + "downsampling_layer.1", "kernel"),
        ("stages/{}/blocks/{}/depthwise", STAGE + "layers.{}.dwconv", "kernel"),
        ("stages/{}/blocks/{}/norm", STAGE + "layers.{}.layernorm", "scale"),
        ("stages/{}/blocks/{}/up", STAGE + "layers.{}.pwconv1", "kernel"),
        ("stages/{}/blocks/{}/down", STAGE + "layers.{}.pwconv2", "kernel"),
        ("norm", "convnext.layernorm", "scale"),
        ("head", "classifier", "kernel"),
    ) for p in (kind, "bias")
} | {"stages/{}/blocks/{}/gamma": STAGE + "layers.{}.layer_scale_parameter"})  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints of classifiers."""

SETTINGS = Settings("convnext", {"channels": "hidden_sizes", "depths": "depths", "epsilon": "layer_norm_eps",
                                 "drop_path": "drop_path_rate"},
                    {"hidden_act": "gelu", "patch_size": 4, "num_channels": 3})  # fmt: skip
EPSILON = 1e-6  # of all norms but the last


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """The sizes of a classifier.

    Args:
        depths, channels: blocks of each stage, and their channels.
        classes: how many.
        drop_path: in training, the share of images that skip the last block; it grows from 0 with depth.
        epsilon: of the last LayerNorm.

    Raises:
        ArgumentError: stages that are not as many, or sizes below one.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    channels: tuple[int, ...] = (96, 192, 384, 768)
    classes: int = 1000
    drop_path: float = 0.0
    epsilon: float = 1e-12

    def __post_init__(self):
        if len(self.depths) != len(self.channels) or min(*self.depths, *self.channels, self.classes) < 1:
            raise ArgumentError("a ConvNeXt has channels for each stage", got=str(self),
                                expected="as many depths as channels")  # fmt: skip


CONVNEXTS = {
    "tiny": ConvNextConfig((1, 2), (8, 16), classes=10),
    "convnext-tiny": ConvNextConfig(),
    "convnext-small": ConvNextConfig((3, 3, 27, 3)),
    "convnext-base": ConvNextConfig((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext-large": ConvNextConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
}
"""Published configurations, and `tiny` for trying."""


class ConvNext(Module):
    """logits[B, K] of images[B, Y, X, 3], which `images.prepared(picture, 224)` makes of pictures

    >>> model = ConvNext(CONVNEXTS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)
    """

    def __init__(self, config: ConvNextConfig, *, rngs: Rngs):
        self.config = config
        sizes, blocks = (config.channels[0], *config.channels), sum(config.depths)
        self.stem = nn.Conv(3, sizes[0], (4, 4), 4, padding="VALID", rngs=rngs)
        self.stem_norm = nn.LayerNorm(sizes[0], epsilon=EPSILON, rngs=rngs)
        before = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.stages = List(
            Stage(a, b, [config.drop_path * (start + i) / max(blocks - 1, 1) for i in range(depth)], rngs=rngs)
            for a, b, depth, start in zip(sizes, config.channels, config.depths, before)
        )
        self.norm = nn.LayerNorm(sizes[-1], epsilon=config.epsilon, rngs=rngs)
        self.head = nn.Linear(sizes[-1], config.classes, rngs=rngs)

    def __call__(self, images_BYX3: Array) -> Array:
        return self.head(self.norm(self.features(images_BYX3).mean((1, 2))))

    def features(self, images_BYX3: Array) -> Array:
        """x[B, Y / 32, X / 32, C] before the mean"""
        check_images(self, images_BYX3)
        x_BYXC = self.stem_norm(self.stem(images_BYX3))
        for stage in self.stages:
            x_BYXC = stage(x_BYXC)
        return x_BYXC


class Stage(Module):
    """x = halve(norm(x)), where the channels change;  x = block(x) for each block"""

    def __init__(self, inputs: int, outputs: int, drops: list[float], *, rngs: Rngs):
        changes = inputs != outputs
        self.norm = data(nn.LayerNorm(inputs, epsilon=EPSILON, rngs=rngs) if changes else None)
        self.halve = data(nn.Conv(inputs, outputs, (2, 2), 2, padding="VALID", rngs=rngs) if changes else None)
        self.blocks = List(Block(outputs, drop, rngs=rngs) for drop in drops)

    def __call__(self, x_BYXC: Array) -> Array:
        if self.norm is not None and self.halve is not None:
            x_BYXC = self.halve(self.norm(x_BYXC))
        for block in self.blocks:
            x_BYXC = block(x_BYXC)
        return x_BYXC


class Block(Module):
    """x + γ down(gelu(up(norm(depthwise(x)))))"""

    def __init__(self, channels: int, drop: float, *, rngs: Rngs):
        self.depthwise = nn.Conv(channels, channels, (7, 7), padding=3, feature_group_count=channels, rngs=rngs)
        self.norm = nn.LayerNorm(channels, epsilon=EPSILON, rngs=rngs)
        self.up = nn.Linear(channels, 4 * channels, rngs=rngs)
        self.down = nn.Linear(4 * channels, channels, rngs=rngs)
        self.gamma = make(Param, constant(1e-6), (channels,), jnp.float32, rngs.params)
        self.drop = drop_path(drop, rngs)

    def __call__(self, x_BYXC: Array) -> Array:
        y_BYXC = self.down(nn.gelu(self.up(self.norm(self.depthwise(x_BYXC))), approximate=False))
        y_BYXC = y_BYXC * self.gamma.astype(y_BYXC.dtype)[None, None, None]
        return x_BYXC + (y_BYXC if self.drop is None else self.drop(y_BYXC))


# ---------------------------------------------------------------- files
FILES = Published(ConvNext, ConvNextConfig, SETTINGS, CONVNEXT, "classifier.bias")


def load_convnext(path: str | Path, config: ConvNextConfig | None = None, *,
                  dtype: DTypeLike = jnp.float32) -> ConvNext:  # fmt: skip
    """A classifier with the weights of a folder or a file; it does not drop until `model.train()`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_convnext(model: ConvNext, folder: str | Path, *, dtype: DTypeLike | None = None,
                  shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    more = {"num_stages": len(model.config.depths), **labels(model.config.classes)}
    return FILES.save(model, folder, dtype, shard_bytes, **more)
