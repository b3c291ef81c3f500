# SPDX-License-Identifier: Apache-2.0
"""The kinds of published decoders, as tables: what `config.json` calls their settings, and their weights' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .configs import DecoderConfig, Stretch
from .mapping import As, Table
from .tensors import WeightsError

ATTENTION = {
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
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
HUGGING_FACE = ATTENTION | {
    "blocks/layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
"""Our path -> the name in Hugging Face's checkpoints of Llama, Mistral, Qwen2, Qwen3 and SmolLM2."""

LLAMA = Table(HUGGING_FACE, ignored=("*.rotary_emb.inv_freq",))
GEMMA = Table(HUGGING_FACE | {
    "blocks/layers/attn_post/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks/layers/mlp_post/scale": "model.layers.{}.post_feedforward_layernorm.weight",
})  # fmt: skip
MIXTRAL = Table(ATTENTION | {
    "blocks/layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.gate.weight",
    "blocks/layers/mlp/experts/gate": As("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", (1, 0)),
    "blocks/layers/mlp/experts/up": As("model.layers.{}.block_sparse_moe.experts.{}.w3.weight", (1, 0)),
    "blocks/layers/mlp/experts/down": As("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", (1, 0)),
})  # fmt: skip
QWEN3_MOE = Table(ATTENTION | {
    "blocks/layers/mlp/router/kernel": "model.layers.{}.mlp.gate.weight",
    "blocks/layers/mlp/experts/gate": As("model.layers.{}.mlp.experts.{}.gate_proj.weight", (1, 0)),
    "blocks/layers/mlp/experts/up": As("model.layers.{}.mlp.experts.{}.up_proj.weight", (1, 0)),
    "blocks/layers/mlp/experts/down": As("model.layers.{}.mlp.experts.{}.down_proj.weight", (1, 0)),
})  # fmt: skip
PARTS = {"query": 0, "key": 1, "value": 2}
GPT2 = Table({
    "embed/embedding": "wte.weight",
    "places/embedding": "wpe.weight",
    "blocks/layers/attn_norm/scale": "h.{}.ln_1.weight",
    "blocks/layers/attn_norm/bias": "h.{}.ln_1.bias",
    **{f"blocks/layers/attn/{name}/kernel": As("h.{}.attn.c_attn.weight", (0, 1), part, 3, 1)
       for name, part in PARTS.items()},
    **{f"blocks/layers/attn/{name}/bias": As("h.{}.attn.c_attn.bias", None, part, 3) for name, part in PARTS.items()},
    "blocks/layers/attn/out/kernel": As("h.{}.attn.c_proj.weight", (0, 1)),
    "blocks/layers/attn/out/bias": "h.{}.attn.c_proj.bias",
    "blocks/layers/mlp_norm/scale": "h.{}.ln_2.weight",
    "blocks/layers/mlp_norm/bias": "h.{}.ln_2.bias",
    "blocks/layers/mlp/up/kernel": As("h.{}.mlp.c_fc.weight", (0, 1)),
    "blocks/layers/mlp/up/bias": "h.{}.mlp.c_fc.bias",
    "blocks/layers/mlp/down/kernel": As("h.{}.mlp.c_proj.weight", (0, 1)),
    "blocks/layers/mlp/down/bias": "h.{}.mlp.c_proj.bias",
    "norm/scale": "ln_f.weight",
    "norm/bias": "ln_f.bias",
    "head/kernel": "lm_head.weight",
}, ignored=("*.attn.bias", "*.attn.masked_bias"), prefixes=("transformer.",))  # fmt: skip

# our setting -> Hugging Face's in config.json
SIZES = {
    "vocab": "vocab_size", "features": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "hidden": "intermediate_size", "head_dim": "head_dim",
    "tied": "tie_word_embeddings", "rope_theta": "rope_theta", "epsilon": "rms_norm_eps",
    "context": "max_position_embeddings",
}  # fmt: skip
WINDOWED = SIZES | {"window": "sliding_window"}
STRETCH = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
           "context": "original_max_position_embeddings"}  # fmt: skip
GEMMA2_SETTINGS = WINDOWED | {"query_scale": "query_pre_attn_scalar", "attn_cap": "attn_logit_softcapping",
                              "logit_cap": "final_logit_softcapping"}  # fmt: skip
GPT2_SETTINGS = {"vocab": "vocab_size", "features": "n_embd", "layers": "n_layer", "heads": "n_head",
                 "hidden": "n_inner", "tied": "tie_word_embeddings", "epsilon": "layer_norm_epsilon",
                 "context": "n_positions"}  # fmt: skip
EXPERTS = {"top_k": "num_experts_per_tok"}
OURS = ("z_loss", "balance_loss", "router_z_loss", "capacity")
"""Settings that say how to train, and stand in no file."""


class Kind(NamedTuple):
    """One kind of published decoders.

    Args:
        architecture: transformers' class.
        names: our setting -> theirs.
        choices: what the kind says of a model.
        fixed: what theirs have to be, and are if left out.
        defaults: ours, if theirs are left out.
        also: names that some files have in place of another.
        stretches: whether it can say how RoPE is stretched.
    """

    architecture: str
    table: Table = LLAMA
    names: Mapping[str, str] = SIZES
    choices: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {"tied": False}
    also: Mapping[str, str] = {}
    stretches: bool = True

    def says(self, config: DecoderConfig) -> bool:
        """Whether it can say all choices of a configuration."""
        fields = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
        fields |= {"kv_heads": config.heads} | dict(self.choices)
        said = {*self.names, *self.defaults, *OURS, *(["rope_stretch"] if self.stretches else [])}
        return all(getattr(config, name) == wanted for name, wanted in fields.items() if name not in said)


SILU = {"hidden_act": "silu", "attention_bias": False}
GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_gemma = {"norm": "rms+1", "post_norms": True, "activation": "gelu", "embed_scale": True}
KINDS = {
    "llama": Kind("LlamaForCausalLM", fixed=SILU | {"mlp_bias": False}),
    "mistral": Kind("MistralForCausalLM", names=WINDOWED, fixed=SILU),
    "qwen2": Kind("Qwen2ForCausalLM", names=WINDOWED, choices={"qkv_bias": True}, fixed={"hidden_act": "silu"}),
    "qwen3": Kind("Qwen3ForCausalLM", names=WINDOWED, choices={"qk_norm": True}, fixed=SILU),
    "mixtral": Kind("MixtralForCausalLM", MIXTRAL, WINDOWED | EXPERTS | {"experts": "num_local_experts"},
                    fixed={"hidden_act": "silu"}),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", QWEN3_MOE,
                      WINDOWED | EXPERTS | {"experts": "num_experts", "hidden": "moe_intermediate_size"},
                      choices={"qk_norm": True}, also={"num_experts": "num_local_experts"},
                      fixed=SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "gpt2": Kind("GPT2LMHeadModel", GPT2, GPT2_SETTINGS, stretches=False, defaults={"tied": True},
                 choices={"gated": False, "norm": "layer", "bias": True, "qkv_bias": True, "learned_positions": True},
                 fixed={"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False,
                        "scale_attn_weights": True, "add_cross_attention": False}),
    "gemma2": Kind("Gemma2ForCausalLM", GEMMA, GEMMA2_SETTINGS, _gemma, GELU, stretches=False,
                   defaults={"tied": True, "full_every": 2}),
    "gemma3_text": Kind("Gemma3ForCausalLM", GEMMA, GEMMA2_SETTINGS | {"local_theta": "rope_local_base_freq"},
                        _gemma | {"qk_norm": True}, GELU | {"use_bidirectional_attention": False}, stretches=False,
                        defaults={"tied": True, "full_every": 6, "rope_theta": 1e6, "local_theta": 1e4}),
}  # fmt: skip
"""By the `model_type` of `config.json`."""


def kind_of(config: DecoderConfig) -> tuple[str, Kind]:
    """The first kind that can say what a configuration is.

    Raises:
        WeightsError: there is none.

    >>> from .configs import DECODERS, GEMMAS
    >>> kind_of(DECODERS["mistral-7b"])[0], kind_of(GEMMAS["gemma3-1b"])[0]
    ('mistral', 'gemma3_text')
    """
    found = next(((name, kind) for name, kind in KINDS.items() if kind.says(config)), None)
    if found is None:
        raise WeightsError("no published architecture has these choices", got=str(config),
                           expected=f"those of {', '.join(KINDS)}", fix="save it as a checkpoint")  # fmt: skip
    return found


# ---------------------------------------------------------------- config.json
def read_settings(about: Mapping[str, Any], path: Path) -> DecoderConfig:
    """The configuration that a `config.json` describes.

    Raises:
        WeightsError: it is that of another architecture, or describes none.
    """
    name = about.get("model_type")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise WeightsError("the model is of an architecture that this decoder is not", at=str(path),
                           got=repr(name)[:80], expected=", ".join(KINDS))  # fmt: skip
    for theirs, wanted in kind.fixed.items():
        if about.get(theirs, wanted) != wanted:
            raise WeightsError("the model is of an architecture that this decoder is not", at=str(path),
                               got=f"{theirs}={str(about[theirs])[:80]!r}", expected=repr(wanted))  # fmt: skip
    about = {**about, **{one: about[other] for one, other in kind.also.items() if other in about}}
    found = {**kind.defaults, **{ours: about[theirs] for ours, theirs in kind.names.items() if theirs in about}}
    if "rope_theta" in kind.names:
        found |= _rope(about, path)
    if about.get("use_sliding_window") is False:
        found.pop("window", None)
    if "full_every" in found:
        found["full_every"] = _full_every(about, found["full_every"], path)
    if found.get("kv_heads") is None:
        found["kv_heads"] = found.get("heads")
    if found.get("hidden") is None and name == "gpt2":
        found["hidden"] = 4 * found.get("features", 0)
    return configured(found | dict(kind.choices), path)


def configured(found: dict[str, Any], path: Path) -> DecoderConfig:
    """The configuration of these settings.

    Raises:
        WeightsError: there is none.
    """
    if found.get("head_dim") and found["head_dim"] * found.get("heads", 0) == found.get("features"):
        found.pop("head_dim")  # it says what is so anyway
    try:
        return DecoderConfig(**found)
    except (TypeError, ValueError) as error:
        raise WeightsError("the settings do not describe a decoder", at=str(path), got=str(error)[:200]) from error


def _rope(about: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Bases and stretches: of a part of the settings in newer files, beside them in older ones."""
    given = about.get("rope_parameters") or about.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise WeightsError("RoPE's settings are a table", at=str(path), got=str(given)[:80])
    local = given.get("sliding_attention") or {}
    whole = given.get("full_attention") or given
    found = {"rope_theta": whole.get("rope_theta"), "local_theta": local.get("rope_theta")}
    for part in (whole, local):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind == "llama3" and set(STRETCH.values()) <= set(part):
            found["rope_stretch"] = Stretch(**{ours: part[theirs] for ours, theirs in STRETCH.items()})
        elif kind != "default":
            raise WeightsError("the model stretches RoPE in a way that this decoder does not", at=str(path),
                               got=str(given)[:80], expected=f"llama3 with {', '.join(STRETCH.values())}")  # fmt: skip
    return {ours: value for ours, value in found.items() if value is not None}


def _full_every(about: Mapping[str, Any], default: int, path: Path) -> int:
    """Each so-manyth layer is without a window: from a list of layers, or from their number."""
    every = about.get("sliding_window_pattern", about.get("_sliding_window_pattern", default))
    kinds = about.get("layer_types")
    if isinstance(kinds, list):
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        if kinds != layer_types(len(kinds), every):
            raise WeightsError("layers with a window alternate with others", at=str(path), got=str(kinds)[:80],
                               expected="each so-manyth without one")  # fmt: skip
    return every


def layer_types(layers: int, every: int) -> list[str]:
    """
    >>> layer_types(3, 2)
    ['sliding_attention', 'full_attention', 'sliding_attention']
    """
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def settings_of(config: DecoderConfig) -> dict[str, Any]:
    """`config.json` for transformers' classes.

    Raises:
        WeightsError: none of them has these choices.
    """
    name, kind = kind_of(config)
    about = {theirs: getattr(config, ours) for ours, theirs in kind.names.items()} | dict(kind.fixed)
    if "head_dim" in kind.names:
        about["head_dim"] = config.depth
    if stretch := config.rope_stretch:
        about["rope_scaling"] = {"rope_type": "llama3"} | {STRETCH[name]: x for name, x in stretch._asdict().items()}
    if "query_scale" in kind.names:
        about[kind.names["query_scale"]] = config.query_scale or config.depth
    if "local_theta" in kind.names:
        about[kind.names["local_theta"]] = config.local_theta or config.rope_theta
    if "full_every" in kind.defaults:
        about["layer_types"] = layer_types(config.layers, config.full_every)
    if name.startswith("qwen"):
        about |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    return {"architectures": [kind.architecture], "model_type": name, **about}
