# SPDX-License-Identifier: Apache-2.0
"""The weights of published decoders: loading and saving; the names in GGUF files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from batiste.graph import Rngs

from .configs import DecoderConfig
from .decoder import Decoder
from .files import open_weights, read_json
from .kinds import HUGGING_FACE, KINDS, configured, kind_of, read_settings, settings_of
from .mapping import As, Table, load, save
from .safetensors import SHARD_BYTES
from .tensors import Weights, WeightsError

GGUF = {
    ours: theirs.replace("model.layers.", "blk.").replace("model.", "")
    .replace("self_attn.o_proj", "attn_output").replace("self_attn.", "attn_").replace("_proj", "")
    .replace("input_layernorm", "attn_norm").replace("post_attention_layernorm", "ffn_norm").replace("mlp.", "ffn_")
    .replace("embed_tokens", "token_embd").replace("lm_head", "output")
    for ours, theirs in HUGGING_FACE.items()
} | {"norm/scale": "output_norm.weight"}  # fmt: skip
"""Our path -> the name in GGUF files."""

LLAMA_GGUF = Table(GGUF, ignored=("rope_freqs.weight",))
SPARSE_GGUF = Table({
    **{ours: theirs for ours, theirs in GGUF.items() if "/mlp/" not in ours},
    "blocks/layers/mlp/router/kernel": "blk.{}.ffn_gate_inp.weight",
    **{f"blocks/layers/mlp/experts/{part}": As(f"blk.{{}}.ffn_{part}_exps.weight", (0, 2, 1))
       for part in ("gate", "up", "down")},
}, ignored=("rope_freqs.weight",))  # fmt: skip
GGUF_SETTINGS = {
    "features": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv", "hidden": "feed_forward_length", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base", "epsilon": "attention.layer_norm_rms_epsilon", "context": "context_length",
    "window": "attention.sliding_window", "experts": "expert_count", "top_k": "expert_used_count",
}  # fmt: skip
TURNED = ("/attn/query/", "/attn/key/")
"""What RoPE turns: GGUF files of the architecture `llama` have its pairs side by side."""
IN_GGUF = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
"""What GGUF files call the kinds whose names there are known; Mixtral is a `llama` with experts."""


def load_decoder(path: str | Path, config: DecoderConfig | None = None, *, dtype: DTypeLike = jnp.float32,
                 apart: bool = False) -> Decoder:  # fmt: skip
    """A decoder with the weights of a folder (safetensors and `config.json`), of one file, or of a GGUF file.

    See `mapping.load` for how values travel.

    Args:
        config: what the model is; read from the files if left out, which a single safetensors file does not say.
        dtype: of the parameters.
        apart: its layers stand apart, for generating; see `Decoder.apart`.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    path = Path(path)
    weights = open_weights(path)
    is_gguf = "general.architecture" in weights.about
    config = config or (config_of_gguf(weights, path) if is_gguf else config_of(path))
    table = (SPARSE_GGUF if config.experts else LLAMA_GGUF) if is_gguf else kind_of(config)[1].table
    if config.tied:
        table = dataclasses.replace(table, ignored=(*table.ignored, "lm_head.weight", "output.weight"))
    interleaved = weights.about.get("general.architecture") == "llama"

    def turned(place: str, tensor: np.ndarray) -> np.ndarray:
        return halves(tensor, config.depth) if any(part in place for part in TURNED) else tensor

    def build(rngs: Rngs) -> Decoder:
        model = Decoder(config, rngs=rngs)
        return model.apart() if apart else model

    return load(build, weights, table, path, dtype=dtype, turn=turned if interleaved else None)


def save_decoder(model: Decoder, folder: str | Path, *, dtype: DTypeLike | None = None,
                 shard_bytes: int = SHARD_BYTES) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files.

    Args:
        dtype, shard_bytes: see `mapping.save`.

    Raises:
        WeightsError: the model has what those names cannot say (parallel blocks, no gate).
    """
    about = settings_of(model.config)
    files = save(model, kind_of(model.config)[1].table, folder, dtype=dtype, shard_bytes=shard_bytes)
    (Path(folder) / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    return files


# ---------------------------------------------------------------- configurations
def config_of(folder: Path) -> DecoderConfig:
    """What `config.json` says.

    Raises:
        WeightsError: there is none, or it is that of another architecture.
    """
    path = folder / "config.json"
    return read_settings(read_json(path), path)


def config_of_gguf(weights: Weights, path: Path) -> DecoderConfig:
    """What the settings of a GGUF file say.

    Raises:
        WeightsError: they are those of another architecture.
    """
    kind = weights.about.get("general.architecture")
    if kind not in IN_GGUF:
        raise WeightsError("the model is of an architecture that this decoder is not", at=str(path),
                           got=repr(kind)[:80], expected=", ".join(IN_GGUF))  # fmt: skip
    found = {ours: weights.about.get(f"{kind}.{theirs}") for ours, theirs in GGUF_SETTINGS.items()}
    found |= {"tied": "output.weight" not in weights.tensors}
    if found["experts"]:
        found["hidden"] = weights.about.get(f"{kind}.expert_feed_forward_length", found["hidden"])
    if "token_embd.weight" in weights.tensors:
        found["vocab"] = weights.tensors["token_embd.weight"].shape[0]
    return configured(
        {name: value for name, value in found.items() if value is not None} | dict(KINDS[IN_GGUF[kind]].choices), path
    )


# ---------------------------------------------------------------- layouts
def halves(matrix: np.ndarray, depth: int) -> np.ndarray:
    """Rows of heads with RoPE's pairs side by side (x0, y0, x1, y1, …), as rows with pairs as halves (x0, x1, …, y0, …)

    >>> halves(np.arange(8), 4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    pairs = matrix.reshape(-1, depth // 2, 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)
