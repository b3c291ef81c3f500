# SPDX-License-Identifier: Apache-2.0
"""Whisper: an encoder of spectra, and a decoder that looks at it and says tokens. `speech` makes text of audio by it.

memory = norm(blocks(gelu(halve(gelu(begin(spectrum)))) + positions))
logits = norm(blocks(tokens + token_positions, memory)) · embedding

Dims, in the suffixes of names:  B batch   J moments   M bands of the spectrum   S encoded moments, J / 2   T tokens
    P remembered tokens   D features   H heads   C depth of a head   V vocabulary   L layers

Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from batiste import nn
from batiste.graph import Module, Param, Rngs, make
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.nn.initializers import normal
from batiste.nn.stack import Stack

from . import blocks
from .blocks import Attention, Block, Mlp, exact_gelu
from .mapping import Table
from .safetensors import SHARD_BYTES
from .settings import Published, Settings

RULES = (
    *blocks.RULES,
    ("token/embedding", ("vocab", None)),
    ("{scale,bias,kernel,positions,token_positions}", (...,)),
)
"""Which dim of each parameter a `tensor` axis divides: `sharding.fsdp_tensor(4, rules=RULES)`."""

WHISPER = Table({
    "positions": "model.encoder.embed_positions.weight",
    "token_positions": "model.decoder.embed_positions.weight",
    "token/embedding": "model.decoder.embed_tokens.weight",
    **{f"{ours}/{p}": f"model.{theirs}.{'bias' if p == 'bias' else 'weight'}"
       for ours, theirs, kind in (
           ("begin", "encoder.conv1", "kernel"), ("halve", "encoder.conv2", "kernel"),
           ("norm", "encoder.layer_norm", "scale"), ("token_norm", "decoder.layer_norm", "scale"),
           *((f"{stack}/layers/{part}", f"{side}.layers.{{}}.{name}", kind)
             for stack, side in (("encoder", "encoder"), ("decoder", "decoder")) for part, name, kind in (
               ("attn_norm", "self_attn_layer_norm", "scale"), ("mlp_norm", "final_layer_norm", "scale"),
               ("cross_norm", "encoder_attn_layer_norm", "scale"),
               ("mlp/up", "fc1", "kernel"), ("mlp/down", "fc2", "kernel"),
               *((f"{attn}/{q}", f"{their}.{q_}", "kernel")
                 for attn, their in (("attn", "self_attn"), ("cross", "encoder_attn"))
                 for q, q_ in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))),
           )),
       ) for p in (kind, "bias")},
}, ignored=("proj_out.weight",))  # fmt: skip
"""Our path -> the name in Hugging Face's checkpoints."""

SETTINGS = Settings("whisper", {
    "vocab": "vocab_size", "features": "d_model", "layers": "encoder_layers", "heads": "encoder_attention_heads",
    "hidden": "encoder_ffn_dim", "decoder_layers": "decoder_layers", "bands": "num_mel_bins",
    "moments": "max_source_positions", "length": "max_target_positions", "dropout": "dropout",
}, {"activation_function": "gelu", "scale_embedding": False})  # fmt: skip

ENDS = {"bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "decoder_start_token_id": 50258}
"""The tokens with a meaning, of the published vocabularies."""


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """The sizes of a transcriber.

    Args:
        features, layers, heads, hidden: of the stream; blocks of the encoder; of attention; of the MLP.
        decoder_layers: blocks of the decoder; as many if left out.
        vocab, length: tokens, and the most of a text.
        bands, moments: of the spectrum; encoded moments, which are half of those that are heard.
        dropout: in training, after each part of a block.

    Raises:
        ArgumentError: sizes are below one, or the heads do not divide the features.
    """

    features: int
    layers: int
    heads: int
    hidden: int
    decoder_layers: int | None = None
    vocab: int = 51865
    length: int = 448
    bands: int = 80
    moments: int = 1500
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "decoder_layers", self.decoder_layers or self.layers)
        for field in dataclasses.fields(self)[:-1]:
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"a transcriber's {field.name} is a size", got=value, expected="1 or more")
        if self.features % self.heads:
            raise ArgumentError("the heads do not divide the features",
                                got=f"{self.features} features, {self.heads} heads", fix="choose divisors")  # fmt: skip


_c = WhisperConfig
WHISPERS = {
    "tiny": _c(16, 2, 4, 24, vocab=30, length=12, bands=6, moments=10),
    "whisper-tiny": _c(384, 4, 6, 1536),
    "whisper-base": _c(512, 6, 8, 2048),
    "whisper-small": _c(768, 12, 12, 3072),
    "whisper-medium": _c(1024, 24, 16, 4096),
    "whisper-large-v2": _c(1280, 32, 20, 5120),
    "whisper-large-v3": _c(1280, 32, 20, 5120, vocab=51866, bands=128),
    "whisper-large-v3-turbo": _c(1280, 32, 20, 5120, 4, vocab=51866, bands=128),
}
"""Published configurations, and `tiny` for trying."""


class Said(NamedTuple):
    """What the decoder looks at and remembers: keys and values of the encoded audio, and of `filled` tokens."""

    heard_LBSHC: tuple[Array, Array]
    said_LBPHC: tuple[Array, Array]
    filled: Array


class Whisper(Module):
    """logits[B, T, V] of the next token, given spectrum[B, J, M] and tokens[B, T]

    >>> model = Whisper(WHISPERS["tiny"], rngs=Rngs(0))
    >>> model(jnp.zeros((2, 20, 6)), jnp.zeros((2, 5), int)).shape
    (2, 5, 30)
    """

    def __init__(self, config: WhisperConfig, *, rngs: Rngs):
        D, H, F = config.features, config.heads, config.hidden
        self.config = config
        self.begin = nn.Conv(config.bands, D, 3, padding=1, rngs=rngs)
        self.halve = nn.Conv(D, D, 3, 2, padding=1, rngs=rngs)
        self.positions = make(Param, normal(0.02), (config.moments, D), jnp.float32, rngs.params)
        self.encoder = Stack(lambda rngs: Block(D, H, F, dropout=config.dropout, key_bias=False, rngs=rngs),
                             config.layers, rngs=rngs)  # fmt: skip
        self.norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.token = nn.Embed(config.vocab, D, rngs=rngs)
        self.token_positions = make(Param, normal(0.02), (config.length, D), jnp.float32, rngs.params)
        self.decoder = Stack(lambda rngs: DecoderBlock(config, rngs=rngs), config.decoder_layers or config.layers,
                             rngs=rngs, has_aux=True)  # fmt: skip
        self.token_norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, spectrum_BJM: Array, tokens_BT: Array) -> Array:
        said = self.heard(self.encode(spectrum_BJM), tokens_BT.shape[1])
        return self.decode(tokens_BT, said)[0]

    def encode(self, spectrum_BJM: Array) -> Array:
        """memory[B, S, D]"""
        heard, c = spectrum_BJM.shape, self.config
        if heard[1:] != (2 * c.moments, c.bands):
            raise ShapeError("a transcriber hears a spectrum of one length", at=self, got=heard,
                             expected=f"(batch, {2 * c.moments}, {c.bands})",
                             fix="fill up with silence; moments come before bands")  # fmt: skip
        x_BSD = exact_gelu(self.halve(exact_gelu(self.begin(spectrum_BJM))))
        return self.norm(self.encoder(x_BSD + self.positions[...].astype(x_BSD.dtype)[None]))

    def heard(self, memory_BSD: Array, length: int) -> Said:
        """What to look at for a text of `length` tokens, of which none is said yet."""
        c, cross = self.config, self.decoder.layers.cross
        k_LBSHC = jnp.einsum("BSD,LDHC->LBSHC", memory_BSD, cross.key.kernel[...].astype(memory_BSD.dtype))
        v_LBSHC = jnp.einsum("BSD,LDHC->LBSHC", memory_BSD, cross.value.kernel[...].astype(memory_BSD.dtype))
        v_LBSHC = v_LBSHC + cross.value.bias[...].astype(v_LBSHC.dtype)[:, None, None]
        shape = (k_LBSHC.shape[0], memory_BSD.shape[0], length, c.heads, c.features // c.heads)
        none_LBPHC = jnp.zeros(shape, k_LBSHC.dtype)
        return Said((k_LBSHC, v_LBSHC), (none_LBPHC, none_LBPHC), jnp.int32(0))

    def decode(self, tokens_BT: Array, said: Said) -> tuple[Array, Said]:
        """logits[B, T, V] after tokens that follow those said, and what is said then

        Raises:
            ShapeError: there are no rows of tokens, or they are longer than there are positions.
        """
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] > self.config.length:
            raise ShapeError("a transcriber writes rows of tokens", at=self, got=tokens_BT.shape,
                             expected=f"(batch, length ≤ {self.config.length})")  # fmt: skip
        at_T = said.filled + jnp.arange(tokens_BT.shape[1])
        x_BTD = self.token(tokens_BT)
        x_BTD = x_BTD + self.token_positions[...].astype(x_BTD.dtype)[at_T][None]
        x_BTD, kept = self.decoder(x_BTD, at_T, each=(said.heard_LBSHC, said.said_LBPHC))
        logits_BTV = jnp.dot(self.token_norm(x_BTD), self.token.embedding[...].T.astype(x_BTD.dtype),
                             preferred_element_type=jnp.float32)  # fmt: skip
        return logits_BTV, Said(said.heard_LBSHC, kept, said.filled + tokens_BT.shape[1])


class DecoderBlock(Module):
    """y = x + attn(norm(x));  z = y + cross(norm(y), memory);  z + mlp(norm(z))"""

    def __init__(self, config: WhisperConfig, *, rngs: Rngs):
        D, H = config.features, config.heads
        self.attn_norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(D, H, key_bias=False, rngs=rngs)
        self.cross_norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.cross = Attention(D, H, key_bias=False, rngs=rngs)
        self.mlp_norm = nn.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.mlp = Mlp(D, config.hidden, rngs=rngs)
        self.dropout = nn.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x_BTD: Array, at_T: Array, each: Any) -> tuple[Array, tuple[Array, Array]]:
        heard, said = each
        normed_BTD = self.attn_norm(x_BTD)
        k_BPHC, v_BPHC = (lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at_T[0], axis=1)
                          for old, new in zip(said, self.attn.keys_values(normed_BTD)))  # fmt: skip
        past_11TP = (jnp.arange(k_BPHC.shape[1])[None] <= at_T[:, None])[None, None]
        x_BTD = x_BTD + self.dropout(self.attn(normed_BTD, past_11TP, (k_BPHC, v_BPHC)))
        x_BTD = x_BTD + self.dropout(self.cross(self.cross_norm(x_BTD), None, heard))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD))), (k_BPHC, v_BPHC)


# ---------------------------------------------------------------- files
FILES = Published(Whisper, WhisperConfig, SETTINGS, WHISPER)


def load_whisper(path: str | Path, config: WhisperConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Whisper:
    """A transcriber with the weights of a folder or a file; it does not drop until `model.train()`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    return FILES.load(path, config, dtype)


def save_whisper(model: Whisper, folder: str | Path, *, dtype: DTypeLike | None = None,
                 shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files."""
    sizes = {"decoder_attention_heads": model.config.heads, "decoder_ffn_dim": model.config.hidden}
    ends = {name: min(n, model.config.vocab - 1) for name, n in ENDS.items()}
    return FILES.save(model, folder, dtype, shard_bytes, **sizes, **ends)
