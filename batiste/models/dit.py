# SPDX-License-Identifier: Apache-2.0
"""DiT: a transformer over the patches of a noisy picture that says what is noise in it.

c = times(t) + classes(y);  x = patches(image) + positions;  x = block(x, c) for each block;  image = last(x, c)

Dims, in the suffixes of names:  B batch   Y rows   X columns   C channels   T patches   D features   E channels out

Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", figure 3 and table 1.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from batiste import nn
from batiste.graph import Module, Rngs
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn.initializers import normal, zeros
from batiste.nn.stack import Stack

from . import blocks
from .blocks import Attention, Mlp
from .images import check_images
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings
from .times import LONGEST, Times

RULES = (
    *blocks.RULES,
    ("modulation/kernel", (..., "mlp")),
    ("modulation/bias", (..., "mlp")),
    ("{kernel,bias,embedding}", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`."""

EMBEDDER = "transformer_blocks.0.norm1.emb."
DIT = Table({
    f"{ours}/{p}": f"{theirs}.{'bias' if p == 'bias' else 'weight'}"
    for ours, theirs in (
        ("patches", "pos_embed.proj"),
        ("times/up", EMBEDDER + "timestep_embedder.linear_1"),
        ("times/down", EMBEDDER + "timestep_embedder.linear_2"),
        ("blocks/layers/modulation", "transformer_blocks.{}.norm1.linear"),
        ("blocks/layers/attn/query", "transformer_blocks.{}.attn1.to_q"),
        ("blocks/layers/attn/key", "transformer_blocks.{}.attn1.to_k"),
        ("blocks/layers/attn/value", "transformer_blocks.{}.attn1.to_v"),
        ("blocks/layers/attn/out", "transformer_blocks.{}.attn1.to_out.0"),
        ("blocks/layers/mlp/up", "transformer_blocks.{}.ff.net.0.proj"),
        ("blocks/layers/mlp/down", "transformer_blocks.{}.ff.net.2"),
        ("modulation", "proj_out_1"),
        ("last", "proj_out_2"),
    ) for p in ("kernel", "bias")
} | {"classes/embed/embedding": EMBEDDER + "class_embedder.embedding_table.weight"})  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints, where every block repeats the embeddings of times and classes."""

SETTINGS = Settings("DiTTransformer2DModel", {
    "size": "sample_size", "patch": "patch_size", "channels": "in_channels", "outputs": "out_channels",
    "layers": "num_layers", "heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "classes": "num_embeds_ada_norm", "epsilon": "norm_eps", "dropout": "dropout",
}, {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False}, said_by="_class_name")  # fmt: skip
EPSILON = 1e-6  # of all norms but the MLP's
WAVES = 256


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """The sizes of a model.

    Args:
        size, channels: of a picture (a latent, in the published models), and of the squares it is cut into, `patch`.
        outputs: channels of the prediction; twice as many where the variance is learnt, too.
        layers, heads, head_dim: blocks; of attention.
        classes: how many; the class of this number stands for none.
        drop_class: in training, the share of labels that become none; not said in files.
        epsilon: of the MLP's LayerNorm.
        dropout: in training, after each part of a block.

    Raises:
        ArgumentError: sizes are below one, or the patches do not divide the picture or the positions the features.
    """

    size: int = 32
    patch: int = 2
    layers: int = 28
    heads: int = 16
    head_dim: int = 72
    channels: int = 4
    outputs: int = 8
    classes: int = 1000
    drop_class: float = 0.1
    epsilon: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("size", "patch", "layers", "heads", "head_dim", "channels", "outputs", "classes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"a model's {name} is a size", got=value, expected="1 or more")
        if self.size % self.patch or self.features % 4:
            raise ArgumentError("patches divide the picture, and 4 the features (sine and cosine of row and column)",
                                got=f"{self.patch} for {self.size}, {self.features} features",
                                fix="choose others")  # fmt: skip

    @property
    def features(self) -> int:
        return self.heads * self.head_dim

    def replace(self, **changes) -> DitConfig:
        """The same but for these."""
        return dataclasses.replace(self, **changes)


_SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
DITS = {
    "tiny": DitConfig(8, 2, 2, 2, 8, classes=10),
    **{f"dit-{name}{patch}": DitConfig(32, patch, *sizes) for name, sizes in _SIZES.items() for patch in (2, 4, 8)},
    "dit-xl2-512": DitConfig(64),
}
"""Published configurations (of latents of pictures of 256x256), and `tiny` for trying."""


def positions(rows: int, columns: int, features: int) -> np.ndarray:
    """[sin(x ω), cos(x ω), sin(y ω), cos(y ω)][rows * columns, features],  ω[i] = 10000^(-i / (features / 4))

    Source: Peebles and Xie 2023, section 3.2; the column x comes first in their program.
    """
    omega_W = LONGEST ** -(np.arange(features // 4) / (features / 4))
    y_T, x_T = (grid.reshape(-1) for grid in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    parts = [wave(at_T[:, None] * omega_W) for at_T in (x_T, y_T) for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


class Dit(Module):
    """out[B, Y, X, E] of images[B, Y, X, C] at times[B], from 0 to 1000, with labels[B]

    >>> model = Dit(DITS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 4)), jnp.array([0, 500]), jnp.array([3, 10])).shape
    (2, 8, 8, 8)
    """

    def __init__(self, config: DitConfig, *, rngs: Rngs):
        D, P = config.features, config.patch
        self.config = config
        self.patches = nn.Conv(config.channels, D, (P, P), P, padding="VALID", rngs=rngs)
        self.times = Times(WAVES, D, shift=1, rngs=rngs)
        self.classes = Classes(config.classes, D, config.drop_class, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs=rngs)
        self.modulation = nn.Linear(D, 2 * D, kernel_init=zeros, rngs=rngs)
        self.last = nn.Linear(D, P * P * config.outputs, kernel_init=zeros, rngs=rngs)
        self.norm = _norm(D, EPSILON, rngs)

    def __call__(self, images_BYXC: Array, times_B: ArrayLike, labels_B: ArrayLike) -> Array:
        check_images(self, images_BYXC, self.config.channels)
        (B, Y, X, _), P = images_BYXC.shape, self.config.patch
        if Y % P or X % P:
            raise ShapeError("patches divide the picture", at=self, got=images_BYXC.shape,
                             expected=f"rows and columns that {P} divides", fix="resize the pictures")  # fmt: skip
        x_BTD = self.patches(images_BYXC).reshape(B, -1, self.config.features)
        x_BTD = x_BTD + jnp.asarray(positions(Y // P, X // P, self.config.features), x_BTD.dtype)[None]
        c_BD = self.times(jnp.broadcast_to(jnp.asarray(times_B), (B,)))
        c_BD = nn.silu(c_BD + self.classes(jnp.broadcast_to(jnp.asarray(labels_B), (B,))))
        x_BTD = self.blocks(x_BTD, c_BD)
        shift, scale = _parts(self.modulation(c_BD), 2)
        return self._pictures(self.last(self.norm(x_BTD) * (1 + scale) + shift), Y // P, X // P)

    def _pictures(self, x_BTF: Array, rows: int, columns: int) -> Array:
        P, E = self.config.patch, self.config.outputs
        x_BYXPPE = x_BTF.reshape(-1, rows, columns, P, P, E)
        return x_BYXPPE.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * P, columns * P, E)


class Classes(Module):
    """embed(y)[B, D]; in training, some y become `none`, so that the model learns to do without

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1.
    """

    def __init__(self, classes: int, features: int, drop: float, *, rngs: Rngs):
        self.none = classes
        self.embed = nn.Embed(classes + 1, features, embedding_init=normal(0.02), rngs=rngs)
        self.drop = nn.Dropout(drop, rngs=rngs)

    def __call__(self, labels_B: Array) -> Array:
        kept_B = self.drop(jnp.ones(labels_B.shape)) > 0
        y_BD = self.embed(jnp.where(kept_B, labels_B, self.none))
        return y_BD.astype(self.embed.embedding.dtype)


class Block(Module):
    """y = x + α₁ attn(norm(x) (1 + γ₁) + β₁);  y + α₂ mlp(norm(y) (1 + γ₂) + β₂);  β₁, γ₁, α₁, β₂, γ₂, α₂ of c

    It begins as y = x: the modulation begins as zeros (adaLN-Zero).
    """

    def __init__(self, config: DitConfig, *, rngs: Rngs):
        D = config.features
        self.modulation = nn.Linear(D, 6 * D, kernel_init=zeros, rngs=rngs)
        self.attn_norm = _norm(D, EPSILON, rngs)
        self.attn = Attention(D, config.heads, rngs=rngs)
        self.mlp_norm = _norm(D, config.epsilon, rngs)
        self.mlp = Mlp(D, 4 * D, nn.gelu, rngs=rngs)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x_BTD: Array, c_BD: Array) -> Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = _parts(self.modulation(c_BD), 6)
        x_BTD = x_BTD + gate1 * self.dropout(self.attn(self.attn_norm(x_BTD) * (1 + scale1) + shift1))
        return x_BTD + gate2 * self.dropout(self.mlp(self.mlp_norm(x_BTD) * (1 + scale2) + shift2))


def _norm(features: int, epsilon: float, rngs: Rngs) -> nn.LayerNorm:
    return nn.LayerNorm(features, epsilon=epsilon, use_bias=False, use_scale=False, rngs=rngs)


def _parts(c_BF: Array, n: int) -> list[Array]:
    """n times [B, 1, D]"""
    return jnp.split(c_BF[:, None], n, axis=-1)


# ---------------------------------------------------------------- files
FILES = Published(Dit, DitConfig, SETTINGS, DIT, stem="diffusion_pytorch_model",
                  again="transformer_blocks.{}.norm1.emb.")  # fmt: skip


def load_dit(path: str | Path, config: DitConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Dit:
    """A model with the weights of a folder (`transformer/` of a pipeline) or a file; not in training until `train()`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_dit(model: Dit, folder: str | Path, *, dtype: DTypeLike | None = None,
             shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    return FILES.save(model, folder, dtype, shard_bytes)
