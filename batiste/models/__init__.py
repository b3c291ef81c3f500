# SPDX-License-Identifier: Apache-2.0
"""Published architectures, each a short file that reads as single-device code, with its weights and sharding as tables.

model = load_decoder("SmolLM2-135M/")             # safetensors, sharded or not, with config.json; or a GGUF file
tokens = generate(model, prompt, 64)              # with a cache; greedy
model = Decoder(DECODERS["tiny"], rngs=Rngs(0))   # or from the start
loss = model.loss(tokens)                         # sums over tokens; the logits never exist all at once
save_decoder(model, "mine/")
"""

from __future__ import annotations

from .configs import DECODERS, DecoderConfig
from .decoder import RULES, Cache, Decoder
from .generation import generate
from .gguf import open_gguf
from .safetensors import open_safetensors
from .tensors import WeightsError
from .weights import load_decoder, save_decoder

__all__ = [
    "DECODERS",
    "RULES",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "WeightsError",
    "generate",
    "load_decoder",
    "open_gguf",
    "open_safetensors",
    "save_decoder",
]
