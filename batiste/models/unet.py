# SPDX-License-Identifier: Apache-2.0
"""UNet of diffusion: convolutions on ever coarser levels and back, that say what is noise in a picture.

x = stem(image);  x = down(x, c) level by level, kept on the way;  x = middle(x, c)
x = up([x, kept], c) level by level;  image = head(silu(norm(x)));  c = times(t) + classes(y)

Dims, in the suffixes of names:  B batch   Y rows   X columns   C channels   T places   D features of c

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B; Ronneberger et al. 2015, "U-Net".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from batiste import nn
from batiste.graph import List, Module, Rngs, data
from batiste.graph.errors import ArgumentError, ShapeError

from .blocks import Attention
from .images import check_images
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings
from .times import Times

RULES = (("{kernel,scale,bias,embedding}", (...,)),)
"""Nothing is for a `tensor` axis: the published models have one head. They are divided by the batch, and by `fsdp`."""

PARTS = (("norm1", "norm1", "scale"), ("conv1", "conv1", "kernel"), ("time", "time_emb_proj", "kernel"),
         ("norm2", "norm2", "scale"), ("conv2", "conv2", "kernel"),
         ("shortcut", "conv_shortcut", "kernel"))  # fmt: skip
LOOKS = (("norm", "group_norm", "scale"), ("attn/query", "to_q", "kernel"), ("attn/key", "to_k", "kernel"),
         ("attn/value", "to_v", "kernel"), ("attn/out", "to_out.0", "kernel"))  # fmt: skip
LEVELS = (("down/{}", "down_blocks.{}"), ("up/{}", "up_blocks.{}"), ("middle", "mid_block"))
UNET = Table({
    f"{ours}/{p}": f"{theirs}.{'bias' if p == 'bias' else 'weight'}"
    for ours, theirs, kind in (
        ("stem", "conv_in", "kernel"),
        ("times/up", "time_embedding.linear_1", "kernel"), ("times/down", "time_embedding.linear_2", "kernel"),
        *((f"{a}/blocks/{{}}/{ours}", f"{b}.resnets.{{}}.{theirs}", kind)
          for a, b in LEVELS for ours, theirs, kind in PARTS),
        *((f"{a}/attentions/{{}}/{ours}", f"{b}.attentions.{{}}.{theirs}", kind)
          for a, b in LEVELS for ours, theirs, kind in LOOKS),
        ("down/{}/halve", "down_blocks.{}.downsamplers.0.conv", "kernel"),
        ("up/{}/double", "up_blocks.{}.upsamplers.0.conv", "kernel"),
        ("norm", "conv_norm_out", "scale"), ("head", "conv_out", "kernel"),
    ) for p in (kind, "bias")
} | {"classes/embedding": "class_embedding.weight"})  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints."""

OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
SETTINGS = Settings("UNet2DModel", {
    "size": "sample_size", "channels": "in_channels", "outputs": "out_channels", "widths": "block_out_channels",
    "depth": "layers_per_block", "down_types": "down_block_types", "up_types": "up_block_types",
    "head_dim": "attention_head_dim", "groups": "norm_num_groups", "epsilon": "norm_eps", "dropout": "dropout",
    "padding": "downsample_padding", "labels": "num_class_embeds", "cosine_first": "flip_sin_to_cos",
    "shift": "freq_shift",
}, {"act_fn": "silu", "center_input_sample": False, "time_embedding_type": "positional", "add_attention": True,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2D", "time_embedding_dim": None,
    "downsample_type": "conv", "upsample_type": "conv", "attn_norm_num_groups": None, "class_embed_type": None,
    "resnet_time_scale_shift": "default"}, said_by="_class_name")  # fmt: skip
PLAIN, LOOKING = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UnetConfig:
    """The sizes of a model.

    Args:
        size: of the pictures it learnt of; it takes all that can be halved as often as there are levels.
        widths: channels of each level, from fine to coarse.
        looking: the levels, from 0, in which attention follows each block.
        depth: blocks of each level on the way down; there is one more on the way up.
        channels, outputs: of a picture, and of the prediction.
        groups: of GroupNorm.
        head_dim: features of a head of attention; None for one head.
        labels: how many labels there are, with the one that stands for none; None if the model takes none.
        epsilon: of GroupNorm.
        dropout: in training, within blocks.
        padding: where pictures are halved: 1 on all sides, or 0: at the end alone.
        cosine_first, shift: of the waves of time.

    Raises:
        ArgumentError: sizes are below one, a level does not exist, or the groups or heads do not divide the widths.
    """

    size: int | None = 32
    widths: tuple[int, ...] = (128, 256, 256, 256)
    looking: tuple[int, ...] = (1,)
    depth: int = 2
    channels: int = 3
    outputs: int = 3
    groups: int = 32
    head_dim: int | None = None
    labels: int | None = None
    epsilon: float = 1e-6
    dropout: float = 0.0
    padding: int = 0
    cosine_first: bool = False
    shift: int = 1

    def __post_init__(self):
        optional = [n for n in (self.size, self.head_dim, self.labels) if n is not None]
        sizes = (*self.widths, self.depth, self.channels, self.outputs, self.groups, *optional)
        levels = range(len(self.widths))
        if not all(type(n) is int and n > 0 for n in sizes) or not {*self.looking} <= {*levels}:
            raise ArgumentError("a UNet has levels with a width each", got=str(self),
                                expected="sizes of 1 or more, looking levels that exist")  # fmt: skip
        odd = [n for n in self.widths if n % self.groups or n % (self.head_dim or n)]
        if odd or self.padding not in (0, 1) or self.widths[0] % 2:
            raise ArgumentError("groups, heads and pairs of waves divide the widths", got=str(self),
                                expected="such widths, and a padding of 0 or 1")  # fmt: skip

    @property
    def down_types(self) -> list[str]:
        return [(LOOKING if level in self.looking else PLAIN)[0] for level in range(len(self.widths))]

    @property
    def up_types(self) -> list[str]:
        return [(LOOKING if level in self.looking else PLAIN)[1] for level in reversed(range(len(self.widths)))]

    def replace(self, **changes) -> UnetConfig:
        """The same but for these."""
        return dataclasses.replace(self, **changes)


UNETS = {
    "tiny": UnetConfig(8, (8, 16), (1,), 1, groups=4, head_dim=8, labels=11),
    "ddpm-cifar10-32": UnetConfig(dropout=0.1),
    "ddpm-celebahq-256": UnetConfig(256, (128, 128, 256, 256, 512, 512), (4,)),
}
"""Published configurations (the second is also that of churches and bedrooms), and `tiny` for trying."""


class Unet(Module):
    """out[B, Y, X, E] of images[B, Y, X, C] at times[B], from 0 to 1000, with labels[B] if it was made for labels

    >>> model = Unet(UNETS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 3)), jnp.array([0, 500]), jnp.array([3, 10])).shape
    (2, 8, 8, 3)
    """

    def __init__(self, config: UnetConfig, *, rngs: Rngs):
        widths, D = config.widths, 4 * config.widths[0]
        self.config = config
        self.stem = nn.Conv(config.channels, widths[0], (3, 3), padding=1, rngs=rngs)
        self.times = Times(widths[0], D, sine_first=not config.cosine_first, shift=config.shift, rngs=rngs)
        self.classes = data(None if config.labels is None else nn.Embed(config.labels, D, rngs=rngs))
        self.down, kept = List([]), [widths[0]]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            ways = [(kept[-1] if i == 0 else width, width) for i in range(config.depth)]
            self.down.append(Level(config, ways, level in config.looking, "" if last else "halve", rngs=rngs))
            kept += [width] * (config.depth + (not last))
        self.middle = Middle(config, widths[-1], rngs=rngs)
        self.up, before = List([]), widths[-1]
        for level, width in reversed([*enumerate(widths)]):
            ways = [((before if i == 0 else width) + kept.pop(), width) for i in range(config.depth + 1)]
            self.up.append(Level(config, ways, level in config.looking, "double" if level else "", rngs=rngs))
            before = width
        self.norm = nn.GroupNorm(widths[0], config.groups, epsilon=config.epsilon, rngs=rngs)
        self.head = nn.Conv(widths[0], config.outputs, (3, 3), padding=1, rngs=rngs)

    def __call__(self, images_BYXC: Array, times_B: ArrayLike, labels_B: ArrayLike | None = None) -> Array:
        check_images(self, images_BYXC, self.config.channels)
        B, Y, X, _ = images_BYXC.shape
        parts = 2 ** (len(self.down) - 1)
        if Y % parts or X % parts:
            raise ShapeError("each level but the last halves the picture", at=self, got=images_BYXC.shape,
                             expected=f"rows and columns that {parts} divides", fix="resize the pictures")  # fmt: skip
        c_BD = self._conditions(jnp.broadcast_to(jnp.asarray(times_B), (B,)), labels_B)
        x_BYXC = self.stem(images_BYXC)
        kept = [x_BYXC]
        for level in self.down:
            for i in range(len(level.blocks)):
                x_BYXC = level.part(i, x_BYXC, c_BD)
                kept.append(x_BYXC)
            if level.halve is not None:
                x_BYXC = level.halve(x_BYXC)
                kept.append(x_BYXC)
        x_BYXC = self.middle(x_BYXC, c_BD)
        for level in self.up:
            for i in range(len(level.blocks)):
                x_BYXC = level.part(i, jnp.concatenate([x_BYXC, kept.pop()], axis=-1), c_BD)
            if level.double is not None:
                x_BYXC = level.double(x_BYXC.repeat(2, axis=1).repeat(2, axis=2))
        return self.head(nn.silu(self.norm(x_BYXC)))

    def _conditions(self, times_B: Array, labels_B: ArrayLike | None) -> Array:
        """silu(c)[B, D]"""
        if (labels_B is None) != (self.classes is None):
            raise ArgumentError("labels are given to a model that was made for them", at=self,
                                got=f"labels {'left out' if labels_B is None else 'given'}",
                                expected=f"as config.labels={self.config.labels} says")  # fmt: skip
        c_BD = self.times(times_B)
        if self.classes is not None:
            y_BD = self.classes(jnp.broadcast_to(jnp.asarray(labels_B), times_B.shape))
            c_BD = c_BD + y_BD.astype(c_BD.dtype)
        return nn.silu(c_BD)


class Level(Module):
    """x = attention(block(x, c)) several times, of each size of pictures; then a convolution that halves or doubles"""

    def __init__(self, config: UnetConfig, ways: Sequence[tuple[int, int]], looking: bool, then: str, *, rngs: Rngs):
        width = ways[-1][1]
        padding = ((0, 1), (0, 1)) if config.padding == 0 else 1
        self.attentions: Any = List(Looking(config, width, rngs=rngs) for _ in ways if looking)
        self.blocks: Any = List(Block(config, inputs, outputs, rngs=rngs) for inputs, outputs in ways)
        self.halve = data(nn.Conv(width, width, (3, 3), 2, padding=padding, rngs=rngs) if then == "halve" else None)
        self.double = data(nn.Conv(width, width, (3, 3), padding=1, rngs=rngs) if then == "double" else None)

    def part(self, i: int, x_BYXC: Array, c_BD: Array) -> Array:
        x_BYXC = self.blocks[i](x_BYXC, c_BD)
        return self.attentions[i](x_BYXC) if len(self.attentions) else x_BYXC


class Middle(Module):
    """block(attention(block(x, c)), c)"""

    def __init__(self, config: UnetConfig, width: int, *, rngs: Rngs):
        self.attentions: Any = List([Looking(config, width, rngs=rngs)])
        self.blocks: Any = List(Block(config, width, width, rngs=rngs) for _ in range(2))

    def __call__(self, x_BYXC: Array, c_BD: Array) -> Array:
        return self.blocks[1](self.attentions[0](self.blocks[0](x_BYXC, c_BD)), c_BD)


class Block(Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time(c))))

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 4 (e).
    """

    def __init__(self, config: UnetConfig, inputs: int, outputs: int, *, rngs: Rngs):
        self.norm1 = nn.GroupNorm(inputs, config.groups, epsilon=config.epsilon, rngs=rngs)
        self.conv1 = nn.Conv(inputs, outputs, (3, 3), padding=1, rngs=rngs)
        self.time = nn.Linear(4 * config.widths[0], outputs, rngs=rngs)
        self.norm2 = nn.GroupNorm(outputs, config.groups, epsilon=config.epsilon, rngs=rngs)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)
        self.conv2 = nn.Conv(outputs, outputs, (3, 3), padding=1, rngs=rngs)
        self.shortcut = data(nn.Conv(inputs, outputs, (1, 1), rngs=rngs) if inputs != outputs else None)

    def __call__(self, x_BYXC: Array, c_BD: Array) -> Array:
        y_BYXC = self.conv1(nn.silu(self.norm1(x_BYXC))) + self.time(c_BD)[:, None, None]
        y_BYXC = self.conv2(self.dropout(nn.silu(self.norm2(y_BYXC))))
        return y_BYXC + (x_BYXC if self.shortcut is None else self.shortcut(x_BYXC))


class Looking(Module):
    """x + attn(norm(x)), each place at all places

    Source: Wang et al. 2018, "Non-local Neural Networks", eq. 6.
    """

    def __init__(self, config: UnetConfig, width: int, *, rngs: Rngs):
        self.norm = nn.GroupNorm(width, config.groups, epsilon=config.epsilon, rngs=rngs)
        self.attn = Attention(width, width // (config.head_dim or width), rngs=rngs)

    def __call__(self, x_BYXC: Array) -> Array:
        B, Y, X, C = x_BYXC.shape
        return x_BYXC + self.attn(self.norm(x_BYXC).reshape(B, Y * X, C)).reshape(B, Y, X, C)


# ---------------------------------------------------------------- files
def _config(down_types: Sequence[str], up_types: Sequence[str], **settings: Any) -> UnetConfig:
    """The configuration of theirs, where kinds of levels have names."""
    looking = tuple(level for level, name in enumerate(down_types) if name == LOOKING[0])
    config = UnetConfig(looking=looking, **settings)
    if (tuple(down_types), tuple(up_types)) != (tuple(config.down_types), tuple(config.up_types)):
        raise ArgumentError("a level is plain or has attention, on both ways alike", got=f"{down_types}, {up_types}",
                            expected=f"{PLAIN} or {LOOKING}")  # fmt: skip
    return config


FILES = Published(Unet, _config, SETTINGS, UNET, stem="diffusion_pytorch_model", older=OLDER)


def load_unet(path: str | Path, config: UnetConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Unet:
    """A model with the weights of a folder (`unet/` of a pipeline) or a file; it does not drop until `model.train()`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_unet(model: Unet, folder: str | Path, *, dtype: DTypeLike | None = None,
              shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    return FILES.save(model, folder, dtype, shard_bytes)
