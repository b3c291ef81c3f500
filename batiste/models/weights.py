# SPDX-License-Identifier: Apache-2.0
"""The weights of published decoders: which of our values is which of theirs, as tables; loading and saving.

`{}` in a name is the number of the block; ours stand in one stacked array. Theirs are matrices [out, in], ours kernels
[in, *out], so a kernel is their matrix transposed and reshaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from batiste.graph import Param, Rngs, Variable, iter_graph
from batiste.sharding import current_plan

from .configs import DecoderConfig
from .decoder import Decoder
from .gguf import open_gguf
from .safetensors import Spec, open_safetensors, write_safetensors
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

# our setting -> Hugging Face's in config.json
SETTINGS = {
    "vocab": "vocab_size", "features": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "hidden": "intermediate_size", "head_dim": "head_dim",
    "window": "sliding_window", "tied": "tie_word_embeddings", "rope_theta": "rope_theta", "epsilon": "rms_norm_eps",
    "context": "max_position_embeddings",
}  # fmt: skip
GGUF_SETTINGS = {
    "features": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv", "hidden": "feed_forward_length", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base", "epsilon": "attention.layer_norm_rms_epsilon", "context": "context_length",
}  # fmt: skip
TURNED = ("blocks/layers/attn/query/", "blocks/layers/attn/key/")
"""What RoPE turns: GGUF files of the architecture `llama` have its pairs side by side."""
# architecture -> what its name says
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True},
}  # fmt: skip


def load_decoder(path: str | Path, config: DecoderConfig | None = None, *, dtype: DTypeLike = jnp.float32) -> Decoder:
    """A decoder with the weights of a folder (safetensors and `config.json`), a safetensors file, or a GGUF file.

    Each value goes to its device as soon as it is read: the host holds one parameter (of all blocks) at a time. Where a
    plan is in use (`sharding.use`), each is sent to its place.

    Args:
        config: what the model is; read from the files if left out, which a single safetensors file does not say.
        dtype: of the parameters.

    Raises:
        WeightsError: the files are damaged or incomplete, or of another model; before memory is taken.
    """
    path = Path(path)
    is_gguf = path.suffix == ".gguf"
    weights = open_gguf(path) if is_gguf else open_safetensors(path)
    config = config or (config_of_gguf(weights, path) if is_gguf else config_of(path))
    names = GGUF if is_gguf else HUGGING_FACE
    model = jax.eval_shape(lambda: Decoder(config, rngs=Rngs(0)))
    _check(model, weights, names, path)
    interleaved = is_gguf and weights.about.get("general.architecture") == "llama"
    plan = current_plan()
    for place, variable in _parameters(model):
        value = np.empty(variable.shape, np.dtype(dtype))
        for name, target in _parts(names[place], value):
            found = weights.tensors[name].read()
            found = halves(found, config.depth) if interleaved and place.startswith(TURNED) else found
            target[...] = (found.T if place.endswith("/kernel") else found).reshape(target.shape)
        if plan is None:
            variable.set_value(jnp.asarray(value))
        else:
            spec = plan.place_of(tuple(place.split("/")), variable).spec
            variable.set_value(jax.device_put(value, NamedSharding(plan.mesh, spec)))
    return model


def save_decoder(model: Decoder, folder: str | Path, *, dtype: DTypeLike | None = None,
                 shard_bytes: int = 5_000_000_000) -> list[Path]:  # fmt: skip
    """Writes safetensors with Hugging Face's names, and `config.json`, into a folder; says which files.

    Args:
        dtype: of the values in the files; that of each parameter if left out.
        shard_bytes: a larger model is written to several files, with an index.

    Raises:
        WeightsError: the model has what those names cannot say (parallel blocks, no gate).
    """
    folder, places = Path(folder), _parameters(model)
    about = settings_of(model.config)
    specs, sources = [], []
    for place, variable in places:
        for i, (name, part) in enumerate(_parts(HUGGING_FACE[place], np.empty(variable.shape, np.bool_))):
            specs.append(Spec(name, _theirs(part, place).shape, np.dtype(dtype or variable.dtype)))
            sources.append((place, variable, i if "{}" in HUGGING_FACE[place] else ...))
    values = (_theirs(np.asarray(variable[...][i]), place) for place, variable, i in sources)
    files = write_safetensors(folder, specs, values, shard_bytes)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    return files


# ---------------------------------------------------------------- configurations
def config_of(folder: Path) -> DecoderConfig:
    """What `config.json` says.

    Raises:
        WeightsError: there is none, or it is that of another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError("the files do not say what the model is", at=str(path), fix="pass config=DecoderConfig(...)")
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError("this is no JSON", at=str(path), got=str(error)[:80]) from None
    kind = about.get("model_type")
    found = {ours: about[theirs] for ours, theirs in SETTINGS.items() if theirs in about}
    if about.get("use_sliding_window") is False:
        found.pop("window", None)
    if about.get("rope_scaling"):
        raise WeightsError("the model stretches RoPE, which this decoder does not", at=str(path),
                           got=str(about["rope_scaling"])[:80])  # fmt: skip
    found.setdefault("tied", False)
    found.setdefault("kv_heads", found.get("heads"))
    return _config(kind, found, path)


def config_of_gguf(weights: Weights, path: Path) -> DecoderConfig:
    """What the settings of a GGUF file say."""
    kind = weights.about.get("general.architecture")
    found = {ours: weights.about.get(f"{kind}.{theirs}") for ours, theirs in GGUF_SETTINGS.items()}
    found |= {"tied": "output.weight" not in weights.tensors}
    if "token_embd.weight" in weights.tensors:
        found["vocab"] = weights.tensors["token_embd.weight"].shape[0]
    return _config(kind, {name: value for name, value in found.items() if value is not None}, path)


def _config(kind: Any, found: dict[str, Any], path: Path) -> DecoderConfig:
    if kind not in ARCHITECTURES:
        raise WeightsError("the model is of an architecture that this decoder is not", at=str(path), got=repr(kind),
                           expected=", ".join(ARCHITECTURES))  # fmt: skip
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


def _parameters(model: Decoder) -> list[tuple[str, Variable]]:
    return [("/".join(map(str, path)), x) for path, x in iter_graph(model) if isinstance(x, Param)]


def _parts(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Their name of each part of one of our values, and the part."""
    if "{}" not in name:
        return iter([(name, value)])
    return ((name.format(i), part) for i, part in enumerate(value))


def _theirs(value: np.ndarray, place: str) -> np.ndarray:
    """A kernel [in, out], [in, H, C] or [H, C, out] as a matrix [out, in]; a bias [H, C] as a vector."""
    if place.endswith("/bias"):
        return value.reshape(-1)
    if not place.endswith("/kernel"):
        return value
    inputs = 2 if place.endswith("attn/out/kernel") else 1
    return value.reshape(math.prod(value.shape[:inputs]), -1).T


def _check(model: Decoder, weights: Weights, names: Mapping[str, str], path: Path) -> None:
    """Every parameter has its tensor of the right size, and every tensor its parameter.

    Raises:
        WeightsError: names the first that has not.
    """
    left = set(weights.tensors)
    for place, variable in _parameters(model):
        nothing = np.broadcast_to(np.bool_(False), variable.shape)  # of that shape, without its memory
        for name, part in _parts(names[place], nothing):
            found = weights.tensors.get(name)
            if found is None:
                raise WeightsError("the files lack a tensor of the model", at=f"{path}: {name}",
                                   fix="check the configuration, and that all files are there")  # fmt: skip
            left.discard(name)
            wanted = _theirs(part, place).shape
            if found.shape != wanted:
                raise WeightsError("a tensor is of another model", at=f"{path}: {name}", got=found.shape,
                                   expected=wanted, fix="check the configuration")  # fmt: skip
    tied = {"lm_head.weight", "output.weight"} if model.head is None else set()
    left = {name for name in left - tied if not name.endswith("rotary_emb.inv_freq")}
    if left:
        raise WeightsError("the files hold what the model has not", at=f"{path}: {min(left)}",
                           got=f"{len(left)} tensors more", fix="check the configuration")  # fmt: skip
