# SPDX-License-Identifier: Apache-2.0
"""BERT: an encoder whose positions all look at each other, and the sentence encoders that are made of it.

x = norm(token + position + type);  x = block(x) for each block

Dims, in the suffixes of names:  B batch   T positions   D features   H heads   C depth of a head   F features of MLP

Source: Devlin et al. 2019, "BERT"; Reimers and Gurevych 2019, "Sentence-BERT"; Wang et al. 2020, "MiniLM".
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import Module, Rngs, data
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn.stack import Stack

from .blocks import Attention, Mlp
from .files import open_weights
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings

RULES = (
    ("token/embedding", ("vocab", None)),
    ("{position,type}/embedding", (None, None)),
    ("attn/{query,key,value}/{kernel,bias}", (..., "heads", None)),
    ("attn/out/kernel", (..., "heads", None, None)),
    ("mlp/up/kernel", (..., "mlp")),
    ("mlp/up/bias", (..., "mlp")),
    ("mlp/down/kernel", (..., "mlp", None)),
    ("pooler/kernel", (None, None)),
    ("{scale,bias}", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`."""

BERT = Table(
    {
        "token/embedding": "embeddings.word_embeddings.weight",
        "position/embedding": "embeddings.position_embeddings.weight",
        "type/embedding": "embeddings.token_type_embeddings.weight",
        "norm/scale": "embeddings.LayerNorm.weight",
        "norm/bias": "embeddings.LayerNorm.bias",
        **{f"blocks/layers/{ours}/{p}": f"encoder.layer.{{}}.{theirs}.{'bias' if p == 'bias' else 'weight'}"
           for ours, theirs, kind in (
               ("attn/query", "attention.self.query", "kernel"),
               ("attn/key", "attention.self.key", "kernel"),
               ("attn/value", "attention.self.value", "kernel"),
               ("attn/out", "attention.output.dense", "kernel"),
               ("attn_norm", "attention.output.LayerNorm", "scale"),
               ("mlp/up", "intermediate.dense", "kernel"),
               ("mlp/down", "output.dense", "kernel"),
               ("mlp_norm", "output.LayerNorm", "scale"),
           ) for p in (kind, "bias")},
        "pooler/kernel": "pooler.dense.weight",
        "pooler/bias": "pooler.dense.bias",
    },
    ignored=("*embeddings.position_ids", "cls.*", "dropout.*", "classifier.*"),
    prefixes=("", "bert."),
)  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints."""

SETTINGS = Settings("bert", {
    "vocab": "vocab_size", "features": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "hidden": "intermediate_size", "positions": "max_position_embeddings", "types": "type_vocab_size",
    "epsilon": "layer_norm_eps", "dropout": "hidden_dropout_prob",
}, {"hidden_act": "gelu", "position_embedding_type": "absolute"})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of an encoder.

    Args:
        vocab, features, layers, heads: tokens; of the stream; blocks; of attention.
        hidden: features of the MLP.
        positions, types: how many positions, and parts of a text, are told apart.
        epsilon: of LayerNorm.
        dropout: in training, after the embeddings and after each part of a block.
        pooled: with the layer that makes one vector of the first position.

    Raises:
        ArgumentError: sizes are below one, or the heads do not divide the features.

    >>> BERTS["minilm-l6"].parameters
    22713216
    """

    vocab: int
    features: int
    layers: int
    heads: int
    hidden: int
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12
    dropout: float = 0.1
    pooled: bool = True

    def __post_init__(self):
        for name in ("vocab", "features", "layers", "heads", "hidden", "positions", "types"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"an encoder's {name} is a size", got=value, expected="1 or more")
        if self.features % self.heads:
            raise ArgumentError("the heads do not divide the features",
                                got=f"{self.features} features, {self.heads} heads",
                                fix="choose heads that divide features")  # fmt: skip

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        D, F = self.features, self.hidden
        block = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D
        return (self.vocab + self.positions + self.types + 2) * D + self.layers * block + self.pooled * (D * D + D)


_c = BertConfig
BERTS = {
    "tiny": _c(64, 16, 2, 4, 24, positions=32),
    "minilm-l6": _c(30522, 384, 6, 12, 1536),
    "minilm-l12": _c(30522, 384, 12, 12, 1536),
    "bert-base-uncased": _c(30522, 768, 12, 12, 3072),
    "bert-large-uncased": _c(30522, 1024, 24, 16, 4096),
    "bert-base-cased": _c(28996, 768, 12, 12, 3072),
}
"""Published configurations, and `tiny` for trying."""


class Bert(Module):
    """x[B, T, D], given tokens[B, T] and which of them are there, mask[B, T]

    >>> model = Bert(BERTS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 5), int)).shape
    (2, 5, 16)
    """

    def __init__(self, config: BertConfig, *, rngs: Rngs):
        self.config = config
        self.token = nn.Embed(config.vocab, config.features, rngs=rngs)
        self.position = nn.Embed(config.positions, config.features, rngs=rngs)
        self.type = nn.Embed(config.types, config.features, rngs=rngs)
        self.norm = nn.LayerNorm(config.features, epsilon=config.epsilon, rngs=rngs)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs=rngs)
        self.pooler = data(nn.Linear(config.features, config.features, rngs=rngs) if config.pooled else None)

    def __call__(self, tokens_BT: Array, mask_BT: Array | None = None, types_BT: Array | None = None) -> Array:
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] > self.config.positions:
            raise ShapeError("an encoder reads rows of tokens", at=self, got=tokens_BT.shape,
                             expected=f"(batch, length ≤ {self.config.positions})",
                             fix="add a dim of size 1: tokens[None]; cut longer texts")  # fmt: skip
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        positions_1T = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = self.token(tokens_BT) + self.position(positions_1T) + self.type(types_BT)
        x_BTD = self.dropout(self.norm(x_BTD))
        seen_B11T = None if mask_BT is None else mask_BT.astype(bool)[:, None, None, :]
        return self.blocks(x_BTD, seen_B11T)

    def pooled(self, x_BTD: Array) -> Array:
        """tanh(pooler(x of the first position))

        Raises:
            ArgumentError: the configuration has no pooler.
        """
        if self.pooler is None:
            raise ArgumentError(
                "the encoder has no pooler", at=self, fix="take the mean over positions, or pooled=True"
            )
        return jnp.tanh(self.pooler(x_BTD[:, 0]))


class Block(Module):
    """x = norm(x + attn(x));  norm(x + mlp(x))

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1 (norms after the sums).
    """

    def __init__(self, config: BertConfig, *, rngs: Rngs):
        self.attn = Attention(config.features, config.heads, rngs=rngs)
        self.attn_norm = nn.LayerNorm(config.features, epsilon=config.epsilon, rngs=rngs)
        self.mlp = Mlp(config.features, config.hidden, rngs=rngs)
        self.mlp_norm = nn.LayerNorm(config.features, epsilon=config.epsilon, rngs=rngs)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x_BTD: Array, seen_B11T: Array | None = None) -> Array:
        x_BTD = self.attn_norm(x_BTD + self.dropout(self.attn(x_BTD, seen_B11T)))
        return self.mlp_norm(x_BTD + self.dropout(self.mlp(x_BTD)))


# ---------------------------------------------------------------- files
FILES = Published(Bert, BertConfig, SETTINGS, BERT)


def load_bert(path: str | Path, config: BertConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Bert:
    """An encoder with the weights of a folder or a file; it does not drop until `model.train()`.

    See `mapping.load` for how values travel.

    Args:
        config: what the model is; that of the folder's `config.json` if left out.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    pooled = any("pooler." in name for name in open_weights(path).tensors)
    if config is not None:
        config = dataclasses.replace(config, pooled=config.pooled and pooled)
    return FILES.load(path, config, dtype, pooled=pooled)


def save_bert(model: Bert, folder: str | Path, *, dtype: DTypeLike | None = None,
              shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    return FILES.save(model, folder, dtype, shard_bytes, architectures=["BertModel"])
