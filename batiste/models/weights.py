# SPDX-License-Identifier: Apache-2.0
"""The weights of published decoders: which of our values is which of theirs, as tables; loading and saving."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from batiste.graph import Rngs

from .configs import DecoderConfig, Stretch
from .decoder import Decoder
from .files import open_weights, read_json
from .mapping import Table, load, save
from .safetensors import SHARD_BYTES
from .tensors import Weights, WeightsError

HUGGING_FACE = {
    "embed/embedding": "model.embed_tokens.weight",
    "blocks/layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/layers/attn/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/layers/attn/query/bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks/layers/attn/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/layers/attn/key/bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks/layers/attn/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/layers/attn/value/bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks/layers/attn/query_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks/layers/attn/key_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks/layers/attn/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
"""Our path -> the name in Hugging Face's checkpoints of Llama, Mistral, Qwen2, Qwen3 and SmolLM2."""

GGUF = {
    ours: theirs.replace("model.layers.", "blk.").replace("model.", "")
    .replace("self_attn.o_proj", "attn_output").replace("self_attn.", "attn_").replace("_proj", "")
    .replace("input_layernorm", "attn_norm").replace("post_attention_layernorm", "ffn_norm").replace("mlp.", "ffn_")
    .replace("embed_tokens", "token_embd").replace("lm_head", "output")
    for ours, theirs in HUGGING_FACE.items()
} | {"norm/scale": "output_norm.weight"}  # fmt: skip
"""Our path -> the name in GGUF files."""

LLAMA = Table(HUGGING_FACE, ignored=("*.rotary_emb.inv_freq",))
LLAMA_GGUF = Table(GGUF, ignored=("rope_freqs.weight",))

# our setting -> Hugging Face's in config.json
SETTINGS = {
    "vocab": "vocab_size", "features": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "hidden": "intermediate_size", "head_dim": "head_dim",
    "window": "sliding_window", "tied": "tie_word_embeddings", "rope_theta": "rope_theta", "epsilon": "rms_norm_eps",
    "context": "max_position_embeddings",
}  # fmt: skip
STRETCH = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
           "context": "original_max_position_embeddings"}  # fmt: skip
GGUF_SETTINGS = {
    "features": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv", "hidden": "feed_forward_length", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base", "epsilon": "attention.layer_norm_rms_epsilon", "context": "context_length",
}  # fmt: skip
TURNED = ("/attn/query/", "/attn/key/")
"""What RoPE turns: GGUF files of the architecture `llama` have its pairs side by side."""
# architecture -> what its name says
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True},
}  # fmt: skip


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
    table = LLAMA_GGUF if is_gguf else LLAMA
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
    files = save(model, LLAMA, folder, dtype=dtype, shard_bytes=shard_bytes)
    (Path(folder) / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    return files


# ---------------------------------------------------------------- configurations
def config_of(folder: Path) -> DecoderConfig:
    """What `config.json` says.

    Raises:
        WeightsError: there is none, or it is that of another architecture.
    """
    path = folder / "config.json"
    about = read_json(path)
    kind = about.get("model_type")
    found = {ours: about[theirs] for ours, theirs in SETTINGS.items() if theirs in about}
    if about.get("use_sliding_window") is False:
        found.pop("window", None)
    if about.get("rope_scaling"):
        found["rope_stretch"] = _stretch(about["rope_scaling"], path)
    found.setdefault("tied", False)
    found.setdefault("kv_heads", found.get("heads"))
    return _config(kind, found, path)


def _stretch(given: Any, path: Path) -> Stretch:
    """How RoPE is stretched, of Llama 3.1's kind: the others are not known here."""
    known = isinstance(given, dict) and given.get("rope_type", given.get("type")) == "llama3"
    if not known or not set(STRETCH.values()) <= set(given):
        raise WeightsError("the model stretches RoPE in a way that this decoder does not", at=str(path),
                           got=str(given)[:80], expected=f"llama3 with {', '.join(STRETCH.values())}")  # fmt: skip
    return Stretch(**{ours: given[theirs] for ours, theirs in STRETCH.items()})


def config_of_gguf(weights: Weights, path: Path) -> DecoderConfig:
    """What the settings of a GGUF file say."""
    kind = weights.about.get("general.architecture")
    found = {ours: weights.about.get(f"{kind}.{theirs}") for ours, theirs in GGUF_SETTINGS.items()}
    found |= {"tied": "output.weight" not in weights.tensors}
    if "token_embd.weight" in weights.tensors:
        found["vocab"] = weights.tensors["token_embd.weight"].shape[0]
    return _config(kind, {name: value for name, value in found.items() if value is not None}, path)


def _config(kind: Any, found: dict[str, Any], path: Path) -> DecoderConfig:
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise WeightsError("the model is of an architecture that this decoder is not", at=str(path),
                           got=repr(kind)[:80], expected=", ".join(ARCHITECTURES))  # fmt: skip
    if found.get("head_dim") and found["head_dim"] * found.get("heads", 0) == found.get("features"):
        found.pop("head_dim")  # it says what is so anyway
    try:
        return DecoderConfig(**found, **ARCHITECTURES[kind])
    except (TypeError, ValueError) as error:
        raise WeightsError("the settings do not describe a decoder", at=str(path), got=str(error)[:200]) from error


def settings_of(config: DecoderConfig) -> dict[str, Any]:
    """`config.json` for Hugging Face's classes.

    Raises:
        WeightsError: none of them has these choices.
    """
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "mistral" if config.window else "llama"
    if config.parallel or not config.gated or (config.qk_norm and config.qkv_bias):
        raise WeightsError("no architecture of the Llama tree has these choices", got=str(config),
                           expected="gated and not parallel; qkv_bias or qk_norm, not both",
                           fix="save it as a checkpoint")  # fmt: skip
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    about = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
    if stretch := config.rope_stretch:
        about["rope_scaling"] = {"rope_type": "llama3"} | {STRETCH[name]: x for name, x in stretch._asdict().items()}
    return {"architectures": [f"{names[kind]}ForCausalLM"], "model_type": kind, "hidden_act": "silu", **about,
            "head_dim": config.depth}  # fmt: skip


# ---------------------------------------------------------------- layouts
def halves(matrix: np.ndarray, depth: int) -> np.ndarray:
    """Rows of heads with RoPE's pairs side by side (x0, y0, x1, y1, …), as rows with pairs as halves (x0, x1, …, y0, …)

    >>> halves(np.arange(8), 4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    pairs = matrix.reshape(-1, depth // 2, 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)
