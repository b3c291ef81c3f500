# SPDX-License-Identifier: Apache-2.0
"""The architectures there are, their published configurations, and which of them a file is of.

To add one, add a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batiste.graph import Module, Rngs
from batiste.graph.errors import ArgumentError

from .bert import BERT, BERTS, Bert, load_bert, save_bert
from .clip import CLIP, CLIPS, Clip, load_clip, save_clip
from .configs import DECODERS, GEMMAS, GPT2S, MIXTRALS, QWEN3_MOES
from .convnext import CONVNEXT, CONVNEXTS, ConvNext, load_convnext, save_convnext
from .counts import COUNTS
from .decoder import Decoder
from .dit import DIT, DITS, Dit, load_dit, save_dit
from .efficientnet import EFFICIENTNET, EFFICIENTNETS, EfficientNet, load_efficientnet, save_efficientnet
from .files import open_weights, read_json
from .kinds import GEMMA, GPT2, LLAMA, MIXTRAL, QWEN3_MOE
from .mapping import Table, entries
from .resnet import RESNET, RESNETS, ResNet, load_resnet, save_resnet
from .tensors import WeightsError
from .unet import UNET, UNETS, Unet, load_unet, save_unet
from .vit import VIT, VITS, Vit, load_vit, save_vit
from .weights import load_decoder, save_decoder
from .whisper import WHISPER, WHISPERS, Whisper, load_whisper, save_whisper


class Architecture(NamedTuple):
    """One architecture.

    Args:
        configs: the published configurations, by name.
        kinds: what `config.json` or a GGUF file calls it.
        inputs: the arguments of a call of a model of some configuration.
    """

    name: str
    summary: str
    model: Callable[..., Module]
    configs: Mapping[str, Any]
    table: Table
    load: Callable[..., Any]
    save: Callable[..., list[Path]]
    kinds: tuple[str, ...]
    inputs: Callable[[Any], tuple[Any, ...]]

    def abstract(self, config: Any) -> Module:
        """A model without values."""
        return jax.eval_shape(lambda: self.model(config, rngs=Rngs(0)))

    def parameters(self, config: Any) -> int:
        """How many numbers a model is learnt by and keeps as statistics."""
        return sum(math.prod(entry.variable.shape) for entry in entries(self.abstract(config), self.table))


def _tokens(config: Any) -> tuple[Any, ...]:
    return (jnp.arange(min(16, getattr(config, "length", 16)))[None] % config.vocab,)


def _images(config: Any) -> tuple[Any, ...]:
    size = getattr(config, "size", 64)  # those without one take any
    return (jnp.linspace(-1, 1, size * size * 3).reshape(1, size, size, 3),)


def _noisy(config: Any) -> tuple[Any, ...]:
    shape = (1, config.size, config.size, config.channels)
    labels = () if getattr(config, "labels", 1) is None else (jnp.ones(1, jnp.int32),)
    return jnp.linspace(-1, 1, math.prod(shape)).reshape(shape), jnp.full(1, 500), *labels


def _speech(config: Any) -> tuple[Any, ...]:
    shape = (1, 2 * config.moments, config.bands)
    return jnp.linspace(-1, 1, math.prod(shape)).reshape(shape), *_tokens(config)


ARCHITECTURES = {
    found.name: found
    for found in (
        Architecture("decoder", "language models: Llama, Mistral, Qwen2, Qwen3, SmolLM2, PaLM's blocks",
                     Decoder, DECODERS, LLAMA, load_decoder, save_decoder,
                     ("llama", "mistral", "qwen2", "qwen3"), _tokens),
        Architecture("gpt2", "language models: GPT-2", Decoder, GPT2S, GPT2, load_decoder, save_decoder,
                     ("gpt2",), _tokens),
        Architecture("gemma", "language models: Gemma 2, and Gemma 3 of text", Decoder, GEMMAS, GEMMA,
                     load_decoder, save_decoder, ("gemma2", "gemma3_text"), _tokens),
        Architecture("mixtral", "language models with experts: Mixtral", Decoder, MIXTRALS, MIXTRAL,
                     load_decoder, save_decoder, ("mixtral",), _tokens),
        Architecture("qwen3-moe", "language models with experts: Qwen3-MoE", Decoder, QWEN3_MOES, QWEN3_MOE,
                     load_decoder, save_decoder, ("qwen3_moe",), _tokens),
        Architecture("bert", "encoders of text: BERT, MiniLM, sentence encoders", Bert, BERTS, BERT,
                     load_bert, save_bert, ("bert",), _tokens),
        Architecture("efficientnet", "classifiers of images: EfficientNet-Lite 0 to 4", EfficientNet, EFFICIENTNETS,
                     EFFICIENTNET, load_efficientnet, save_efficientnet, (), _images),
        Architecture("vit", "classifiers of images: vision transformers", Vit, VITS, VIT,
                     load_vit, save_vit, ("vit",), _images),
        Architecture("resnet", "classifiers of images: ResNet v1.5", ResNet, RESNETS, RESNET,
                     load_resnet, save_resnet, ("resnet",), _images),
        Architecture("convnext", "classifiers of images: ConvNeXt", ConvNext, CONVNEXTS, CONVNEXT,
                     load_convnext, save_convnext, ("convnext",), _images),
        Architecture("clip", "images and texts in one space: CLIP", Clip, CLIPS, CLIP,
                     load_clip, save_clip, ("clip",), lambda config: (*_images(config), *_tokens(config))),
        Architecture("whisper", "speech to text: Whisper", Whisper, WHISPERS, WHISPER,
                     load_whisper, save_whisper, ("whisper",), _speech),
        Architecture("dit", "pictures out of noise: diffusion transformers", Dit, DITS, DIT,
                     load_dit, save_dit, ("DiTTransformer2DModel",), _noisy),
        Architecture("unet", "pictures out of noise: the UNet of DDPM", Unet, UNETS, UNET,
                     load_unet, save_unet, ("UNet2DModel",), _noisy),
    )
}  # fmt: skip
"""By name."""


def told_parameters(name: str) -> int:
    """How many parameters a configuration has, by its formula or the table; a model is built where neither knows."""
    architecture, config = configuration(name)
    return getattr(config, "parameters", None) or COUNTS.get(name) or architecture.parameters(config)


def configurations() -> Iterator[tuple[str, Architecture, Any]]:
    """Name, architecture and configuration of all that are published: `decoder/tiny`, `bert/minilm-l6`, …"""
    for architecture in ARCHITECTURES.values():
        for name, config in architecture.configs.items():
            yield f"{architecture.name}/{name}", architecture, config


def configuration(name: str) -> tuple[Architecture, Any]:
    """That of a name, with or without its architecture.

    Raises:
        ArgumentError: there is none, or several.
    """
    found = [(full, architecture, config) for full, architecture, config in configurations()
             if name in (full, full.partition("/")[2])]  # fmt: skip
    if len(found) != 1:
        known = ", ".join(full for full, *_ in found or configurations())
        problem = "there are several configurations of this name" if found else "there is no such configuration"
        raise ArgumentError(problem, got=repr(name), expected=f"one of {known}")
    return found[0][1:]


def architecture_of(path: str | Path) -> Architecture:
    """The architecture that a folder with `config.json`, or a GGUF file, says it is of.

    Raises:
        WeightsError: it says none, or none that is here.
    """
    path = Path(path)
    if path.is_dir():
        about = read_json(path / "config.json")
        kind = about.get("model_type", about.get("_class_name"))
    else:
        kind = open_weights(path).about.get("general.architecture")
    found = next((each for each in ARCHITECTURES.values() if kind in each.kinds), None)
    if found is None:
        known = ", ".join(kind for each in ARCHITECTURES.values() for kind in each.kinds)
        raise WeightsError("the files do not say that they are of an architecture that is here", at=str(path),
                           got=repr(kind)[:80], expected=f"one of {known}")  # fmt: skip
    return found
