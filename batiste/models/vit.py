# SPDX-License-Identifier: Apache-2.0
"""ViT: a transformer over the patches of an image.

x = [class, patches] + positions;  x = block(x) for each block;  logits = head(norm(x)[class])

Dims, in the suffixes of names:  B batch   Y rows   X columns   T class and patches   D features   F features of MLP
    K classes

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eqs. 1-4.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import Module, Param, Rngs, make
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn.initializers import normal, zeros
from batiste.nn.stack import Stack

from . import blocks
from .blocks import Block, with_first
from .images import check_images
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings, labels

RULES = (
    *blocks.RULES,
    ("head/kernel", (None, "classes")),
    ("{scale,bias,first,positions,kernel}", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`."""

VIT = Table(
    {
        "first": "vit.embeddings.cls_token",
        "positions": "vit.embeddings.position_embeddings",
        "patches/kernel": "vit.embeddings.patch_embeddings.projection.weight",
        "patches/bias": "vit.embeddings.patch_embeddings.projection.bias",
        **{f"blocks/layers/{ours}/{p}": f"vit.encoder.layer.{{}}.{theirs}.{'bias' if p == 'bias' else 'weight'}"
           for ours, theirs, kind in (
               ("attn_norm", "layernorm_before", "scale"),
               ("attn/query", "attention.attention.query", "kernel"),
               ("attn/key", "attention.attention.key", "kernel"),
               ("attn/value", "attention.attention.value", "kernel"),
               ("attn/out", "attention.output.dense", "kernel"),
               ("mlp_norm", "layernorm_after", "scale"),
               ("mlp/up", "intermediate.dense", "kernel"),
               ("mlp/down", "output.dense", "kernel"),
           ) for p in (kind, "bias")},
        "norm/scale": "vit.layernorm.weight",
        "norm/bias": "vit.layernorm.bias",
        "head/kernel": "classifier.weight",
        "head/bias": "classifier.bias",
    },
    ignored=("vit.pooler.*",),
)  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints of classifiers."""

SETTINGS = Settings("vit", {
    "size": "image_size", "patch": "patch_size", "features": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "hidden": "intermediate_size", "epsilon": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
}, {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """The sizes of a classifier.

    Args:
        size, patch: of an image, and of the squares it is cut into.
        features, layers, heads: of the stream; blocks; of attention.
        hidden: features of the MLP.
        classes: how many.
        epsilon: of LayerNorm.
        dropout: in training, after the embeddings and after each part of a block.

    Raises:
        ArgumentError: sizes are below one, the heads do not divide the features, or the patches the image.
    """

    size: int
    patch: int
    features: int
    layers: int
    heads: int
    hidden: int
    classes: int = 1000
    epsilon: float = 1e-12
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("size", "patch", "features", "layers", "heads", "hidden", "classes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"a classifier's {name} is a size", got=value, expected="1 or more")
        if self.features % self.heads or self.size % self.patch:
            raise ArgumentError("heads divide the features, and patches the image",
                                got=f"{self.heads} for {self.features}, {self.patch} for {self.size}",
                                fix="choose divisors")  # fmt: skip

    @property
    def positions(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2


_c = VitConfig
VITS = {
    "tiny": _c(16, 4, 16, 2, 4, 24, classes=10),
    "vit-b16": _c(224, 16, 768, 12, 12, 3072),
    "vit-b32": _c(224, 32, 768, 12, 12, 3072),
    "vit-l16": _c(224, 16, 1024, 24, 16, 4096),
    "vit-h14": _c(224, 14, 1280, 32, 16, 5120),
}
"""Published configurations, and `tiny` for trying."""


class Vit(Module):
    """logits[B, K] of images[B, Y, X, 3], which `images.prepared(picture, config.size, HALVES)` makes of pictures

    >>> model = Vit(VITS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 16, 16, 3))).shape
    (2, 10)
    """

    def __init__(self, config: VitConfig, *, rngs: Rngs):
        D, P = config.features, config.patch
        self.config = config
        self.patches = nn.Conv(3, D, (P, P), P, padding="VALID", rngs=rngs)
        self.first = make(Param, zeros, (1, 1, D), jnp.float32, rngs.params)
        self.positions = make(Param, normal(0.02), (1, config.positions + 1, D), jnp.float32, rngs.params)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: Block(
                D, config.heads, config.hidden, epsilon=config.epsilon, dropout=config.dropout, rngs=rngs
            ),
            config.layers,
            rngs=rngs,
        )
        self.norm = nn.LayerNorm(D, epsilon=config.epsilon, rngs=rngs)
        self.head = nn.Linear(D, config.classes, rngs=rngs)

    def __call__(self, images_BYX3: Array) -> Array:
        return self.head(self.features(images_BYX3)[:, 0])

    def features(self, images_BYX3: Array) -> Array:
        """norm(x)[B, T, D]: first the class, then the patches, row by row"""
        check_images(self, images_BYX3)
        if images_BYX3.shape[1:3] != (self.config.size,) * 2:
            raise ShapeError("positions are those of images of one size", at=self, got=images_BYX3.shape,
                             expected=f"(batch, {self.config.size}, {self.config.size}, 3)",
                             fix="resize the images")  # fmt: skip
        x_BTD = self.patches(images_BYX3).reshape(images_BYX3.shape[0], -1, self.config.features)
        x_BTD = with_first(self.first[...], x_BTD) + self.positions.astype(x_BTD.dtype)
        return self.norm(self.blocks(self.dropout(x_BTD)))


# ---------------------------------------------------------------- files
FILES = Published(Vit, VitConfig, SETTINGS, VIT, "classifier.bias")


def load_vit(path: str | Path, config: VitConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Vit:
    """A classifier with the weights of a folder or a file; it does not drop until `model.train()`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_vit(model: Vit, folder: str | Path, *, dtype: DTypeLike | None = None,
             shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    return FILES.save(model, folder, dtype, shard_bytes, **labels(model.config.classes))
