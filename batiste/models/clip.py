# SPDX-License-Identifier: Apache-2.0
"""CLIP: images and texts as vectors of one space, in which what belongs together is close.

image = normed(projection(norm(x)[class]));  text = normed(projection(norm(x)[end]));  logits = exp(scale) image · text

Dims, in the suffixes of names:  B images   N texts   Y rows   X columns   T tokens, or class and patches   D features
    P features of both

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
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
from batiste.nn.initializers import constant, normal
from batiste.nn.stack import Stack

from . import blocks
from .blocks import Block, with_first
from .images import check_images
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings

RULES = (
    *blocks.RULES,
    ("token/embedding", ("vocab", None)),
    ("{scale,bias,first,kernel,embedding}", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`."""

CLIP = Table(
    {
        "scale": "logit_scale",
        "image/first": "vision_model.embeddings.class_embedding",
        "image/patches/kernel": "vision_model.embeddings.patch_embedding.weight",
        "image/position/embedding": "vision_model.embeddings.position_embedding.weight",
        "text/token/embedding": "text_model.embeddings.token_embedding.weight",
        "text/position/embedding": "text_model.embeddings.position_embedding.weight",
        "image/projection/kernel": "visual_projection.weight",
        "text/projection/kernel": "text_projection.weight",
        **{f"{ours}/{p}": f"{theirs}.{'bias' if p == 'bias' else 'weight'}" for ours, theirs in (
            ("image/first_norm", "vision_model.pre_layrnorm"),
            ("image/norm", "vision_model.post_layernorm"),
            ("text/norm", "text_model.final_layer_norm"),
        ) for p in ("scale", "bias")},
        **{f"{tower}/blocks/layers/{ours}/{p}":
           f"{name}_model.encoder.layers.{{}}.{theirs}.{'bias' if p == 'bias' else 'weight'}"
           for tower, name in (("image", "vision"), ("text", "text"))
           for ours, theirs, kind in (
               ("attn_norm", "layer_norm1", "scale"), ("mlp_norm", "layer_norm2", "scale"),
               ("attn/query", "self_attn.q_proj", "kernel"), ("attn/key", "self_attn.k_proj", "kernel"),
               ("attn/value", "self_attn.v_proj", "kernel"), ("attn/out", "self_attn.out_proj", "kernel"),
               ("mlp/up", "mlp.fc1", "kernel"), ("mlp/down", "mlp.fc2", "kernel"),
           ) for p in (kind, "bias")},
    },
    ignored=("*.position_ids",),
)  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints."""

PARTS = {"features": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
         "hidden": "intermediate_size"}  # fmt: skip
SETTINGS = Settings("clip", {
    "projection": "projection_dim", "size": "vision_config.image_size", "patch": "vision_config.patch_size",
    "vocab": "text_config.vocab_size", "length": "text_config.max_position_embeddings",
    **{f"image_{ours}": f"vision_config.{theirs}" for ours, theirs in PARTS.items()},
    **{f"text_{ours}": f"text_config.{theirs}" for ours, theirs in PARTS.items()},
}, {"vision_config.hidden_act": "quick_gelu", "text_config.hidden_act": "quick_gelu"})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The sizes of both towers.

    Args:
        size, patch: of an image, and of the squares it is cut into.
        image_features, image_layers, image_heads, image_hidden: of the stream; blocks; of attention; of the MLP.
        vocab, length: tokens, and the most of a text.
        text_features, text_layers, text_heads, text_hidden: as for images.
        projection: features of the vectors.

    Raises:
        ArgumentError: sizes are below one, the heads do not divide the features, or the patches the image.
    """

    size: int = 224
    patch: int = 32
    image_features: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_hidden: int = 3072
    vocab: int = 49408
    length: int = 77
    text_features: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_hidden: int = 2048
    projection: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"a tower's {field.name} is a size", got=value, expected="1 or more")
        pairs = (
            (self.size, self.patch),
            (self.image_features, self.image_heads),
            (self.text_features, self.text_heads),
        )
        if any(whole % part for whole, part in pairs):
            raise ArgumentError("heads divide the features, and patches the image", got=str(pairs),
                                fix="choose divisors")  # fmt: skip


CLIPS = {
    "tiny": ClipConfig(16, 4, 16, 2, 4, 24, 30, 8, 12, 2, 2, 20, 10),
    "clip-vit-b32": ClipConfig(),
    "clip-vit-b16": ClipConfig(patch=16),
    "clip-vit-l14": ClipConfig(224, 14, 1024, 24, 16, 4096, text_features=768, text_heads=12, text_hidden=3072,
                               projection=768),
}  # fmt: skip
"""Published configurations, and `tiny` for trying."""


class Clip(Module):
    """logits[B, N]: how well each text fits each image

    Images are made by `images.prepared(picture, config.size, CLIP_COLOURS, crop=1)`.

    >>> model = Clip(CLIPS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 16, 16, 3)), jnp.array([[1, 5, 29, 0], [1, 29, 0, 0], [1, 7, 8, 29]])).shape
    (2, 3)
    """

    def __init__(self, config: ClipConfig, *, rngs: Rngs):
        self.config = config
        self.image = ImageTower(config, rngs=rngs)
        self.text = TextTower(config, rngs=rngs)
        self.scale = make(Param, constant(2.6592), (), jnp.float32, rngs.params)  # log 1 / 0.07

    def __call__(self, images_BYX3: Array, tokens_NT: Array) -> Array:
        return jnp.exp(self.scale[...]) * self.image(images_BYX3) @ self.text(tokens_NT).T

    def loss(self, images_BYX3: Array, tokens_BT: Array) -> Array:
        """Mean of -log softmax(logits)[i, i], over texts and over images: each image fits its own text."""
        logits_BB = self(images_BYX3, tokens_BT)
        own_B = jnp.arange(logits_BB.shape[0])
        own_2B = jnp.stack([nn.log_softmax(logits_BB, axis)[own_B, own_B] for axis in (0, 1)])
        return -own_2B.mean()


class ImageTower(Module):
    """projection(norm(blocks(first_norm([class, patches] + positions)))[class]), of length 1: [B, P]"""

    def __init__(self, config: ClipConfig, *, rngs: Rngs):
        D, P = config.image_features, config.patch
        self.size = config.size
        self.patches = nn.Conv(3, D, (P, P), P, padding="VALID", use_bias=False, rngs=rngs)
        self.first = make(Param, normal(0.02), (D,), jnp.float32, rngs.params)
        self.position = nn.Embed((config.size // P) ** 2 + 1, D, rngs=rngs)
        self.first_norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(D, config.image_heads, config.image_hidden, activation=quick_gelu,
                                               rngs=rngs), config.image_layers, rngs=rngs)  # fmt: skip
        self.norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.projection = nn.Linear(D, config.projection, use_bias=False, rngs=rngs)

    def __call__(self, images_BYX3: Array) -> Array:
        check_images(self, images_BYX3)
        if images_BYX3.shape[1:3] != (self.size, self.size):
            raise ShapeError("positions are those of images of one size", at=self, got=images_BYX3.shape,
                             expected=f"(batch, {self.size}, {self.size}, 3)", fix="resize the images")  # fmt: skip
        x_BTD = self.patches(images_BYX3)
        x_BTD = with_first(self.first[...][None, None], x_BTD.reshape(x_BTD.shape[0], -1, x_BTD.shape[-1]))
        x_BTD = x_BTD + self.position(jnp.arange(x_BTD.shape[1])[None])
        return normed(self.projection(self.norm(self.blocks(self.first_norm(x_BTD))[:, 0])))


class TextTower(Module):
    """projection(norm(blocks(tokens + positions))[end]), of length 1: [N, P]; the end is the first of the largest token

    What follows it is not looked at.
    """

    def __init__(self, config: ClipConfig, *, rngs: Rngs):
        D = config.text_features
        self.length = config.length
        self.token = nn.Embed(config.vocab, D, rngs=rngs)
        self.position = nn.Embed(config.length, D, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(D, config.text_heads, config.text_hidden, activation=quick_gelu,
                                               rngs=rngs), config.text_layers, rngs=rngs)  # fmt: skip
        self.norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.projection = nn.Linear(D, config.projection, use_bias=False, rngs=rngs)

    def __call__(self, tokens_NT: Array) -> Array:
        if tokens_NT.ndim != 2 or tokens_NT.shape[1] > self.length:
            raise ShapeError("a text is a row of tokens", at=self, got=tokens_NT.shape,
                             expected=f"(texts, length ≤ {self.length})", fix="cut longer texts")  # fmt: skip
        texts, length = tokens_NT.shape
        x_NTD = self.token(tokens_NT) + self.position(jnp.arange(length)[None])
        past_11TT = jnp.tril(jnp.ones((1, 1, length, length), bool))
        x_NTD = self.norm(self.blocks(x_NTD, past_11TT))
        return normed(self.projection(x_NTD[jnp.arange(texts), tokens_NT.argmax(-1)]))


def quick_gelu(x: Array) -> Array:
    """x σ(1.702 x)

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
    """
    return x * nn.sigmoid(1.702 * x)


def normed(x: Array) -> Array:
    """x / |x|, of the last dim"""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# ---------------------------------------------------------------- files
FILES = Published(Clip, ClipConfig, SETTINGS, CLIP)


def load_clip(path: str | Path, config: ClipConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Clip:
    """Both towers with the weights of a folder or a file.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_clip(model: Clip, folder: str | Path, *, dtype: DTypeLike | None = None,
              shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    return FILES.save(model, folder, dtype, shard_bytes, **{"text_config.eos_token_id": model.config.vocab - 1})
